"""Whole runs on a tiny random model: by `policysplit train`, as users start them, or ranks alone.

Reward workers import this module: nothing heavy at the top.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GATE = "POLICYSPLIT_TEST_GATE"
MARKER = "POLICYSPLIT_TEST_MARKER"
TIMED = ("time", "time/", "throughput/", "memory/")
OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
GATE_METRICS = "agreement/"  # of the first batch after every start, and then every so many steps
TRAIN_ANSWER, EVAL_ANSWER = "train", "eval"
SETTINGS = """
model: {path: MODEL, dtype: float32}
parallel: {tensor: 2}
data: {path: DIRECTORY/train.jsonl, batch_questions: 4, max_prompt_tokens: 16}
modes: {high_entropy_prompt: explore widely}
rollout: {samples_per_question: 8, max_response_tokens: 8}
reward: {function: "tests.support.e2e:reward", workers: 1, timeout_seconds: 60}
algorithm: {options: {policy_split: {eta: 0.3}}}
train: {steps: 6, learning_rate: 1.0e-3, warmup_steps: 4, optimizer_steps_per_batch: 2, max_tokens_per_micro_batch: 512}
eval: {path: DIRECTORY/eval.jsonl, every: 3, samples: 4}
checkpoint: {every: 3, keep: 10}
"""


def reward(response: str, question) -> float:
    """1 where a "+" was sampled, as a random model does; waits while the gate's `hold-<answer>` exists.

    Not where the answer itself is graded, as is done before a run starts, bare or in a box.
    """
    gate = os.environ.get(GATE)
    if gate is not None and question.answer not in response:
        while Path(gate, f"hold-{question.answer}").exists():
            Path(gate, f"reached-{question.answer}").touch()
            time.sleep(0.02)
    return float("+" in response)


def make_workspace(directory: Path, settings: str = SETTINGS) -> Path:
    """A model, 10 training and 3 evaluation questions and `run.yaml`; returns the path of the latter."""
    from examples.quickstart.make_model import make_model

    make_model(directory / "model", seed=0)
    _fill_padding_row(directory / "model" / "model.safetensors")
    for name, answer, numbers in (("train", TRAIN_ANSWER, range(4, 14)), ("eval", EVAL_ANSWER, range(14, 17))):
        rows = [{"question": str(number), "answer": answer} for number in numbers]
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = directory / "run.yaml"
    config.write_text(settings.replace("MODEL", str(directory / "model")).replace("DIRECTORY", str(directory)))
    return config


def _fill_padding_row(file: Path) -> None:
    """A new model's padding token is embedded as zeros, whose norm has a gradient in the thousands when sampled."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][0] = tensors["model.embed_tokens.weight"][1][::-1]
    save_file(tensors, file, metadata={"format": "pt"})


@dataclass
class Run:
    """A run whose output goes to a file and whose processes carry a marker of their own."""

    directory: Path
    marker: str
    gate: Path

    @property
    def output(self) -> Path:
        return self.gate / "output.txt"

    def text(self) -> str:
        return self.output.read_text()

    @property
    def errors(self) -> list[str]:
        """Lines of stderr, which shares a file with stdout, that are errors or the launcher's."""
        said = ("error: ", "policysplit: ")
        return [line for line in self.text().splitlines() if line.startswith(said)]

    def environ(self) -> dict[str, str]:
        """Of its processes, one thread a rank."""
        environ = dict(os.environ)
        for name in os.environ:
            if name.startswith(("SLURM_", "WANDB_")) or name in OF_A_RANK:
                del environ[name]
        own = {MARKER: self.marker, GATE: str(self.gate)}
        return environ | own | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def processes(self) -> list:
        """psutil processes of this run that still live, launcher included."""
        import psutil

        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def kill(self) -> None:
        for process in self.processes():
            process.send_signal(signal.SIGKILL)

    def assert_nothing_left(self) -> None:
        """No process of the run may be left a few seconds later."""
        deadline = time.monotonic() + 10
        while left := self.processes():
            if time.monotonic() > deadline:
                named = [f"{process.pid} {process.as_dict(['cmdline', 'status'])}" for process in left]
                self.kill()
                raise AssertionError(f"left behind: {named}\n{self.text()}")
            time.sleep(0.1)

    def _is_ours(self, process) -> bool:
        import psutil

        try:
            alive = process.status() != psutil.STATUS_ZOMBIE
            return alive and process.environ().get(MARKER) == self.marker
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return False


