"""What the weight sync does on a GPU, by stand-ins: buffers, broadcasts that never return, NCCL on both sides."""

import threading
from types import SimpleNamespace

import pytest
import torch

from megatron_policysplit.config import Config
from megatron_policysplit.config.engine_checks import check_actor_allocator
from megatron_policysplit.distributed.environment import defaults, engines_nccl
from megatron_policysplit.errors import ConfigError
from megatron_policysplit.serving import colocation
from megatron_policysplit.weight_sync import groups, nccl, tensor

# --- buffers on a GPU, broadcasts that never return --------------------------------------------------


class GpuBuffer:
    """A buffer as on a GPU: used once. Knows how many are held at a time."""

    held, most, sizes = 0, 0, []
    reusable = False

    def __init__(self, nbytes):
        cls = type(self)
        cls.held += 1
        cls.most, cls.sizes = max(cls.most, cls.held), [*cls.sizes, nbytes]

    def release(self):
        type(self).held -= 1


def test_colocated_ranks_hold_one_buffer_of_the_size_of_its_bucket(monkeypatch):
    monkeypatch.setattr(tensor, "training_device", lambda: torch.device("cuda", 0))
    transport = tensor.TensorTransport.__new__(tensor.TensorTransport)
    transport.plan = [SimpleNamespace(nbytes=nbytes) for nbytes in (30, 10, 20)]
    transport._buffer = lambda nbytes, device: GpuBuffer(nbytes)
    buffer = None
    for bucket in transport.plan:
        buffer = transport._next_buffer(buffer, bucket)
    assert (GpuBuffer.most, GpuBuffer.sizes) == (1, [30, 10, 20])


class NoAbort:
    def reason(self):
        return None


def sender(seconds):
    group = groups.SenderGroup("weights", "127.0.0.1", 2, seconds)
    group._group = object()
    return group


def test_a_broadcast_that_never_returns_ends_at_the_time_out(monkeypatch):
    """What NCCL does when an engine does not come: a call that blocks for ever, in the first broadcast."""
    entered, forever, aborted = threading.Event(), threading.Event(), []

    def block(*args, **kwargs):
        entered.set()
        forever.wait()

    monkeypatch.setattr(groups.dist, "broadcast", block)
    monkeypatch.setattr(groups.c10d, "_abort_process_group", aborted.append)
    group = sender(0.3)
    with pytest.raises(groups.BroadcastFailed, match="did not take a bucket from weights in 0.3 s"):
        group.broadcast(torch.zeros(2), NoAbort())
    assert entered.is_set() and not group.over
    handle = group._group
    group.leave()
    assert aborted == [handle]  # destroying it would wait for ever, too
    assert [thread.daemon for thread in threading.enumerate() if thread.name == "weights"] == [True]
    forever.set()


def test_what_a_broadcast_raises_in_its_thread_is_told(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("NCCL error: unhandled system error\nlast error: no route")

    monkeypatch.setattr(groups.dist, "broadcast", fail)
    with pytest.raises(
        groups.BroadcastFailed, match="a broadcast in weights failed: NCCL error: unhandled system error$"
    ):
        sender(5).broadcast(torch.zeros(2), NoAbort())


def test_nccl_of_both_sides(monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 2.28.9\n")
    python.chmod(0o755)
    settings = SimpleNamespace(server_python=str(python), external_servers=False)
    nccl.check_nccl(settings)  # no GPU: gloo
    for version in ("2.28.9", "2.29.2"):
        monkeypatch.setattr(nccl, "nccl_version", lambda version=version: version)
        if version == "2.28.9":
            nccl.check_nccl(settings)
            continue
        with pytest.raises(ConfigError, match=f"{python} has 2.28.9 and the trainer's 2.29.2; install torch releases"):
            nccl.check_nccl(settings)
    nccl.check_nccl(SimpleNamespace(server_python=str(python), external_servers=True))
    python.write_text("#!/bin/sh\necho no torch >&2; exit 1\n")
    with pytest.raises(ConfigError, match=r"cannot say its NCCL \(no torch\)"):
        nccl.check_nccl(settings)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ({}, ("0", "0")),
        ({"enable-nccl-nvls": True}, ("0", "1")),
        ({"enable-symm-mem": True}, ("1", "1")),
        ({"enable-symm-mem": False, "tp": 8}, ("0", "0")),
    ],
)
def test_ranks_have_the_variables_that_sglang_sets(arguments, expected):
    """As in `_set_envs_and_config` of its engine.py, releases 0.5.16 and 0.5.23."""
    variables = engines_nccl(arguments)
    assert (variables["NCCL_CUMEM_ENABLE"], variables["NCCL_NVLS_ENABLE"]) == expected
    on_gpu = {"tensor": 1, "deterministic": False, "capability": (9, 0)}
    assert defaults(**on_gpu, nccl=variables) == defaults(**on_gpu) | variables
    assert not defaults(**on_gpu).keys() & variables.keys()
    assert defaults(tensor=1, deterministic=False, capability=None, nccl=variables) == {}


def test_expandable_segments_of_the_actor():
    config, environ = Config(), {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64, expandable_segments:True"}
    check_actor_allocator(config, environ)  # engines apart get a copy in host memory
    config.rollout.colocated, config.weight_sync.transport = True, "tensor"
    with pytest.raises(ConfigError) as error:
        check_actor_allocator(config, environ)
    assert str(error.value) == (
        f"PYTORCH_ALLOC_CONF={environ['PYTORCH_ALLOC_CONF']} is set in the environment, but memory of "
        "expandable_segments cannot be handed to engines, which rollout.colocated=true with "
        "weight_sync.transport=tensor does; unset it, or set weight_sync.transport=disk"
    )
    check_actor_allocator(config, {"PYTORCH_ALLOC_CONF": "expandable_segments:False"})
    config.weight_sync.transport = "disk"
    check_actor_allocator(config, environ)


def test_what_this_process_has_cached_is_given_back_before_it_counts(monkeypatch):
    """Else the wait for an engine's memory would take it for somebody else's, and last until its limit."""
    free = [10.0]
    monkeypatch.setattr(colocation, "return_freed_memory", lambda: free.__setitem__(0, 60.0 * 2**30))
    turn = colocation.Colocation.__new__(colocation.Colocation)
    turn.offload = SimpleNamespace(bytes_away=40 * 2**30, free_bytes=lambda: free[0])
    turn._free_without_engines, turn.settle_seconds, turn.release_seconds = 60.0 * 2**30, 100.0, 100.0
    turn._wait_for_memory(10.0)
    assert free == [60.0 * 2**30]
