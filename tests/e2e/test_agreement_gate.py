"""The agreement gate in whole runs: what it measures when all is well, and how a run with a wrong engine ends."""

import json

import pytest

from tests.support import e2e
from tests.support.dist import run_distributed

SHORT = ("train.steps=4", "eval.path=null", "checkpoint.hugging_face=false", "checkpoint.every=0")
FAULTS = {
    "OtherTemperature": "temperature: the log-probs that came with the samples are those of temperature 0.8, not of",
    "SwappedPrompts": "template: the engine sampled it behind the prompt of the ",
    "WrongMapping": "weights: at temperature 1 its scores are",
    "Bfloat16": "precision: at temperature 1 its scores are",
}


def train_with(rank: int, engine: str, argv: list[str]) -> int:
    """One rank of a run whose local engine is a class of tests/support/sabotage.py."""
    from megatron_policysplit.rollout import local
    from megatron_policysplit.training import worker
    from tests.support import sabotage

    local.LocalEngine = getattr(sabotage, engine)
    return worker.main(argv)


def differences(directory) -> dict[int, float]:
    """Step -> the difference, of the steps that were compared."""
    return {
        record["step"]: record["agreement/difference"]
        for record in e2e.metrics(directory, "train")
        if "agreement/difference" in record
    }


def test_a_sound_engine_is_compared_now_and_then_and_agrees(config, tmp_path):
    e2e.train(config, tmp_path / "run", *SHORT, "agreement.every=2")
    found = differences(tmp_path / "run")
    assert list(found) == [1, 3]  # the batches after 0 and 2 trained ones
    assert all(difference < 1e-5 for difference in found.values())
    record = next(iter(e2e.metrics(tmp_path / "run", "train")))
    rollouts = [json.loads(line) for line in (tmp_path / "run" / "rollouts" / "step_000001.jsonl").open()]
    assert record["agreement/tokens"] == sum(len(rollout["tokens"]) for rollout in rollouts)


def test_the_first_batch_after_a_resume_is_compared(config, straight, tmp_path):
    directory = e2e.at_step(straight.directory, tmp_path / "run", 3)
    e2e.train(config, directory, "agreement.every=100")
    assert [step for step in differences(directory) if step > 3] == [4]


def test_with_overlap_the_engine_scores_what_older_weights_sampled(config, tmp_path):
    """The last batch is trained while the engine holds the weights before its own; it cannot be compared."""
    e2e.train(
        config, tmp_path / "run", *SHORT, "agreement.every=1", "rollout.overlap=true", "algorithm.importance_cap=2.0"
    )
    found = differences(tmp_path / "run")
    assert list(found) == [1, 2, 3]
    assert all(difference < 1e-5 for difference in found.values())


def test_a_breach_that_the_next_sync_heals_is_only_warned_of(config, tmp_path, capfd):
    argv = [str(config), f"run.dir={tmp_path / 'run'}", *SHORT, "agreement.every=10", "agreement.breaches=2"]
    assert run_distributed(train_with, 2, "DamagedOnce", argv) == [0, 0]
    assert capfd.readouterr().out.count("engine and actor disagree") == 1
    found = e2e.metrics(tmp_path / "run", "train")
    assert [record.get("agreement/breaches") for record in found] == [1, 0, None, None]


@pytest.mark.parametrize("engine, cause", FAULTS.items(), ids=FAULTS)
def test_a_wrong_engine_warns_and_then_ends_the_run(config, tmp_path, capfd, engine, cause):
    directory = tmp_path / "run"
    argv = [str(config), f"run.dir={directory}", *SHORT, "train.learning_rate=0", "agreement.breaches=2"]
    assert run_distributed(train_with, 2, engine, argv) == [1, 1]
    said = capfd.readouterr()
    assert [list(differences(directory)), len(e2e.metrics(directory, "train"))] == [[1], 1]
    assert "before step 1; the run ends after 2 such comparisons in a row (agreement.breaches)" in said.out
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "before step 2, in comparison 2 in a row" in errors[0], said.err
    assert f"likely cause: {cause}" in errors[0]
    assert not (directory / "checkpoints").exists()
