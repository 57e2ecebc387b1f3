"""Signals before and after training, a rank that is killed, weights that diverge."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.support import e2e
from tests.support.dist import run_distributed


def test_sigterm_before_the_ranks_handle_it(config, tmp_path):
    running = e2e.start(config, tmp_path / "run")
    running.wait_for(lambda: "run      " in running.text())
    running.process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert running.finish(seconds=60) == 75, running.text()
    assert time.monotonic() - began < 45
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_sigint_while_the_ranks_import(config, tmp_path):
    running = e2e.start(config, tmp_path / "run")
    handling = running.rank(1)
    # The handler is there as soon as the kernel's mask of caught signals says so.
    caught = 1 << (signal.SIGTERM - 1)
    running.wait_for(lambda: int(_status(handling.pid, "SigCgt"), 16) & caught)
    running.process.send_signal(signal.SIGINT)
    assert running.finish(seconds=90) == 75, running.text()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert not any(line.startswith("error") for line in running.errors), running.text()


def _status(pid: int, name: str) -> str:
    with open(f"/proc/{pid}/status") as file:
        return next(line.split()[1] for line in file if line.startswith(f"{name}:"))


def test_signal_before_anything_is_checked(config, tmp_path, monkeypatch):
    from megatron_policysplit.cli import main as cli
    from megatron_policysplit.training import preflight

    monkeypatch.setattr(preflight, "preflight", lambda config, **options: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr("sys.argv", ["policysplit", "train", str(config), f"run.dir={tmp_path / 'run'}"])
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 75
    assert signal.getsignal(signal.SIGTERM) is before


def stop_at_the_end(rank: int, argv: list[str]) -> int:
    from megatron_policysplit.training import worker
    from megatron_policysplit.training.journal import Journal

    export = Journal.export

    def signalled(self, name):
        os.kill(os.getpid(), signal.SIGTERM)
        export(self, name)

    Journal.export = signalled
    return worker.main(argv)


def test_signal_while_the_last_model_is_written(config, straight, tmp_path):
    """Everything is done by then but the export, which is finished."""
    directory = e2e.at_step(straight.directory, tmp_path / "run", 6)
    assert run_distributed(stop_at_the_end, 2, [str(config), f"run.dir={directory}"]) == [0, 0]
    e2e.assert_same_run(directory, straight.directory)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_run_and_is_named(config, tmp_path, rank):
    running = e2e.start(config, tmp_path / "run", "eval.path=null")
    running.wait_for_step(1)
    running.hold(e2e.TRAIN_ANSWER)
    victim = running.rank(rank)
    victim.kill()
    began = time.monotonic()
    assert running.finish(seconds=60) == 1, running.text()
    assert time.monotonic() - began < 60
    assert f"policysplit: rank {rank} (pid {victim.pid}) was killed by SIGKILL" in running.errors
    named = "rank 1 did not answer" if rank == 1 else "rank 0, which hosts the store, does not answer"
    assert any(line.startswith("error: rank") and line.endswith(named) for line in running.errors), running.text()


def test_steps_that_are_not_finite_are_skipped_and_then_stop_the_run(config, straight, tmp_path):
    """A replayed run has no engine that would notice first."""
    directory = tmp_path / "run"
    overrides = (
        "rollout.engine=replay",
        f"rollout.replay_dir={straight.directory / 'rollouts'}",
        "eval.path=null",
        "train.learning_rate=1e6",
        "train.weight_decay=1e6",
        "train.max_bad_steps=2",
        "train.optimizer_steps_per_batch=1",
    )
    running = e2e.train(config, directory, *overrides, code=1)
    bad = [record["actor/bad_steps"] for record in e2e.metrics(directory, "train")]
    assert bad == [0, 1, 1]
    assert "step 2: the loss or the gradient was not finite; the update was skipped" in running.text()
    dump = directory / "bad_batch_step_000003.jsonl"
    assert running.errors == [
        "error: the loss or the gradient was NaN or infinite 2 steps in a row (train.max_bad_steps); the last batch is "
        f"in {dump}; lower train.learning_rate, or look at the batch"
    ]
    records = [json.loads(line) for line in dump.open()]
    assert records == [json.loads(line) for line in (directory / "rollouts" / "step_000003.jsonl").open()]


def test_weights_that_are_not_finite_are_noticed_by_the_engine(config, tmp_path):
    """One leader generates, and all ranks end with its error."""
    from safetensors.numpy import load_file, save_file

    model = Path(shutil.copytree(config.parent / "model", tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    running = e2e.train(config, tmp_path / "run", f"model.path={model}", code=1)
    assert running.errors == [
        "error: the logits of the local engine's model (weight version 0) are not finite; "
        f"the weights in {model} are not finite themselves: use another copy of the model"
    ]


def _die_alone(rank: int, how: str, argv: list[str]) -> None:
    """Rank 1 raises, or is killed, in its first update; rank 0 waits for it as NCCL does, for ever and in C."""
    import ctypes

    from megatron_policysplit.actor.actor import Actor
    from megatron_policysplit.training import worker

    def update(self, *arguments):
        if rank == 0:
            ctypes.CDLL(None).pause()
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise KeyError("moments")

    Actor.update = update
    worker.leave(worker.main(argv))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("how", ["raise", "kill"])
def test_ranks_without_a_launcher_end_with_one_that_fails(config, tmp_path, how):
    """As srun starts them: nobody but the other ranks notices."""
    from megatron_policysplit.config.load import load_config
    from megatron_policysplit.training.run_dir import prepare_run_dir
    from tests.support.dist import Ranks

    argv = [str(config), f"run.dir={tmp_path / 'run'}", "eval.path=null", "parallel.silent_seconds=3"]
    prepare_run_dir(load_config(argv[0], argv[1:]))
    with Ranks(_die_alone, 2, how, argv, output=tmp_path / "output") as ranks:
        codes = ranks.codes(seconds=100)
    errors = [line for line in ranks.text().splitlines() if line.startswith("error")]
    if how == "raise":
        assert codes == [1, 1], ranks.text()
        assert errors == ["error: rank 1 failed ('moments'); every rank still answers"]
        assert ranks.text().count("KeyError: 'moments'") == 1
    else:
        assert codes == [1, -signal.SIGKILL], ranks.text()
        assert [error.split(":")[1] for error in errors] == [" rank 1 did not answer for 3 s"]
