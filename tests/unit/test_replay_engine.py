"""The replay engine gives back what was dumped, and says what is wrong with a dump."""

import asyncio
import json

import pytest

from megatron_policysplit.errors import DataError
from megatron_policysplit.rollout.engine import EnginePaused, Request, Sampling
from megatron_policysplit.rollout.replay import ReplayEngine
from megatron_policysplit.rows import Mode, Rollout

SAMPLING = Sampling(1.0, 1.0, -1, 8)


def record(batch, question, mode, sample, **changes):
    length = 1 + sample
    fields = {
        "batch": batch,
        "question": question,
        "mode": mode,
        "sample": sample,
        "prompt": "1 + 1?",
        "response": "2",
        "tokens": [10 * question + i for i in range(length)],
        "engine_logprobs": [-0.5 * batch] * length,
        "finish_reason": "stop",
        "weight_versions": [[0, batch]],
        "reward": 0.25,
        "answer": "2",
    }
    return {**fields, **changes}


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


@pytest.fixture
def dump(tmp_path):
    for step in (1, 2):  # a file's number is the step's, which need not be the batch's
        records = [record(step - 1, q, m, s) for q in (3, 4) for m in ("normal", "high_entropy") for s in (0, 1)]
        write(tmp_path / f"step_{step:06d}.jsonl", records)
    return tmp_path


def ask(batch=0, question=3, mode=Mode.NORMAL, samples=(0, 1)):
    return Request(batch, question, mode, [1], SAMPLING, samples, [0] * len(samples))


def run(engine, *requests):
    async def gather():
        return [rollout async for rollout in engine.submit(requests)]

    return asyncio.run(gather())


def test_the_stored_rollouts_come_back(dump):
    rollouts = run(ReplayEngine(dump), ask(1, 4, Mode.HIGH_ENTROPY), ask(0, 3, samples=[1]))
    assert rollouts == [
        Rollout(1, 4, Mode.HIGH_ENTROPY, 0, [40], [-0.5], "stop", [(0, 1)], reward=0.25),
        Rollout(1, 4, Mode.HIGH_ENTROPY, 1, [40, 41], [-0.5, -0.5], "stop", [(0, 1)], reward=0.25),
        Rollout(0, 3, Mode.NORMAL, 1, [30, 31], [0.0, 0.0], "stop", [(0, 0)], reward=0.25),
    ]


def test_missing_rollouts_are_named(dump):
    with pytest.raises(DataError, match=r"step_000001.jsonl has no rollout with .* = \(0, 3, 'normal', 2\); replay"):
        run(ReplayEngine(dump), ask(samples=[2]))
    with pytest.raises(DataError, match=r"no rollouts of batch 9 \(its batches are 0 to 1\); set train.steps"):
        run(ReplayEngine(dump), ask(batch=9))


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"batch": 0', "line 2: not a rollout record"),
        ("[1, 2]", "line 2: not a rollout record"),
        (json.dumps(record(0, 3, 7, 1)), "line 2: not a rollout record.*the mode 7"),
        (json.dumps(record(0, 3, "normal", 1, engine_logprobs=[])), "line 2: not a rollout record.*0 log-probs"),
        (json.dumps(record(0, 3, "normal", 0)), "line 2: .* is there twice"),
        (json.dumps({k: v for k, v in record(0, 3, "normal", 1).items() if k != "tokens"}), "has no 'tokens'"),
    ],
)
def test_a_damaged_record_is_named(tmp_path, line, message):
    (tmp_path / "step_000000.jsonl").write_text(json.dumps(record(0, 3, "normal", 0)) + "\n" + line + "\n")
    with pytest.raises(DataError, match=message):
        run(ReplayEngine(tmp_path), ask())


def test_an_empty_directory_is_refused(tmp_path):
    with pytest.raises(DataError, match="rollout.replay_dir=.* holds no step_NNNNNN.jsonl"):
        ReplayEngine(tmp_path)


def test_load_reads_all_tensors_and_pause_holds(dump):
    engine, read = ReplayEngine(dump), []

    def tensors():
        for name in "abc":
            read.append(name)
            yield name, None

    async def scenario():
        await engine.load(tensors(), 5)
        assert read == ["a", "b", "c"] and await engine.health() == 5
        stream = engine.submit([ask()])
        await anext(stream)
        await engine.pause()
        with pytest.raises(EnginePaused):
            await anext(stream)
        await engine.resume()
        await engine.release()
        await engine.restore()
        assert len([r async for r in engine.submit([ask()])]) == 2

    asyncio.run(scenario())
