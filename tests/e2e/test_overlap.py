"""rollout.overlap: the next batch is generated with the weights that this batch is about to change."""

import json
import signal

import pytest

from tests.support import e2e

OVERLAP = ("rollout.overlap=true", "algorithm.importance_cap=2.0")


def versions(directory) -> dict[int, set[int]]:
    """Step -> the weight versions that sampled its batch."""
    found = {}
    for path in sorted((directory / "rollouts").glob("step_*.jsonl")):
        records = [json.loads(line) for line in path.open()]
        found[int(path.stem.removeprefix("step_"))] = {v for record in records for _, v in record["weight_versions"]}
    return found


def keys(path) -> list[tuple]:
    return [(r["batch"], r["question"], r["mode"], r["sample"]) for r in map(json.loads, path.open())]


@pytest.fixture(scope="module")
def overlapped(config, tmp_path_factory) -> e2e.Run:
    return e2e.train(config, tmp_path_factory.mktemp("overlap") / "run", *OVERLAP)


def test_samples_are_one_version_behind_and_say_so(overlapped):
    assert versions(overlapped.directory) == {1: {0}, 2: {0}, 3: {1}, 4: {2}, 5: {3}, 6: {4}}
    for record in e2e.metrics(overlapped.directory, "train"):
        behind = min(1, record["step"] - 1)
        assert record["rollout/staleness_max"] == record["rollout/staleness_mean"] == behind
        assert record["rollout/weight_version_max"] == record["step"] - 1 - behind
        assert record["actor/first_ratio_off_one"] == 0  # PPO's ratio is to the actor that scored, not to the sampler
        if behind:
            assert record["importance/min"] < 1 < record["importance/max"] <= 2


def test_the_same_questions_as_without_overlap_each_once(overlapped, straight):
    for path in sorted((straight.directory / "rollouts").glob("*.jsonl")):
        assert keys(overlapped.directory / "rollouts" / path.name) == keys(path)
    first = "step_000001.jsonl"  # sampled by the same weights
    assert (overlapped.directory / "rollouts" / first).read_bytes() == (
        straight.directory / "rollouts" / first
    ).read_bytes()


def test_resume_generates_the_batch_in_flight_again(config, overlapped, tmp_path):
    """Stopped in mid-run, the batch in flight is forgotten; it comes again, from the weights that were saved."""
    running = e2e.start(config, tmp_path / "run", *OVERLAP)
    running.wait_for_step(2)
    running.process.send_signal(signal.SIGTERM)
    assert running.finish() == 75
    trained = max(record["step"] for record in e2e.metrics(running.directory, "train"))
    assert 2 <= trained < 6
    e2e.train(config, running.directory, *OVERLAP)
    found, straight = versions(running.directory), versions(overlapped.directory)
    assert found[trained + 1] == {trained}
    assert {step: found[step] for step in found if step != trained + 1} == {
        step: straight[step] for step in straight if step != trained + 1
    }
    for path in sorted((overlapped.directory / "rollouts").glob("*.jsonl")):
        assert keys(running.directory / "rollouts" / path.name) == keys(path)