@dataclass
class Running(Run):
    """A started `policysplit train`."""

    process: subprocess.Popen

    def hold(self, answer: str) -> None:
        """Make the next reward of a question with this answer wait, and wait until one does."""
        (self.gate / f"hold-{answer}").touch()
        self.wait_for((self.gate / f"reached-{answer}").exists)

    def release(self) -> None:
        for path in self.gate.glob("hold-*"):
            path.unlink()

    def wait_for(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"the run ended with {self.process.returncode}:\n{self.text()}"
            assert time.monotonic() < deadline, f"not reached in {seconds} s:\n{self.text()}"
            time.sleep(0.005)

    def wait_for_step(self, step: int) -> None:
        """Until the training step has been logged."""
        self.wait_for(lambda: any(r["step"] >= step and r["kind"] == "train" for r in metrics(self.directory)))

    def finish(self, seconds: float = 150) -> int:
        """The exit code; no process of the run may be left a few seconds later."""
        try:
            code = self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the run did not end in {seconds} s:\n{self.text()}") from None
        self.assert_nothing_left()
        return code

    def rank(self, number: int):
        """The psutil process of a rank."""
        found = []

        def started() -> bool:
            found[:] = [p for p in self.processes() if p.environ().get("RANK") == str(number) and _is_worker(p)]
            return len(found) == 1

        self.wait_for(started)
        return found[0]

    def kill(self) -> None:
        super().kill()
        self.process.wait()


def _is_worker(process) -> bool:
    return "megatron_policysplit.training.worker" in process.cmdline()


def _new(directory: Path) -> Run:
    """Nothing of it runs yet."""
    marker = uuid.uuid4().hex
    run = Run(directory, marker, directory.parent / f"gate-{marker}")
    run.gate.mkdir(parents=True)
    return run


def start(config: Path, directory: Path, *overrides: str) -> Running:
    """Start `policysplit train config run.dir=directory ...`."""
    run = _new(directory)
    command = [sys.executable, "-m", "megatron_policysplit.cli", "train", str(config), f"run.dir={directory}"]
    with run.output.open("w") as file:
        process = subprocess.Popen(
            [*command, *overrides],
            env=run.environ(),
            stdout=file,
            stderr=file,
            cwd=run.gate,
            start_new_session=True,
        )
    return Running(run.directory, run.marker, run.gate, process)


def train_by_command(config: Path, directory: Path, *overrides: str, code: int = 0) -> Running:
    """Run `policysplit train` to the end and assert the exit code."""
    running = start(config, directory, *overrides)
    ended = running.finish()
    assert ended == code, f"exit code {ended} instead of {code}:\n{running.text()}"
    return running


def train(config: Path, directory: Path, *overrides: str, code: int = 0) -> Run:
    """Run to the end and assert every rank's exit code.

    What the command does, without a process of its own, without the launcher and without a trial of
    the reward: `run_distributed` starts the ranks, in a fraction of a second.
    """
    from megatron_policysplit.config.load import load_config, world_size
    from megatron_policysplit.training.preflight import preflight
    from megatron_policysplit.training.run_dir import prepare_run_dir
    from tests.support.dist import run_distributed

    run, argv = _new(directory), [str(config), f"run.dir={directory}", *overrides]
    loaded = load_config(argv[0], argv[1:])
    preflight(loaded, tries_reward=False)
    prepare_run_dir(loaded)
    ranks = world_size(loaded)
    with run.output.open("wb") as file:
        try:
            codes = run_distributed(
                _train_rank,
                ranks,
                run.gate,
                argv,
                timeout_seconds=150,
                environ=run.environ(),
                output=file,
            )
        except RuntimeError as error:
            error.add_note(run.text())
            raise
    run.assert_nothing_left()
    assert codes == [code] * ranks, f"exit codes {codes} instead of {code}:\n{run.text()}"
    return run


def _train_rank(rank: int, directory: Path, argv: list[str]) -> int:
    from megatron_policysplit.training import worker

    os.chdir(directory)
    return worker.main(argv)


def at_step(source: Path, target: Path, step: int) -> Path:
    """A copy of a run as it was when its checkpoint of `step` was the newest."""
    shutil.copytree(source, target)
    shutil.rmtree(target / "hf")
    for path in (target / "checkpoints").glob("step_*"):
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    return target


def metrics(directory: Path, kind: str | None = None) -> list[dict]:
    """Complete lines of metrics.jsonl, of one kind or all."""
    path = directory / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in records if kind in (None, record["kind"])]


def untimed(records: list[dict]) -> list[dict]:
    """Without what no two runs share: seconds, tokens per second, memory; nor when the gate compared."""
    return [{name: value for name, value in r.items() if not name.startswith((*TIMED, GATE_METRICS))} for r in records]


def checkpoints(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "checkpoints").iterdir())


def weights(directory: Path) -> bytes:
    """The exported weights, byte for byte."""
    return (directory / "hf" / "model.safetensors").read_bytes()


def assert_same_run(directory: Path, reference: Path) -> None:
    """Weights, metrics and rollouts are the same, bit for bit."""
    assert untimed(metrics(directory)) == untimed(metrics(reference))
    names = sorted(path.name for path in (reference / "rollouts").iterdir())
    assert names == sorted(path.name for path in (directory / "rollouts").iterdir())
    for name in names:
        assert (directory / "rollouts" / name).read_bytes() == (reference / "rollouts" / name).read_bytes(), name
    assert weights(directory) == weights(reference)


def picky_reward(response: str, question) -> float:
    """Raises for question 3."""
    if question.id == 3:
        raise ValueError("question 3 is not mine")
    return 1.0
