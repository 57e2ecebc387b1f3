"""Six steps in one go equal an interrupted run that goes on, bit for bit, however it was interrupted."""

import os
import signal

import pytest

from tests.support import e2e
from tests.support.dist import run_distributed


def test_sigterm_to_every_process_while_generating(config, straight, tmp_path):
    """As Slurm sends it: the launcher, the ranks and the reward workers all get it."""
    running = e2e.start(config, tmp_path / "run")
    running.wait_for_step(3)
    running.hold(e2e.TRAIN_ANSWER)
    for process in running.processes():
        process.send_signal(signal.SIGTERM)
    code = running.finish(seconds=60)
    assert code == 75, running.text()
    assert len(e2e.metrics(running.directory, "train")) == 3
    assert "stopped by a signal after step 3; run the same command to go on" in running.text()
    assert not any(line.startswith("error") for line in running.errors), running.text()
    again = e2e.train(config, tmp_path / "run")
    assert f"resumed from {running.directory}/checkpoints/step_000003" in again.text()
    e2e.assert_same_run(running.directory, straight.directory)


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param([], id="float32"),
        pytest.param(["model.dtype=bfloat16"], id="bfloat16", marks=pytest.mark.slow),
        pytest.param(["train.distributed_optimizer=true"], id="distributed", marks=pytest.mark.slow),
    ],
)
def test_sigint_before_the_first_step(config, straight, tmp_path, overrides):
    """The first evaluation is interrupted; the optimizer has no step to save yet."""
    running = e2e.start(config, tmp_path / "run", *overrides)
    running.hold(e2e.EVAL_ANSWER)
    running.process.send_signal(signal.SIGINT)
    assert running.finish(seconds=60) == 75, running.text()
    assert e2e.checkpoints(tmp_path / "run") == ["step_000000"]
    e2e.train(config, tmp_path / "run", *overrides, *(["train.steps=2"] if overrides else []))
    if not overrides:
        e2e.assert_same_run(tmp_path / "run", straight.directory)


def test_sigint_while_evaluating(config, straight, tmp_path):
    """The evaluation after the last step is made again, and the model is exported then."""
    directory = e2e.at_step(straight.directory, tmp_path / "run", 3)
    running = e2e.start(config, directory)
    running.hold(e2e.EVAL_ANSWER)
    running.process.send_signal(signal.SIGINT)
    assert running.finish(seconds=60) == 75, running.text()
    assert e2e.checkpoints(directory) == ["step_000003", "step_000006"]
    assert [record["step"] for record in e2e.metrics(directory, "eval")] == [0, 3]
    assert not (directory / "hf").exists()
    e2e.train(config, directory)
    e2e.assert_same_run(directory, straight.directory)


def stop_in_update(rank: int, argv: list[str]) -> int:
    """A rank whose peer, rank 1, gets SIGTERM in the midst of its first update."""
    from megatron_policysplit.actor.actor import Actor
    from megatron_policysplit.training import worker

    update = Actor.update

    def signalled(self, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return update(self, *arguments)

    if rank == 1:
        Actor.update = signalled
    return worker.main(argv)


def test_sigterm_to_one_rank_while_updating(config, straight, tmp_path):
    directory = e2e.at_step(straight.directory, tmp_path / "run", 3)
    assert run_distributed(stop_in_update, 2, [str(config), f"run.dir={directory}"]) == [75, 75]
    assert [record["step"] for record in e2e.metrics(directory, "train")] == [1, 2, 3, 4]
    assert e2e.checkpoints(directory)[-1] == "step_000004"
    e2e.train(config, directory)
    e2e.assert_same_run(directory, straight.directory)


def test_kill_while_saving(config, straight, tmp_path):
    directory = tmp_path / "run"
    running = e2e.start(config, directory, "checkpoint.every=1")
    running.wait_for(lambda: list(directory.glob("checkpoints/step_000003.partial/*")))
    running.process.kill()
    assert running.finish() == -signal.SIGKILL
    half_written = directory / "checkpoints" / "step_000009.partial"
    half_written.mkdir()
    again = e2e.train(config, directory, "checkpoint.every=1")
    assert f"resumed from {directory}/checkpoints/step_00000" in again.text()
    assert not list(directory.glob("**/*.partial"))
    e2e.assert_same_run(directory, straight.directory)


@pytest.mark.slow
def test_kill_at_many_moments(config, straight, tmp_path):
    """From the imports on; with checkpoints after every step, each start gets further than the one before."""
    directory = tmp_path / "run"
    for tenths in (5, 45, 60, 70, 80, 90, 105):
        running = e2e.start(config, directory, "checkpoint.every=1")
        try:
            running.process.wait(timeout=tenths / 10)
        except e2e.subprocess.TimeoutExpired:
            running.process.kill()
        running.finish()
    e2e.train(config, directory, "checkpoint.every=1")
    assert not list(directory.glob("**/*.partial"))
    e2e.assert_same_run(directory, straight.directory)


def test_another_layout(config, straight, tmp_path):
    directory = e2e.at_step(straight.directory, tmp_path / "run", 3)
    e2e.train(config, directory, "parallel.tensor=1", "parallel.pipeline=2", "train.steps=4")
    before, after = (e2e.metrics(run, "train")[3] for run in (straight.directory, directory))
    assert before["step"] == after["step"] == 4
    for name in ("actor/loss", "actor/grad_norm", "normal/entropy_nats", "kl/high_entropy_to_normal"):
        assert after[name] == pytest.approx(before[name], rel=1e-5, abs=1e-5), name
    assert after["normal/reward"] == before["normal/reward"]
    assert after["actor/first_ratio_off_one"] == 0


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.tensor=1", "parallel.data=2", "train.distributed_optimizer=true", "rollout.lot_questions=1"],
        ["model.dtype=bfloat16"],
        pytest.param(
            ["parallel.tensor=1", "parallel.data=2", "train.distributed_optimizer=true", "model.dtype=bfloat16"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["distributed_optimizer", "bfloat16", "both"],
)
def test_precision_and_distributed_optimizer(config, tmp_path, overrides):
    settings = [*overrides, "train.steps=4", "checkpoint.every=2", "eval.every=2"]
    e2e.train(config, tmp_path / "straight", *settings)
    directory = e2e.at_step(tmp_path / "straight", tmp_path / "run", 2)
    assert e2e.checkpoints(directory) == ["step_000002"]
    e2e.train(config, directory, *settings)
    e2e.assert_same_run(directory, tmp_path / "straight")


def test_a_methods_state_comes_back(config, tmp_path):
    """The coefficient of adaptive_entropy after six steps of two updates, in one go and with a stop after three."""
    method = [
        "algorithm.name=adaptive_entropy",
        "algorithm.options.adaptive_entropy={target: 100.0, delta: 0.01}",
        "algorithm.statistics=step",
    ]
    whole = e2e.train(config, tmp_path / "whole", *method)
    directory = e2e.at_step(whole.directory, tmp_path / "run", 3)
    e2e.train(config, directory, *method)
    e2e.assert_same_run(directory, whole.directory)
    coefficients = [record["method/coef"] for record in e2e.metrics(directory, "train")]
    assert coefficients == pytest.approx([0.02 * step for step in range(1, 7)])
