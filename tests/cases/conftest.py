"""A user's directory with a model, questions and a configuration, where commands run as users type them.

Each test in this folder is one input that the product once got wrong. `make test-cases` runs them all; what they are
about is tested in finer grain, and faster, by tests/unit.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.e2e import OF_A_RANK, ROOT

BASE = """
model: {path: model, dtype: float32}
data: {path: q.jsonl, batch_questions: 4, max_prompt_tokens: 64}
modes: {high_entropy_prompt: explore widely}
rollout: {samples_per_question: 4, max_response_tokens: 8}
reward: {function: exact, workers: 1}
train: {steps: 2, learning_rate: 1.0e-3, max_tokens_per_micro_batch: 2048}
run: {dir: runs/base}
checkpoint: {every: 1}
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cases)


class Workspace:
    """A directory that holds `model`, `q.jsonl` and `base.yaml`; commands run in it."""

    def __init__(self, path: Path):
        self.path = path

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def environ(self, changes: dict[str, str]) -> dict[str, str]:
        """This process's variables without those of a launcher, with `changes`."""
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "WANDB_"))}
        environ = {name: value for name, value in environ.items() if name not in OF_A_RANK}
        return environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"} | changes

    def start(self, *arguments: str, **changes: str) -> subprocess.Popen[str]:
        """Start `policysplit ARGUMENTS` here, `changes` made to its environment."""
        return subprocess.Popen(
            [sys.executable, "-m", "megatron_policysplit.cli", *map(str, arguments)],
            cwd=self.path,
            env=self.environ(changes),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="backslashreplace",
            start_new_session=True,
        )

    def run(self, *arguments: str, seconds: float = 120, **changes: str) -> subprocess.CompletedProcess[str]:
        """What `policysplit ARGUMENTS` prints here, and its exit code; no traceback, whatever happens."""
        process = self.start(*arguments, **changes)
        try:
            stdout, stderr = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            stdout, stderr = process.communicate()
            raise AssertionError(f"{arguments} did not end in {seconds} s:\n{stdout}\n{stderr}") from None
        assert "Traceback" not in stdout + stderr, f"{arguments}:\n{stdout}\n{stderr}"
        return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)

    def refused(self, *arguments: str, code: int = 2, seconds: float = 120, **changes: str) -> str:
        """The one sentence on stderr with which `policysplit ARGUMENTS` ends."""
        result = self.run(*arguments, seconds=seconds, **changes)
        assert result.returncode == code, f"{arguments}: exit code {result.returncode}\n{result.stdout}{result.stderr}"
        errors = [line for line in result.stderr.splitlines() if "error: " in line]
        assert len(errors) == 1, f"{arguments}:\n{result.stdout}{result.stderr}"
        return errors[0]

    def accepted(self, *arguments: str, seconds: float = 120, **changes: str) -> str:
        """What `policysplit ARGUMENTS` prints to stdout; it must end with exit code 0."""
        result = self.run(*arguments, seconds=seconds, **changes)
        assert result.returncode == 0, f"{arguments}: exit code {result.returncode}\n{result.stdout}{result.stderr}"
        return result.stdout

    def copy_model(self, name: str) -> Path:
        """A copy of the model that a test may damage."""
        shutil.copytree(self / "model", self / name)
        return self / name


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory) -> Path:
    """The quickstart's model, warmed up, and its questions."""
    from examples.quickstart.run import prepare

    directory = tmp_path_factory.mktemp("quickstart")
    prepare(directory, 0, {})
    return directory


@pytest.fixture
def work(tmp_path, quickstart) -> Workspace:
    """A fresh workspace."""
    shutil.copytree(quickstart / "model", tmp_path / "model")
    shutil.copy(quickstart / "questions.jsonl", tmp_path / "q.jsonl")
    (tmp_path / "base.yaml").write_text(BASE)
    return Workspace(tmp_path)
