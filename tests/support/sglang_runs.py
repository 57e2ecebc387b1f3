"""Whole runs with real SGLang servers, and what must hold of them whatever was done to their processes."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.support import e2e
from tests.support.sglang import interpreter, make_model

STEPS = 8
START_SECONDS = 500.0
QUESTIONS, SAMPLES = 4, 8  # of a batch and of a question, half of them in each mode
TRANSPORTS = ("tensor", "disk", "distributed")
SETTINGS = """
model: {path: MODEL, dtype: float32}
parallel: {tensor: 2}
data: {path: DIRECTORY/train.jsonl, batch_questions: 4, max_prompt_tokens: 16}
modes: {high_entropy_prompt: explore widely}
rollout:
  engine: sglang
  samples_per_question: 8
  max_response_tokens: 96
  request_seconds: 60
  server:
    python: PYTHON
    count: 2
    start_seconds: 450
    arguments: {max-total-tokens: 8192, max-running-requests: 32, decode-log-interval: 1}
    environment: {OMP_NUM_THREADS: 1}
weight_sync: {bucket_mib: 1, timeout_seconds: 30}
agreement: {every: 1, breaches: 1}
reward: {function: "tests.support.e2e:reward", workers: 1, timeout_seconds: 600}
algorithm: {options: {policy_split: {eta: 0.3}}}
train: {steps: STEPS, learning_rate: 1.0e-3, warmup_steps: 4, max_tokens_per_micro_batch: 2048}
checkpoint: {every: 1, keep: 20, hugging_face: false}
"""


def make_workspace(directory: Path) -> Path:
    """The model, the questions and `run.yaml` of a run of STEPS steps with two servers of its own."""
    settings = SETTINGS.replace("PYTHON", str(interpreter())).replace("STEPS", str(STEPS))
    config = e2e.make_workspace(directory, settings)
    shutil.rmtree(directory / "model")
    make_model(directory / "model")
    return config


@dataclass
class Tree:
    """All processes below one, by id and start time: SGLang's overwrite the environment that would mark them."""

    processes: list

    @classmethod
    def below(cls, pid: int) -> Tree:
        import psutil

        parent = psutil.Process(pid)
        return cls([parent, *parent.children(recursive=True)])

    def named(self, name: str) -> list:
        """Those with this text in their command line."""
        import psutil

        found = []
        for process in self.processes:
            try:
                if name in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def without(self, name: str) -> Tree:
        """All but those with this text in their command line."""
        left_out = self.named(name)
        return Tree([process for process in self.processes if process not in left_out])

    def assert_ended(self, seconds: float = 30.0) -> None:
        import psutil

        _, alive = psutil.wait_procs(self.processes, timeout=seconds)
        left = [process for process in alive if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
        said = [f"{process.pid} {' '.join(process.cmdline())[:200]}" for process in left]
        for process in left:
            process.kill()
        assert not left, f"left behind: {said}"


def processes_of(running: e2e.Running, server: int) -> list:
    """Of one server of the run: the one that was started, and its children."""
    port = re.findall(r"--port (\d+)", log_of(running, server))[-1]
    found = Tree.below(running.process.pid).named("sglang.launch_server")
    (first,) = [process for process in found if f"--port {port} " in " ".join(process.cmdline())]
    return [first, *first.children(recursive=True)]


def log_of(running: e2e.Running, server: int) -> str:
    path = running.directory / "logs" / f"sglang_{server}.log"
    return path.read_text(errors="replace") if path.exists() else ""


def wait_for_step(running: e2e.Running, step: int) -> None:
    """Until the step has been logged; the servers take their time to start."""
    running.wait_for(lambda: step_of(running) >= step, START_SECONDS)


def wait_until_generating(running: e2e.Running, server: int) -> None:
    """Until the server decodes again, counted from now."""
    before = log_of(running, server).count("Decode batch")
    running.wait_for(lambda: log_of(running, server).count("Decode batch") > before + 2)


def wait_for_line(running: e2e.Running, text: str, seconds: float = 300) -> None:
    """Until the run has said this once more than by now."""
    before = running.text().count(text)
    running.wait_for(lambda: running.text().count(text) > before, seconds)


def first_line(running: e2e.Running, beginning: str) -> str:
    """Of those of stderr that are errors or the launcher's."""
    return next(line for line in running.errors if line.startswith(beginning))


def step_of(running: e2e.Running) -> int:
    return max((record["step"] for record in e2e.metrics(running.directory, "train")), default=0)


def records(directory: Path, step: int) -> list[dict]:
    with (directory / "rollouts" / f"step_{step:06d}.jsonl").open() as file:
        return [json.loads(line) for line in file]


def assert_whole(directory: Path, steps: int = STEPS) -> None:
    """Every batch has each sample of four questions in both modes once, all by the weights of that batch.

    Log-probs are the actor's own to rounding: the run compares them at every step and would have ended.
    """
    for step in range(1, steps + 1):
        found = records(directory, step)
        questions = sorted({record["question"] for record in found})
        assert len(questions) == QUESTIONS, step
        wanted = [
            (question, mode, sample)
            for question in questions
            for mode in ("high_entropy", "normal")
            for sample in range(SAMPLES // 2)
        ]
        assert sorted((r["question"], r["mode"], r["sample"]) for r in found) == wanted, step
        assert {tuple(map(tuple, r["weight_versions"])) for r in found} == {((0, step - 1),)}, step
        differences = [r["agreement/difference"] for r in e2e.metrics(directory, "train") if r["step"] == step]
        assert len(differences) == 1 and differences[0] < 1e-4, (step, differences)


def eventually(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} not within {seconds} s"
        time.sleep(0.05)
