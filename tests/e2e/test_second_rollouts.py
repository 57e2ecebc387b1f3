"""AEPO's and SCOPE's second rollouts in whole runs: temperatures, who is trained, a stop in the middle, a replay."""

import json

import pytest

from tests.support import e2e

LAYOUT = ("parallel.tensor=1", "parallel.data=2", "rollout.lot_questions=1")
SCOPE = (*LAYOUT, "algorithm.name=scope", "algorithm.options.scope={alpha: 0.25, target: 3.3, low: 0.5, high: 2.0}")
AEPO = (*LAYOUT, "algorithm.name=aepo", "algorithm.options.aepo={alpha: 0.1, questions: 0.5, target: 3.35}")


def dumped(directory) -> dict[int, list[dict]]:
    paths = sorted((directory / "rollouts").glob("step_*.jsonl"))
    return {step: [json.loads(line) for line in path.open()] for step, path in enumerate(paths, start=1)}


def ordinary_and_auxiliary(records: list[dict]) -> tuple[list[dict], list[dict]]:
    return [r for r in records if not r["auxiliary"]], [r for r in records if r["auxiliary"]]


@pytest.fixture(scope="module")
def scope(config, tmp_path_factory) -> e2e.Run:
    return e2e.train(config, tmp_path_factory.mktemp("scope") / "run", *SCOPE)


@pytest.fixture(scope="module")
def aepo(config, tmp_path_factory) -> e2e.Run:
    return e2e.train(config, tmp_path_factory.mktemp("aepo") / "run", *AEPO)


def test_scope_follows_the_entropy_of_the_batch_before(scope):
    records = e2e.metrics(scope.directory, "train")
    entropy = 0.0
    for record in records:
        assert record["auxiliary/temperature"] == pytest.approx(min(max(1 + 3.3 - entropy, 0.5), 2.0))
        entropy = record["method/entropy"]
        assert entropy == pytest.approx(record["normal/entropy_nats"], rel=1e-6)
    assert len({record["auxiliary/temperature"] for record in records}) > 2


def test_only_right_auxiliary_responses_are_trained_and_none_is_in_the_logged_reward(scope):
    trained = 0
    for record, records in zip(e2e.metrics(scope.directory, "train"), dumped(scope.directory).values(), strict=True):
        ordinary, auxiliary = ordinary_and_auxiliary(records)
        assert len(ordinary) == 32 and len(auxiliary) == record["auxiliary/responses"] == 8
        assert {r["sample"] for r in auxiliary} == {8, 9} and len({r["question"] for r in auxiliary}) == 4
        right = sum(r["reward"] for r in auxiliary)
        assert record["auxiliary/trained"] == right and record["auxiliary/accuracy"] == right / 8
        assert record["normal/reward"] == pytest.approx(sum(r["reward"] for r in ordinary) / 32)
        assert record["actor/rows"] == 32 + right
        assert record["actor/first_ratio_off_one"] == 0
        trained += right
    assert trained > 0


def test_a_run_of_scope_goes_on_where_it_stopped(config, scope, tmp_path):
    directory = e2e.at_step(scope.directory, tmp_path / "run", 3)
    e2e.train(config, directory, *SCOPE)
    e2e.assert_same_run(directory, scope.directory)


def test_aepo_switches_and_bounds_what_it_trains(aepo):
    entropy = 0.0
    for record, records in zip(e2e.metrics(aepo.directory, "train"), dumped(aepo.directory).values(), strict=True):
        warm = entropy <= 3.35
        assert record["auxiliary/temperature"] == (1.2 if warm else 0.8)
        assert record["auxiliary/trained"] <= (3 if warm else 1)
        assert len(ordinary_and_auxiliary(records)[1]) == record["auxiliary/responses"] == 16
        entropy = record["method/entropy"]
    assert {1.2, 0.8} == {record["auxiliary/temperature"] for record in e2e.metrics(aepo.directory, "train")}


def test_a_dump_holds_what_a_replay_needs(config, aepo, tmp_path):
    replay = (f"rollout.replay_dir={aepo.directory}/rollouts", "rollout.engine=replay", "eval.path=null")
    running = e2e.train(config, tmp_path / "run", *AEPO, *replay)
    assert e2e.weights(running.directory) == e2e.weights(aepo.directory)
