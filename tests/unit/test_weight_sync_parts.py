"""The parts of a weight sync: buckets and their wire format, shared memory, the order of calls, who can be reached."""

import asyncio
import base64
import io
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest
import torch
from torch.multiprocessing import get_sharing_strategy, reductions

from megatron_policysplit.config import Config
from megatron_policysplit.errors import ConfigError
from megatron_policysplit.rollout.sglang_http import EngineRefused, EngineUnreachable
from megatron_policysplit.serving.members import Member, Placement
from megatron_policysplit.weight_sync import session, shared_memory, tensor
from megatron_policysplit.weight_sync.bucket import payload, plan_buckets
from megatron_policysplit.weight_sync.groups import own_address
from megatron_policysplit.weight_sync.transport import sync_settings
from tests.support.commands import run_code
from tests.support.fake_sglang import Unpickler

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Given:
    name: str
    shape: tuple
    stage: int = 0


GIVEN = [Given("a", (4, 8)), Given("b", (3,)), Given("c", (100,)), Given("d", (1, 5), 1), Given("e", (2,), 1)]


def names(plan):
    return [bucket.names for bucket in plan]


def test_consecutive_tensors_share_a_bucket_up_to_its_limit():
    plan = plan_buckets(GIVEN, torch.float32, 140, per_stage=False)
    assert names(plan) == [("a", "b"), ("c",), ("d", "e")]
    assert [bucket.nbytes for bucket in plan] == [140, 400, 28]
    assert names(plan_buckets(GIVEN, torch.bfloat16, 140, per_stage=False)) == [("a", "b"), ("c",), ("d", "e")]
    assert names(plan_buckets(GIVEN, torch.float32, 10**6, per_stage=False)) == [("a", "b", "c", "d", "e")]
    assert names(plan_buckets(GIVEN, torch.float32, 10**6, per_stage=True)) == [("a", "b", "c"), ("d", "e")]
    assert [bucket.stage for bucket in plan_buckets(GIVEN, torch.float32, 1, per_stage=True)] == [0, 0, 0, 1, 1]


def test_a_bucket_takes_its_tensors_and_no_others():
    (plan,) = plan_buckets(GIVEN[:2], torch.float32, 10**6, per_stage=False)
    a, b = torch.randn(4, 8), torch.randn(3)
    flat = torch.empty(plan.nbytes, dtype=torch.uint8)
    plan.fill(iter([("a", a), ("b", b)]), flat)
    assert torch.equal(flat[:128].view(torch.float32).view(4, 8), a)
    assert torch.equal(flat[128:].view(torch.float32), b)
    for wrong in ([("b", b)], [("a", a.T.contiguous())], [("a", a.double())]):
        with pytest.raises(ValueError, match="came in place of a"):
            plan.fill(iter(wrong), flat)


@pytest.fixture
def memory():
    memory = shared_memory.SharedMemory()
    yield memory
    memory.close()


def test_what_a_receiver_is_told_to_read(memory):
    """Nothing beyond what SGLang's receiver unpickles, and the sharing strategy of the process is left alone."""
    (plan,) = plan_buckets(GIVEN[:2], torch.bfloat16, 10**6, per_stage=False)
    buffer = memory.buffer(plan.nbytes + 100, CPU)
    buffer.flat.copy_(torch.arange(len(buffer.flat)))
    before = get_sharing_strategy()
    text = payload(plan, buffer.flat[: plan.nbytes])
    assert get_sharing_strategy() == before
    data = base64.b64decode(text)
    assert len(data) < 2000  # it names the memory, it does not hold it
    given = Unpickler(io.BytesIO(data)).load()
    assert torch.equal(given["flattened_tensor"], buffer.flat[: plan.nbytes])
    assert [(m.name, m.shape, m.dtype, m.start_idx, m.end_idx, m.numel) for m in given["metadata"]] == [
        ("a", torch.Size([4, 8]), torch.bfloat16, 0, 64, 64),
        ("b", torch.Size([3]), torch.bfloat16, 64, 70, 6),
    ]
    buffer.release()


def test_a_gpu_is_named_by_its_uuid(monkeypatch):
    """Not by its number, which is another in the engine's process."""
    (plan,) = plan_buckets(GIVEN[:1], torch.float32, 10**6, per_stage=False)
    shared = (torch.Tensor, (128,), (1,), 0, torch.storage.TypedStorage, torch.uint8, 3, b"handle", 128, 0, False)
    monkeypatch.setattr(reductions, "reduce_tensor", lambda value: (reductions.rebuild_cuda_tensor, shared))
    properties = {3: type("Properties", (), {"uuid": "8a7b"})}
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties.__getitem__)
    seen = []
    data = base64.b64decode(payload(plan, torch.zeros(128, dtype=torch.uint8)))

    class Receiver(Unpickler):
        def find_class(self, module, name):
            if name == "rebuild_cuda_tensor":
                return lambda *arguments: seen.append(arguments)
            return super().find_class(module, name)

    Receiver(io.BytesIO(data)).load()
    assert seen == [shared[:6] + ("8a7b",) + shared[7:]]


