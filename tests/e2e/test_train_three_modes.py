"""A run with a mode of the user's own: what is sampled, logged, evaluated and replayed."""

import json

import pytest

from tests.support import e2e

pytestmark = pytest.mark.slow

MODES = ("normal", "high_entropy", "careful")
THREE = (
    "modes.others={careful: {prompt: think please, temperature: 0.8, share: 2}}",
    "algorithm.options.policy_split.modes={careful: {eta: -0.2}}",
    "train.steps=2",
    "checkpoint.every=0",
    "eval.every=0",
    "parallel.tensor=1",
)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return e2e.make_workspace(tmp_path_factory.mktemp("three"))


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    return e2e.train(config, tmp_path_factory.mktemp("runs") / "three", *THREE)


def test_every_mode_samples_its_share(run):
    records = [json.loads(line) for line in (run.directory / "rollouts" / "step_000001.jsonl").read_text().splitlines()]
    sampled = {mode: sum(record["mode"] == mode for record in records) for mode in MODES}
    assert sampled == {"normal": 8, "high_entropy": 8, "careful": 16}


def test_what_is_logged(run):
    for record in e2e.metrics(run.directory, "train"):
        assert record["actor/rows"] == 4 * 8 * 3
        for mode in MODES:
            assert 0 < record[f"{mode}/entropy_nats"] and 0 <= record[f"{mode}/accuracy"] <= 1
        pairs = {name for name in record if name.startswith("kl/")}
        assert pairs == {f"kl/{a}_to_{b}" for a in MODES for b in MODES if a != b and "normal" in (a, b)}
        assert all(record[name] >= 0 for name in pairs)
        # engine and actor took the log-probs of each mode at its own temperature
        assert record["actor/engine_logprob_difference"] < 1e-4
    for record in e2e.metrics(run.directory, "eval"):
        assert {name.split("/")[1] for name in record if name.count("/") == 2} == set(MODES)
        assert record["eval/careful/kl_nats"] >= 0
    assert "careful: reward" in run.text()


def test_the_report_has_every_mode(run, tmp_path):
    from megatron_policysplit.reports.run_report import write_report

    write_report({"three": run.directory}, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert all(name in page for name in ("careful mode", "high-entropy mode", "normal mode"))


def test_its_dump_is_replayed_to_the_same_weights(config, run, tmp_path):
    dump = f"rollout.replay_dir={run.directory / 'rollouts'}"
    again = e2e.train(config, tmp_path / "again", *THREE, "rollout.engine=replay", dump, "eval.path=null")
    assert e2e.weights(again.directory) == e2e.weights(run.directory)


def test_other_modes_are_another_run(config, run):
    refused = e2e.train_by_command(config, run.directory, *THREE[2:], code=2)
    assert "modes.others={" in "".join(refused.errors)
    refused = e2e.train_by_command(config, run.directory, THREE[0], *THREE[2:], "rollout.normal.share=5", code=2)
    assert "rollout.normal.share=1 where this one has 5" in "".join(refused.errors)
