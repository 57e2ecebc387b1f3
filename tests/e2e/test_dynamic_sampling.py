"""DAPO's dynamic sampling in whole runs: what is trained, what is said of it, and going on after a stop."""

import json
import signal

import pytest

from tests.support import e2e

DAPO = (
    "algorithm.name=dapo",
    "rollout.samples_per_question=4",
    "rollout.max_response_tokens=3",  # short, so that many groups have no "+"
    "parallel.tensor=1",
    "parallel.data=2",
    "rollout.lot_questions=1",
)


def trained(directory) -> dict[int, dict[int, list[float]]]:
    """Step -> question -> the grades of its responses."""
    found: dict = {}
    for path in sorted((directory / "rollouts").glob("step_*.jsonl")):
        for record in map(json.loads, path.open()):
            found.setdefault(record["batch"] + 1, {}).setdefault(record["question"], []).append(record["reward"])
    return found


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory) -> e2e.Run:
    return e2e.train(config, tmp_path_factory.mktemp("dapo") / "run", *DAPO)


def test_mixed_questions_are_trained_and_the_others_counted(whole):
    records = e2e.metrics(whole.directory, "train")
    for record, (step, questions) in zip(records, trained(whole.directory).items(), strict=True):
        assert record["step"] == step and all(len(grades) == 4 for grades in questions.values())
        drawn, kept = record["dynamic/questions"], record["dynamic/questions"] - record["dynamic/dropped"]
        assert kept >= 4 or drawn == 10  # all there are
        assert len(questions) == (kept - record["dynamic/surplus"] or 4)
        if kept:
            assert all(len(set(grades)) == 2 for grades in questions.values())
        assert record["dynamic/rounds"] == 1 or record["dynamic/dropped"] > 0
        assert record["method/length_reward_mean"] <= 0
    assert {1.0, 2.0, 3.0} == {record["dynamic/rounds"] for record in records}
    assert any(0 < record["dynamic/dropped"] < record["dynamic/questions"] for record in records)


def test_a_batch_that_stays_short_is_said_to(config, tmp_path):
    options = ("algorithm.options.dapo.max_rounds=1", "train.steps=3", "rollout.max_response_tokens=1")
    running = e2e.train(config, tmp_path / "run", *DAPO, *options)
    counts = {step: len(questions) for step, questions in trained(running.directory).items()}
    short = [record for record in e2e.metrics(running.directory, "train") if record["dynamic/dropped"] > 0]
    assert short and all(record["dynamic/rounds"] == 1 for record in short)
    messages = (running.directory / "messages.log").read_text()
    for record in short:
        left = 4 - int(record["dynamic/dropped"])
        assert f"step {record['step']}: {left} of 4 questions drawn in 1 rounds have unequal rewards" in messages
        assert counts[record["step"]] == (left or 4)


def test_a_stop_in_the_middle_changes_nothing(config, whole, tmp_path):
    """The rounds of the batch in flight are drawn and generated again."""
    directory = e2e.at_step(whole.directory, tmp_path / "run", 3)
    e2e.train(config, directory, *DAPO)
    e2e.assert_same_run(directory, whole.directory)


def test_a_signal_between_rounds(config, whole, tmp_path):
    running = e2e.start(config, tmp_path / "run", *DAPO)
    running.wait_for_step(2)
    running.hold(e2e.TRAIN_ANSWER)
    running.process.send_signal(signal.SIGTERM)
    assert running.finish() == 75, running.text()
    e2e.train(config, tmp_path / "run", *DAPO)
    e2e.assert_same_run(running.directory, whole.directory)


def test_with_overlap_every_round_is_of_the_same_weights(config, tmp_path):
    options = ("rollout.overlap=true", "algorithm.importance_cap=2.0", "train.steps=4")
    running = e2e.train(config, tmp_path / "run", *DAPO, *options)
    for path in sorted((running.directory / "rollouts").glob("step_*.jsonl")):
        records = [json.loads(line) for line in path.open()]
        versions = {version for record in records for _, version in record["weight_versions"]}
        assert versions == {max(0, records[0]["batch"] - 1)}
    assert any(record["dynamic/rounds"] > 1 for record in e2e.metrics(running.directory, "train"))
