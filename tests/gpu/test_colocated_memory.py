"""On a CUDA device: the memory that changes hands between the actor and an engine on the same GPU really does."""

import importlib.util
import os
import subprocess
from pathlib import Path

import pytest
import torch

from tests.support.dist import run_distributed
from tests.support.hf_models import make_model
from tests.support.sglang import interpreter
from tests.support.training_cases import SEED, VOCAB, Case, update_batch

GIB = 2**30
CYCLES = 3

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine"),
]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """220 million parameters: large beside what the allocator rounds to, head sizes as kernels want them."""
    sizes = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 14,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 64,
    }
    return str(make_model(tmp_path_factory.mktemp("model") / "qwen3", "qwen3", tied=True, vocab=VOCAB, **sizes))


def build(path, **settings):
    """A bf16 actor that has taken a step, so that all its state is there; and its Offload."""
    from checkpoints_conv import read_hf_config
    from megatron_policysplit.actor.actor import Actor
    from megatron_policysplit.actor.offload import Offload
    from megatron_policysplit.actor.parallel import initialize
    from megatron_policysplit.config import ParallelConfig

    layout = initialize(ParallelConfig(), seed=1)
    case = Case("gpu", settings={"algorithm.options.policy_split.eta": 0.5, "model.dtype": "bfloat16", **settings})
    actor = Actor(case.config(path), read_hf_config(path), layout)
    train(actor, case, 0)
    return actor, case, layout, Offload(actor.ddp, actor.optimizer)


def train(actor, case, batch):
    rows = case.rows(batch)
    placed = actor.place(rows, case.live(rows, actor.config), seed=SEED + batch)
    update = update_batch(actor, placed, case.builder(rows, actor.log_probs(placed), placed, actor.config))
    assert update.bad_steps == 0


def state(actor):
    """Copies on the host of all that training reads."""
    tensors = list(actor.model.parameters()) + list(actor.model.buffers())
    for optimizer in actor.optimizer.megatron.chained_optimizers:
        for group in optimizer.optimizer.param_groups:
            tensors += group["params"]
        for values in optimizer.optimizer.state.values():
            tensors += [value for value in values.values() if isinstance(value, torch.Tensor)]
    return [tensor.detach().cpu().clone() for tensor in tensors]


def same(found, expected):
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


def memory():
    """(allocated by this process's tensors, free on the device), in bytes."""
    from megatron_policysplit.distributed.device import free_memory_bytes, return_freed_memory

    return_freed_memory()
    return torch.cuda.memory_allocated(), free_memory_bytes()


# --- the actor alone ---------------------------------------------------------------------------------


def away_and_back(rank, path, settings):
    """Per cycle: what was here, after each part left and after each came back; and whether the bits are the same."""
    actor, case, layout, offload = build(path, **settings)
    cycles = []
    for cycle in range(CYCLES):
        before = state(actor)
        steps = [(*memory(), 0)]
        for part in ("optimizer", "gradients", "parameters"):
            getattr(offload, f"offload_{part}")()
            steps.append((*memory(), offload.bytes_away))
        parameter = max(actor.model.parameters(), key=torch.Tensor.numel)
        read = offload.read(parameter)
        on_device = read.device == parameter.device
        del read
        for part in ("parameters", "gradients", "optimizer"):
            getattr(offload, f"restore_{part}")()
        steps.append((*memory(), offload.bytes_away))
        bits = on_device and same(state(actor), before)
        chunks = [chunk for host in offload._host.values() for chunk in host.chunks]
        pinned = all(chunk.is_pinned() for chunk in chunks)
        cycles.append((steps, bits, pinned, [chunk.data_ptr() for chunk in chunks]))
        train(actor, case, cycle + 1)
    return cycles