def test_shared_memory_is_gone_when_it_is_released(memory):
    before = set(os.listdir("/dev/shm"))
    buffer = memory.buffer(1000, CPU)
    assert set(os.listdir("/dev/shm")) - before == {buffer.name.strip("/")} and buffer.reusable
    (plan,) = plan_buckets([Given("a", (250,))], torch.float32, 10**6, per_stage=False)
    payload(plan, buffer.flat)  # for a reader that never comes
    buffer.release()
    buffer.release()
    assert set(os.listdir("/dev/shm")) <= before


def test_shared_memory_that_is_too_small_is_an_error_and_not_a_crash(memory):
    with pytest.raises(ConfigError, match="does not fit in /dev/shm.*lower weight_sync.bucket_mib"):
        memory.buffer(2**46, CPU)


def test_the_memory_manager_inherits_nothing_and_ends():
    """A process of torch's own would keep the trainer's sockets and standard error open after its death."""
    code = (
        "import os, torch, psutil\n"
        "from megatron_policysplit.weight_sync.shared_memory import SharedMemory\n"
        "reader, writer = os.pipe(); os.set_inheritable(writer, True)\n"
        "memory = SharedMemory(); buffer = memory.buffer(10, torch.device('cpu'))\n"
        "(manager,) = psutil.Process().children()\n"
        "files = {os.readlink(f'/proc/{manager.pid}/fd/{fd}') for fd in os.listdir(f'/proc/{manager.pid}/fd')}\n"
        "own = {os.readlink(f'/proc/self/fd/{fd}') for fd in (2, writer)}\n"
        "assert not files & own, files & own\n"
        "buffer.release(); memory.close()\n"
        "assert not psutil.Process().children()\n"
    )
    done = run_code(code)
    assert done.returncode == 0, done.stderr


def start_python(code):
    """As users start it, to its real end."""
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)


