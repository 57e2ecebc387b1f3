"""Runs whose old log-probs are the engine's: what is left out of scoring, and that training hardly moves by it."""

import pytest

from tests.support import e2e

pytestmark = pytest.mark.slow

SHORT = ("train.steps=3", "checkpoint.every=0", "eval.path=null", "parallel.tensor=1")
ENGINE = ("algorithm.old_logprobs=engine", "log.kl_tokens=sample", "agreement.every=2")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return e2e.make_workspace(tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="module")
def runs(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    options = {"engine": ENGINE, "actor": ENGINE[1:], "grpo": ("algorithm.name=grpo", *ENGINE)}
    return {name: e2e.train(config, out / name, *SHORT, *given).directory for name, given in options.items()}


def train_records(directory):
    return e2e.metrics(directory, "train")


def test_rows_that_the_engine_has_scored_are_left_out_but_where_the_two_are_compared(runs):
    """4 questions x 8 responses; one response of each question and sampling mode is for the logs."""
    engine, grpo = train_records(runs["engine"]), train_records(runs["grpo"])
    assert ["agreement/difference" in record for record in engine] == [True, False, True]
    assert engine[0]["agreement/tokens"] > 3 * engine[0]["normal/response_tokens"]
    assert [record["actor/unscored_rows"] for record in grpo] == [4 * (8 - 1)] * 3
    assert all(record["actor/unscored_rows"] >= 4 * (8 - 2) for record in engine)
    for record in (*engine, *grpo):
        assert record["normal/entropy_nats"] > 0 and record["actor/engine_logprob_difference"] < 1e-4
        assert 0 < record["actor/first_ratio_off_one"] < 1e-3


def test_training_is_that_of_the_actors_logprobs_up_to_their_rounding(runs):
    for engine, actor in zip(train_records(runs["engine"]), train_records(runs["actor"]), strict=True):
        assert actor["actor/first_ratio_off_one"] == 0.0
        for name in ("actor/loss", "actor/grad_norm", "normal/reward", "high_entropy/reward"):
            assert engine[name] == pytest.approx(actor[name], rel=1e-3, abs=1e-4), name


def test_the_comparison_and_the_engine_itself_change_nothing(config, runs, tmp_path):
    """A replayed batch is compared with no engine, and ends in the same weights, bit for bit."""
    dump = f"rollout.replay_dir={runs['engine'] / 'rollouts'}"
    again = e2e.train(config, tmp_path / "again", *SHORT, *ENGINE, "rollout.engine=replay", dump)
    assert e2e.weights(again.directory) == e2e.weights(runs["engine"])