@pytest.mark.parametrize("settings", [{}, {"train.distributed_optimizer": True}], ids=["plain", "sharded"])
def test_the_actor_frees_its_memory_and_comes_back(path, settings):
    (cycles,) = run_distributed(away_and_back, 1, path, settings, timeout_seconds=280)
    for steps, bits, pinned, _ in cycles:
        assert bits and pinned
        (allocated, free, _), *parts, (allocated_after, free_after, nothing) = steps
        for index, (left, free_now, away) in enumerate(parts):
            previous = steps[index][2]
            assert away - previous > 0.3 * GIB, "each part of this model is larger than that"
            # The allocator rounds tensors up to 512 bytes, and gives back segments of which nothing is in use.
            assert abs((allocated - left) - away) < 0.01 * away
            assert free_now - free > 0.95 * away
        assert parts[-1][0] < 0.05 * allocated, "hardly anything of the actor is left on the device"
        assert nothing == 0
        assert abs(allocated_after - allocated) < 0.01 * allocated
        assert abs(free_after - free) < 0.05 * parts[-1][2]
    assert len({tuple(chunks) for *_, chunks in cycles}) == 1, "host memory is allocated once"


# --- with a real engine ------------------------------------------------------------------------------


def share_with_an_engine(rank, path, run_dir, python):
    """Free memory and whether the actor is as it was, at each change of hands."""
    import time

    from megatron_policysplit.distributed.control import Control
    from megatron_policysplit.distributed.stop_signal import StopSignal
    from megatron_policysplit.rollout.sglang_http import SglangClient
    from megatron_policysplit.serving.colocation import Colocation
    from megatron_policysplit.serving.members import Member, Placement, State
    from megatron_policysplit.serving.servers import Server, server_spec

    actor, case, layout, offload = build(path)
    config = actor.config
    config.run.dir, config.rollout.engine, config.rollout.colocated = run_dir, "sglang", True
    config.rollout.server.python = python
    config.rollout.server.arguments = {"mem-fraction-static": 0.5, "skip-tokenizer-init": True}
    control = Control(layout.control, StopSignal())
    server = Server(server_spec(config, 0, local_gpus=[0]))
    server.hold_ports(1)
    client = SglangClient(server.address)
    member = Member(Placement(0, 0, (0,)), client, 1)
    colocation = Colocation(offload, [member], control, layout, start_seconds=400.0)
    before, seen = state(actor), []

    async def start():
        server.start()
        colocation.started(member)
        await server.ready(client)
        member.state = State.SERVING

    async def resume():
        await client.pause()
        await colocation.before_load(member)
        await client.update_from_disk(path)
        await colocation.after_load(member)
        await client.flush()
        await client.proceed()
        await client.generate({"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 8}})
        member.state = State.SERVING

    try:
        for cycle in range(CYCLES):
            alone = memory()[1]
            colocation.to_generation()
            room = memory()[1]
            control.run(resume() if cycle else start())
            with_engine = memory()[1]
            began = time.monotonic()
            colocation.to_training()
            seen.append((alone, room, with_engine, memory()[1], time.monotonic() - began, same(state(actor), before)))
    finally:
        control.run(client.close())
        control.run(server.stop())
        control.close()
    return seen


def has_memory_saver(python: Path) -> bool:
    return (
        python.exists()
        and not subprocess.run([python, "-c", "import sglang, torch_memory_saver"], capture_output=True).returncode
    )


def test_an_engine_and_the_actor_take_turns(path, tmp_path):
    python = interpreter()
    if not has_memory_saver(python):
        pytest.skip(f"{python} has no SGLang with torch_memory_saver; POLICYSPLIT_SGLANG_PYTHON names another one")
    os.environ.pop("PYTORCH_CUDA_ALLOC_CONF", None)
    (seen,) = run_distributed(share_with_an_engine, 1, path, str(tmp_path), str(python), timeout_seconds=290)
    total = torch.cuda.get_device_properties(0).total_memory
    for cycle, (alone, room, with_engine, after, _, bits) in enumerate(seen):
        assert bits, "the actor is as it was"
        assert room - alone > 2 * GIB, "the actor made room"
        # At the first turn the engine takes its context along; that much stays when it releases the rest.
        kept = 3 * GIB
        assert room - with_engine > 0.4 * total - kept, "half of the memory is the engine's"
        assert after > seen[0][0] - kept, "and none of it any more when the actor is back"
        if cycle:
            assert abs(with_engine - seen[0][2]) < kept, "it takes as much again at every turn"