@pytest.mark.parametrize(("end", "run"), [("", start_python), ("os.kill(os.getpid(), 9)", run_code)])
def test_a_process_that_ends_without_a_release_leaves_nothing(end, run):
    """Neither at its own end nor when it is killed, when the manager sees to it."""
    code = (
        "import os, torch\n"
        "from megatron_policysplit.weight_sync.shared_memory import SharedMemory\n"
        "memory = SharedMemory(); buffer = memory.buffer(10, torch.device('cpu'))\n"
        "print(buffer.name, memory._socket.decode(), flush=True)\n" + end
    )
    done = run(code)
    name, manager = done.stdout.split()
    deadline = time.monotonic() + 60
    while (os.path.exists(f"/dev/shm{name}") or os.path.exists(manager)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not os.path.exists(f"/dev/shm{name}") and not os.path.exists(manager)


class Recorder:
    """A client that notes its calls and fails where it is told to: {call: errors, one for each time}."""

    address = "http://127.0.0.1:1"

    def __init__(self, **errors):
        self.calls, self.errors, self.served = [], errors, None

    def __getattr__(self, name):
        async def call(*arguments):
            self.calls.append(name)
            pending = self.errors.get(name, [])
            if pending:
                raise pending.pop(0)
            if name == "set_version":
                self.served = arguments[0]
            return self.served

        return call


def refused(why="no"):
    return EngineRefused(why, 400)


def member(client):
    return Member(Placement(0, 0, (0,)), client, 1)


def sync_once(client, *, begins=True, limit=5.0):
    async def hook(name):
        client.calls.append(name)

    async def run():
        one = member(client)
        await session.open_session(one, begins=begins, limit=limit, before_load=lambda m: hook("before_load"))
        client.calls.append("weights")
        if begins:
            await session.end(one, limit)
        await session.serve_again(one, 7, limit=limit, after_load=lambda m: hook("after_load"))

    asyncio.run(run())
    return client.calls


AFTER = ["after_load", "flush", "set_version", "proceed", "version"]


def test_the_order_of_calls_with_the_hooks_of_colocated_engines():
    assert sync_once(Recorder()) == ["pause", "before_load", "begin_update", "weights", "end_update", *AFTER]
    assert sync_once(Recorder(end_update=[refused()]), begins=False) == [
        "pause",
        "before_load",
        "end_update",
        "weights",
        *AFTER,
    ]


def test_an_open_session_is_ended_first():
    calls = sync_once(Recorder(begin_update=[refused("already open")]))
    assert calls[2:6] == ["begin_update", "end_update", "begin_update", "weights"]
    with pytest.raises(EngineRefused, match="quantised"):
        sync_once(Recorder(begin_update=[refused("quantised")], end_update=[refused("none is open")]))


def test_a_flush_waits_for_requests_to_be_gone(monkeypatch):
    monkeypatch.setattr(session, "FLUSH_AGAIN_SECONDS", 0.0)
    assert sync_once(Recorder(flush=[refused(), refused()])).count("flush") == 3
    with pytest.raises(EngineRefused):
        sync_once(Recorder(flush=[refused()] * 10**6), limit=0.05)


def test_another_version_than_the_one_set_is_a_failure_and_the_engine_is_paused():
    client = Recorder()
    client.set_version = lambda version: asyncio.sleep(0)
    with pytest.raises(EngineRefused, match="says weight version None after version 7 was set"):
        sync_once(client)
    assert client.calls[-3:] == ["proceed", "version", "pause"]


def test_a_call_that_takes_too_long_says_what_the_engine_was_doing():
    async def run():
        await session.with_limit(0.01, member(Recorder()), "flushing its cache", asyncio.sleep(60))

    with pytest.raises(EngineUnreachable, match="127.0.0.1:1 took more than 0.01 s for flushing its cache"):
        asyncio.run(run())


@pytest.mark.parametrize(("errors", "answered"), [(refused, True), (lambda: EngineUnreachable("gone"), False)])
def test_a_failed_engine_is_left_paused_and_without_a_session(errors, answered):
    client = Recorder(pause=[errors()], end_update=[errors()])
    assert asyncio.run(session.abandon(member(client), ends=True, limit=1.0)) == answered
    assert client.calls == ["pause", "end_update"]


def test_engines_elsewhere_cannot_share_memory():
    assert tensor.is_this_machine("http://127.0.0.1:30000") and tensor.is_this_machine("http://localhost:1")
    assert not tensor.is_this_machine("http://192.0.2.1:30000") and not tensor.is_this_machine("http://no.such.host")
    with pytest.raises(
        ConfigError, match="http://192.0.2.1:30000 is not on this machine; set weight_sync.transport=dis"
    ):
        tensor.check_reach(sync_settings(Config()), ["http://192.0.2.1:30000"])


def test_memory_is_shared_between_equal_versions_of_torch_only(tmp_path, monkeypatch):
    python = tmp_path / "python"

    def has(torch_version):
        python.write_text(f"#!/bin/sh\necho {torch_version}\n")
        python.chmod(0o755)

    config = Config()
    config.rollout.server.python = str(python)
    monkeypatch.setattr(tensor, "installed_version", lambda name: "2.13.0+cpu")
    has("2.13.0+cu130")
    tensor.check_reach(sync_settings(config), [])
    has("2.9.1+cu128")
    with pytest.raises(ConfigError, match=r"torch 2.9.1\+cu128, the trainer 2.13.0.*set weight_sync.transport=distri"):
        tensor.check_reach(sync_settings(config), [])
    python.write_text("#!/bin/sh\necho no such module >&2\nexit 1\n")
    with pytest.raises(ConfigError, match="has no torch .no such module."):
        tensor.check_reach(sync_settings(config), [])
    config.rollout.server.python = str(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="nothing cannot be run"):
        tensor.check_reach(sync_settings(config), [])
    config.rollout.addresses, config.rollout.colocated = ["http://127.0.0.1:1"], True
    with pytest.raises(ConfigError, match="cannot tell which torch"):
        tensor.check_reach(sync_settings(config), [])
    config.rollout.colocated = False
    tensor.check_reach(sync_settings(config), ["http://127.0.0.1:1"])


def test_the_address_at_which_engines_find_a_sender():
    here, far = ["http://127.0.0.1:1", "http://localhost:2"], ["http://127.0.0.1:1", "http://192.0.2.7:1"]
    assert own_address(None, here, beside_chief=True, chief_host="chief") == "127.0.0.1"
    assert own_address("10.1.2.3", far, beside_chief=True, chief_host="chief") == "10.1.2.3"
    try:
        routed = own_address(None, far, beside_chief=True, chief_host="chief")
    except OSError:
        pytest.skip("this machine has no route to other networks")
    with socket.socket() as probe:
        probe.bind((routed, 0))  # an address of this machine
