"""Weights from sharded actors into engines that speak SGLang's protocol, and every way in which that can fail."""

import os
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.dist import run_distributed
from tests.support.fake_sglang import Fault, fake_engine
from tests.support.hf_models import make_model
from tests.support.weight_sync import sync_config, syncing

TRANSPORTS = ("tensor", "distributed", "disk")
BUCKET = {
    "tensor": "/update_weights_from_tensor",
    "distributed": "/update_weights_from_distributed",
    "disk": "/update_weights_from_disk",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Qwen3 with a tied head, 131 tokens, 4 layers, about 3 MB: several buckets, also of one stage."""
    path = tmp_path_factory.mktemp("model")
    return make_model(path, "qwen3", tied=True, hidden_size=96, intermediate_size=384)


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("experts"), "qwen3_moe", tied=True)


@pytest.fixture
def engines(tmp_path):
    """Start engines: each argument is the faults of one, or a number, its tensor-parallel size."""
    with ExitStack() as stack:

        def start(*each, **options):
            return [
                stack.enter_context(
                    fake_engine(
                        tmp_path / f"engine{index}",
                        tensor=given if isinstance(given, int) else 1,
                        faults=() if isinstance(given, int) else given,
                        **options,
                    )
                )
                for index, given in enumerate(each)
            ]

        yield start


def job(rank, config, versions, sizes=(), scale=True):
    """Push `versions`, a list of (version, engines or None); weights of version v are the file's times v. What each
    push returned, and the members' states and versions after it."""
    with syncing(config, sizes) as (sync, members, actor, _):
        results = []
        files = {name: p.detach().clone() for name, p in actor.model.named_parameters()}
        for version, engines in versions:
            with torch.no_grad():
                for name, parameter in actor.model.named_parameters():
                    parameter.copy_(files[name] * version)
            failed = sync.push(version, engines)
            results.append((failed, {i: (m.state.value, m.version, m.why) for i, m in members.items()}))
        return results


def run(config, *arguments, timeout_seconds=240.0, function=job):
    ranks = config.parallel.tensor * config.parallel.pipeline * config.parallel.data
    return run_distributed(function, ranks, config, *arguments, timeout_seconds=timeout_seconds)


def assert_has(engine, model, version, ranks=(0,)):
    files = load_file(Path(model) / "model.safetensors")
    taken = engine.tensors()
    assert set(taken) == {f"{rank}/{name}" for rank in ranks for name in files if name != "lm_head.weight"}
    for name, tensor in taken.items():
        assert torch.equal(tensor, files[name.split("/", 1)[1]] * version), name


def assert_serving(engine, version):
    state = engine.state()
    assert (state["version"], state["paused"], state["session"]) == (str(version), False, False)


def agreed(results):
    """The same failures on every rank; the chief's view of the members."""
    for per_push in zip(*results, strict=True):
        assert all(failed == per_push[0][0] for failed, _ in per_push)
    chief = next(rank for rank in results if rank[0][1])
    return chief


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_two_engines_take_the_weights_of_a_sharded_actor(model, engines, tmp_path, transport, tensor, pipeline):
    first, second = engines((), ())
    config = sync_config(model, tmp_path, transport, [first.address, second.address], tensor=tensor, pipeline=pipeline)
    results = agreed(run(config, [(1, None), (3, {1}), (4, None)]))
    assert [failed for failed, _ in results] == [{}, {}, {}]
    assert results[1][1] == {0: ("serving", 1, ""), 1: ("serving", 3, "")}
    for engine in (first, second):
        assert_serving(engine, 4)
        assert_has(engine, model, 4)


@pytest.mark.parametrize("transport", [*TRANSPORTS, "colocated"])
def test_engines_take_experts_that_two_replicas_share(experts, engines, tmp_path, transport):
    """The second replica gives its experts, and needs none of the others' unless its own engine does."""
    colocated = transport == "colocated"
    started = engines(1, 1) if colocated else engines(())
    addresses = [engine.address for engine in started]
    config = sync_config(experts, tmp_path, "tensor" if colocated else transport, addresses, data=2, expert=2)
    config.rollout.colocated = colocated
    results = run(config, [(1, None), (2, None)], (1,) * len(started))
    assert all(failed == {} for rank in results for failed, _ in rank)
    for engine in started:
        assert_serving(engine, 2)
        assert_has(engine, experts, 2)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_order_of_the_calls(model, engines, tmp_path, transport):
    (engine,) = engines(())
    config = sync_config(model, tmp_path, transport, [engine.address], tensor=1, pipeline=2)
    run(config, [(1, None), (2, None)])
    calls = [call.strip("/") for call in engine.state()["calls"]]
    bucket = BUCKET[transport].strip("/")
    pushes = calls.count("pause_generation")
    assert pushes == 2 and calls.count(bucket) >= 2 * (1 if transport == "disk" else 2)
    after = ["flush_cache", "update_weight_version", "continue_generation", "model_info"]
    if transport == "disk":
        order = ["pause_generation", "end_weight_update", bucket, *after]
        assert calls == order * 2
        return
    # A stage's group is made once, in the first push, and given up at the end.
    stages = 2 if transport == "distributed" else 0
    assert calls.count("init_weights_update_group") == stages
    assert calls[len(calls) - stages :] == ["destroy_weights_update_group"] * stages
    calls = calls[: len(calls) - stages]
    shown = [call for call in calls if call not in ("server_info", "init_weights_update_group")]
    once = [call for index, call in enumerate(shown) if index == 0 or shown[index - 1] != call]
    assert once == ["pause_generation", "begin_weight_update", bucket, "end_weight_update", *after] * 2


@pytest.mark.faults
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("do", ["die", "refuse", "stop"])
def test_one_engine_fails_half_way_and_the_other_does_not(model, engines, tmp_path, transport, do):
    call = 1 if transport == "disk" else 2
    good, bad = engines((), (Fault(BUCKET[transport], do, call),))
    config = sync_config(model, tmp_path, transport, [good.address, bad.address], tensor=2)
    if do == "stop":
        config.weight_sync.timeout_seconds = 12.0
    (failed, members), (healed, healed_members) = agreed(run(config, [(1, None), (2, None)]))
    assert set(failed) == {1} and failed[1] == members[1][2]
    assert members[0] == ("serving", 1, "") and members[1][:2] == (
        "quarantined" if do == "refuse" else "down",
        None,
    )
    assert_serving(good, 2)
    assert_has(good, model, 2)
    if do == "refuse":  # it was left paused, and is given everything by the next push
        assert healed == {} and healed_members[1] == ("serving", 2, "")
        assert_serving(bad, 2)
        assert_has(bad, model, 2)
        calls = bad.state()["calls"]
        assert calls.count("/continue_generation") == 1
    else:
        assert set(healed) == {1} and "down" in healed[1]


def test_a_refusal_anywhere_leaves_that_engine_out_of_use(model, engines, tmp_path):
    paths = [
        "/pause_generation",
        "/begin_weight_update",
        "/end_weight_update",
        "/update_weight_version",
        "/continue_generation",
        "/model_info",
    ]
    good, *bad = engines((), *(tuple(Fault(path, "refuse", call) for call in range(1, 100)) for path in paths))
    config = sync_config(model, tmp_path, "tensor", [engine.address for engine in (good, *bad)])
    ((failed, members),) = agreed(run(config, [(1, None)]))
    assert set(failed) == set(range(1, 1 + len(paths)))
    assert_serving(good, 1)
    for index, (engine, path) in enumerate(zip(bad, paths, strict=True), start=1):
        assert path in failed[index] and "as the test wants it" in failed[index]
        assert members[index][0] == "quarantined"
        state = engine.state()
        assert state["paused"] or path == "/pause_generation"
        if path not in ("/continue_generation", "/model_info"):
            assert "/continue_generation" not in state["calls"]


@pytest.mark.faults
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_session_that_a_dead_trainer_left_open_is_ended(model, engines, tmp_path, transport):
    (engine,) = engines((), open_session=True)
    config = sync_config(model, tmp_path, transport, [engine.address])
    assert agreed(run(config, [(1, None)]))[0][0] == {}
    assert_serving(engine, 1)
    assert_has(engine, model, 1)


def test_all_engines_fail_and_nobody_hangs(model, engines, tmp_path):
    refusals = tuple(Fault(BUCKET["distributed"], "refuse", call) for call in range(1, 10))
    first, second = engines(refusals, (Fault(BUCKET["distributed"], "die"),))
    config = sync_config(model, tmp_path, "distributed", [first.address, second.address], tensor=1, pipeline=2)
    ((failed, members),) = agreed(run(config, [(1, None)]))
    assert set(failed) == {0, 1} and members[0][0] == "quarantined" and members[1][0] == "down"
    state = first.state()
    assert state["paused"] and not state["session"] and "/continue_generation" not in state["calls"]


def test_an_engine_dies_while_the_group_is_made(model, engines, tmp_path):
    good, bad = engines((), (Fault("/init_weights_update_group", "die"),))
    config = sync_config(model, tmp_path, "distributed", [good.address, bad.address], tensor=2)
    ((failed, members),) = agreed(run(config, [(1, None)]))
    assert set(failed) == {1} and members[0] == ("serving", 1, "")
    assert_has(good, model, 1)


@pytest.mark.faults
@pytest.mark.parametrize(("sizes", "layout"), [((2,), (2, 1)), ((1, 1), (2, 1)), ((2,), (1, 1)), ((2,), (1, 2))])
def test_colocated_ranks_give_their_own_copies(model, engines, tmp_path, sizes, layout):
    """Engine ranks on the actor's own, over tensor, data and pipeline ranks alike."""
    started = engines(*sizes)
    tensor, pipeline = layout
    data = sum(sizes) // (tensor * pipeline)
    addresses = [engine.address for engine in started]
    config = sync_config(model, tmp_path, "tensor", addresses, tensor=tensor, pipeline=pipeline, data=data)
    config.rollout.colocated = True
    results = run(config, [(1, None), (2, None)], sizes)
    assert all(failed == {} for rank in results for failed, _ in rank)
    for engine, size in zip(started, sizes, strict=True):
        assert_serving(engine, 2)
        assert_has(engine, model, 2, ranks=range(size))


def test_a_colocated_engine_fails_and_the_other_does_not(model, engines, tmp_path):
    good, bad = engines((), (Fault(BUCKET["tensor"], "refuse", 2),))
    config = sync_config(model, tmp_path, "tensor", [good.address, bad.address], tensor=2)
    config.rollout.colocated = True
    results = run(config, [(1, None), (2, None)], (1, 1))
    assert [set(failed) for failed, _ in results[0]] == [{1}, set()]
    assert results[1][0][1][1][0] == "quarantined"
    assert_has(good, model, 2)
    assert_has(bad, model, 2)


def test_a_failing_export_is_raised_on_every_rank(model, engines, tmp_path):
    for transport in TRANSPORTS:
        (engine,) = engines(())
        config = sync_config(model, tmp_path, transport, [engine.address], tensor=1, pipeline=2)
        errors = run(config, function=failing_export)
        assert all("out of memory" in error for error, _ in errors), errors
        states = [state for _, state in errors if state]
        assert states == ["quarantined"]
        assert engine.state()["paused"]
        engine.process.kill()


def failing_export(rank, config):
    reads = []

    def read(parameter):
        reads.append(parameter)
        if rank == 1 and len(reads) > 3:
            raise MemoryError("out of memory")
        return parameter.detach()

    with syncing(config, read=read) as (sync, members, _, _):
        with pytest.raises(Exception, match="out of memory") as error:
            sync.push(1)
        return str(error.value), members[0].state.value if members else None


def test_snapshots_are_kept_and_given_to_an_engine_that_comes_back(model, engines, tmp_path):
    (engine,) = engines(())
    config = sync_config(model, tmp_path, "disk", [engine.address])
    leftover = tmp_path / "weights" / ".version-00000009.partial"
    leftover.mkdir(parents=True)
    (results,) = run(config, function=restoring)
    assert results == (False, True, ("serving", 4))
    assert_serving(engine, 4)
    assert_has(engine, model, 1)
    assert sorted(os.listdir(tmp_path / "weights")) == ["version-00000003", "version-00000004"]


def restoring(rank, config):
    with syncing(config) as (sync, members, _, _):
        before = sync.can_restore
        for version in (1, 2, 3, 4):
            sync.push(version)
        sync.control.run(members[0].client.set_version("lost"))
        sync.control.run(sync.restore_from_snapshot(members[0]))
        return before, sync.can_restore, (members[0].state.value, members[0].version)


@pytest.mark.faults
@pytest.mark.parametrize("transport", ["tensor", "distributed"])
def test_nothing_is_left_behind(model, engines, tmp_path, transport):
    (engine,) = engines(())
    config = sync_config(model, tmp_path, transport, [engine.address])
    before = set(os.listdir("/dev/shm"))
    ((during, processes),) = run(config, function=leftovers)
    assert during == [] and processes == []
    assert not {name for name in set(os.listdir("/dev/shm")) - before if name.startswith(("torch_", "policysplit"))}


def leftovers(rank, config):
    """Shared files of this process after two pushes, and its child processes after the end."""
    import psutil

    with syncing(config) as (sync, _, _, _):
        sync.push(1)
        sync.push(2)
        files = [name for name in os.listdir("/dev/shm") if str(os.getpid()) in name or "policysplit" in name]
    return files, [child.name() for child in psutil.Process().children()]
