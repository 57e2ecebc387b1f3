"""What a run may find in its directory, and what it leaves alone."""

import json
import os
import re
from pathlib import Path

import pytest

from megatron_policysplit.actor.checkpoint_files import check_files, file_sizes, read_trainer_json
from megatron_policysplit.config.load import load_config, to_yaml
from megatron_policysplit.errors import CheckpointError, ConfigError
from megatron_policysplit.training.run_dir import HEADER, check_run_dir, locked_run_dir, prepare_run_dir, run_lock

NOTES = "# my notes\nmodel: {path: m}\n"


@pytest.fixture
def configure(tmp_path):
    def build(*overrides: str):
        return load_config(None, ["model.path=m", "data.path=d.jsonl", f"run.dir={tmp_path / 'run'}", *overrides])

    return build


@pytest.fixture
def run(tmp_path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def refusal(call, *arguments, kind=ConfigError) -> str:
    with pytest.raises(kind) as error:
        call(*arguments)
    return str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(NOTES, id="a configuration with notes"),
        pytest.param("lr: 1\nsteps: 2\n", id="another program's"),
        pytest.param("- not\n- a mapping\n", id="a list"),
        pytest.param("{broken", id="no YAML"),
        pytest.param("", id="empty"),
    ],
)
def test_a_configuration_that_no_run_wrote_is_kept(configure, run, content):
    (run / "config.yaml").write_text(content)
    assert refusal(check_run_dir, configure()) == (
        f"run.dir={run} holds a config.yaml that no run has written, and training would replace it; give another "
        f"run.dir, or rename {run / 'config.yaml'}"
    )
    with pytest.raises(ConfigError), locked_run_dir(configure()):
        pass
    assert (run / "config.yaml").read_text() == content
    assert [path.name for path in run.iterdir()] == ["config.yaml"]


def test_notes_are_kept_beside_a_run_that_has_begun(configure, run):
    (run / "checkpoints").mkdir()
    (run / "config.yaml").write_text(NOTES)
    assert "holds a config.yaml that no run has written" in refusal(check_run_dir, configure())
    (run / "config.yaml").write_bytes(b"\xff\xfe")
    assert "is not a configuration of a run ('utf-8' codec" in refusal(check_run_dir, configure())
    (run / "config.yaml").unlink()
    (run / "config.yaml").mkdir()
    assert "is not a configuration of a run ([Errno 21] Is a directory" in refusal(check_run_dir, configure())


def test_configurations_that_runs_wrote(configure, run):
    config = configure()
    prepare_run_dir(config)
    text = (run / "config.yaml").read_text()
    assert text == HEADER + to_yaml(config)
    assert (run / "config.yaml").stat().st_mode & 0o777 == 0o600
    assert check_run_dir(configure("train.learning_rate=0.5")) is False  # refused at its start
    (run / "config.yaml").write_text(to_yaml(config))  # by a version without the first line
    assert check_run_dir(config) is False
    assert "no run has written" in refusal(check_run_dir, configure("train.learning_rate=0.5"))
    (run / "metrics.jsonl").touch()  # that version opened its log
    assert check_run_dir(configure("train.learning_rate=0.5")) is False
    (run / "metrics.jsonl").write_text("{}\n")
    assert check_run_dir(config) is True


def test_a_model_that_no_run_exported_is_kept(configure, run):
    (run / "hf").mkdir()
    assert check_run_dir(configure()) is False  # empty
    (run / "hf" / "config.json").touch()
    assert refusal(check_run_dir, configure()) == (
        f"run.dir={run} holds {run / 'hf'}, which no run has written and training would replace; give another "
        "run.dir, or move it away"
    )


def test_fewer_steps_than_are_done(configure, run):
    checkpoint(run, 7)
    prepare_run_dir(configure())
    assert check_run_dir(configure("train.steps=7")) is True
    assert refusal(check_run_dir, configure("train.steps=6")) == (
        f"train.steps=6 is fewer than the 7 steps that the run in run.dir={run} has trained "
        f"({run / 'checkpoints' / 'step_000007'}); raise train.steps, or give another run.dir"
    )


def test_one_training_at_a_time(configure, run):
    config = configure()
    with locked_run_dir(config) as lock:
        assert os.fstat(lock.descriptor).st_ino == (run / "run.lock").stat().st_ino
        for call in (run_lock(config).check, run_lock(config).acquire):
            said = refusal(call)
            assert re.fullmatch(
                rf"run.dir={run} is in use by process {os.getpid()} on \S+ since .* UTC; wait for it, end it "
                rf"\(kill {os.getpid()} on \S+\), or give another run.dir",
                said,
            )
        assert check_run_dir(config) is False  # which `config` and `report` do
    assert list(run.iterdir()) == []
    (run / "gone").touch()
    said = refusal(locked_run_dir(configure(f"run.dir={run / 'gone'}")).__enter__)
    assert said == f"run.dir={run / 'gone'} cannot be written: File exists; give another run.dir"


def test_another_run_that_came_and_went_meanwhile(configure, run):
    """The look at the directory is repeated once it is held."""
    assert check_run_dir(configure()) is False
    prepare_run_dir(configure("train.learning_rate=0.5"))
    (run / "metrics.jsonl").write_text("{}\n")
    assert "holds another run" in refusal(locked_run_dir(configure()).__enter__)
    assert not (run / "run.lock").exists()


def checkpoint(run: Path, step: int) -> Path:
    """A checkpoint as far as its files go."""
    path = run / "checkpoints" / f"step_{step:06d}"
    path.mkdir(parents=True)
    for name in (".metadata", "__0_0.distcp", "common.pt"):
        (path / name).write_bytes(b"x" * 10)
    meta = {"state": {"step": step}, "model": {}, "layout": {}, "files": file_sizes(path)}
    (path / "trainer.json").write_text(json.dumps(meta))
    return path


def test_files_of_a_checkpoint(run):
    first, path = checkpoint(run, 1), checkpoint(run, 2)
    check_files(path)
    (path / "__0_0.distcp").write_bytes(b"x")
    assert refusal(check_files, path, kind=CheckpointError) == (
        f"{path} is damaged (__0_0.distcp has 1 bytes, saved were 10); move it away to resume from step_000001"
    )
    (path / "__0_0.distcp").unlink()
    assert "is damaged (__0_0.distcp is missing); move it away to resume" in refusal(
        check_files, path, kind=CheckpointError
    )
    (first / ".metadata").write_text("")
    assert refusal(check_files, first, kind=CheckpointError) == (
        f"{first} is damaged (.metadata has 0 bytes, saved were 10); move it away to begin again, as there is no "
        "older one"
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "Expecting value"),
        ("[]", "trainer.json is not a mapping"),
        ('{"state": {"step": 1}, "model": {}}', "trainer.json has no 'layout'"),
        ('{"state": 1, "model": {}, "layout": {}}', "state in trainer.json is not a mapping"),
        ('{"state": {}, "model": {}, "layout": {}}', "trainer.json has no 'step'"),
        ('{"state": {"step": "1"}, "model": {}, "layout": {}}', "state.step in trainer.json is not an integer"),
    ],
)
def test_trainer_json_that_is_damaged(run, content, reason):
    path = checkpoint(run, 1)
    (path / "trainer.json").write_text(content)
    assert reason in refusal(read_trainer_json, path, kind=CheckpointError)


def test_a_checkpoint_from_before_sizes_were_kept(run):
    path = checkpoint(run, 1)
    meta = json.loads((path / "trainer.json").read_text())
    del meta["files"]
    (path / "trainer.json").write_text(json.dumps(meta))
    check_files(path)
