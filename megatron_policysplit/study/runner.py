"""Runs a study: as many processes at once as asked, what is finished never again, what was
interrupted goes on.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_policysplit.errors import DONE, FAILED, STOPPED, ConfigError
from megatron_policysplit.study.config import Study, StudyRun, fill

STATE_FILE = "study_state.json"
TRAINER = (sys.executable, "-m", "megatron_policysplit.cli", "train")
_PR_SET_PDEATHSIG = 1
_TAIL_BYTES = 64 * 1024


class State:
    """What has ended, in `study_state.json`: replaced whole after every run, so a killed study
    knows where it was.

    A run is finished if it ended with exit code 0 under the very same configuration and overrides.
    """

    def __init__(self, study: Study):
        self.study, self.path = study, Path(study.dir) / STATE_FILE
        self.runs: dict[str, dict[str, Any]] = {}
        self.prepared: list[list[str]] = []
        if self.path.exists():
            try:
                content = json.loads(self.path.read_text(encoding="utf-8"))
                self.runs, self.prepared = content["runs"], content["prepared"]
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"{self.path} is damaged; delete it: finished runs are then only looked at, "
                    "not trained, again"
                ) from error

    def finished(self, run: StudyRun) -> bool:
        """Whether there is nothing left to do for this run."""
        found = self.runs.get(run.name)
        return (
            found is not None and found["code"] == DONE and found["settings"] == self._digest(run)
        )

    def error(self, run: StudyRun) -> str | None:
        """Why the run failed when it was last started; None if it did not."""
        return self.runs.get(run.name, {}).get("error")

    def ended(self, run: StudyRun, code: int, error: str | None) -> None:
        self.runs[run.name] = {"code": code, "settings": self._digest(run), "error": error}
        self._write()

    def forget(self, run: StudyRun) -> None:
        """It starts again: what became of it before no longer counts."""
        if self.runs.pop(run.name, None) is not None:
            self._write()

    def has_prepared(self, command: list[str]) -> None:
        self.prepared.append(command)
        self._write()

    def _digest(self, run: StudyRun) -> str:
        text = json.dumps(
            [Path(self.study.config).read_text(encoding="utf-8"), self.study.settings(run)]
        )
        return hashlib.sha256(text.encode()).hexdigest()

    def _write(self) -> None:
        beside = self.path.with_name(self.path.name + ".partial")
        with beside.open("w", encoding="utf-8") as file:
            file.write(json.dumps({"runs": self.runs, "prepared": self.prepared}, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, self.path)


@dataclass
class _Job:
    """A process under way: a run, or the preparation that it and others wait for."""

    name: str
    run: StudyRun
    log: Path
    written: int
    slot: int
    process: subprocess.Popen
    began: float
    preparation: list[str] | None


def run_study(
    study: Study, *, trainer: Sequence[str] = TRAINER, say: Callable[[str], None] = print
) -> int:
    """Runs what is not finished. Returns DONE; FAILED if a run failed; STOPPED if a signal left
    runs unfinished.

    SIGTERM or SIGINT is passed to the processes once; they save and end, and the same study goes on
    later. If this process is killed, they get SIGTERM from the kernel. A run that failed is tried
    again by the next call. Must be called in the main thread. Raises ConfigError where the
    directory cannot be written, or where another process runs the study.
    """
    directory = Path(study.dir)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / "study.lock").open("w")
    except OSError as error:
        raise ConfigError(
            f"dir={directory} cannot be written ({error.strerror}); give another dir"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"dir={directory} is in use by another study; wait for it, or give another dir"
            ) from error
        return _Runner(study, State(study), trainer, say).run()


class _Runner:
    def __init__(
        self, study: Study, state: State, trainer: Sequence[str], say: Callable[[str], None]
    ):
        self.study, self.state, self.trainer, self.say = study, state, trainer, say
        self.waiting = [run for run in study.runs if not state.finished(run)]
        self.jobs: list[_Job] = []
        self.unprepared: dict[str, str] = {}  # preparation that failed -> its error
        self.signal: int | None = None
        self.told = False
        self.failed = False
        self.variables = self._variables()

    def run(self) -> int:
        total, left = len(self.study.runs), len(self.waiting)
        self.say(
            f"study of {total} runs in {self.study.dir}: {total - left} finished, {left} to run"
        )
        before = {
            number: signal.signal(number, self._remember)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            while self.jobs or (self.waiting and not self._stopping()):
                self._start_what_can()
                self._pass_the_signal_on()
                time.sleep(0.05)
                for job in [job for job in self.jobs if job.process.poll() is not None]:
                    self.jobs.remove(job)
                    self._end(job)
        finally:
            for job in self.jobs:  # only where this process itself fails
                os.killpg(job.process.pid, signal.SIGKILL)
                job.process.wait()
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.failed:
            return FAILED
        return DONE if all(map(self.state.finished, self.study.runs)) else STOPPED

    def _remember(self, number: int, frame) -> None:
        self.signal = self.signal or number

    def _stopping(self) -> bool:
        return self.signal is not None or (self.failed and self.study.stop_on_failure)

    def _start_what_can(self) -> None:
        for run in list(self.waiting):
            free = set(range(self.study.at_once)) - {job.slot for job in self.jobs}
            if self._stopping() or not free:
                return
            command = self.study.preparation(run)
            if command is None or command in self.state.prepared:
                self.waiting.remove(run)
                self.state.forget(run)
                argv = [*self.trainer, self.study.config, *self.study.settings(run)]
                self._start(argv, run, min(free), run.name, run.log)
            elif str(command) in self.unprepared:
                self.waiting.remove(run)
                self._fail(run, FAILED, f"its preparation failed: {self.unprepared[str(command)]}")
            elif command not in [job.preparation for job in self.jobs]:
                number = len(list(Path(self.study.dir).glob("prepare_*.log")))
                log = Path(self.study.dir) / f"prepare_{number}.log"
                self._start(command, run, min(free), f"preparation of {run.name}", log, command)

    def _start(
        self,
        command: Sequence[str],
        run: StudyRun,
        slot: int,
        name: str,
        log: Path,
        preparation: list[str] | None = None,
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        given = {
            name: fill(value, self.study.dir, run, slot)
            for name, value in self.study.environment.items()
        }
        with log.open("ab") as output:
            written = output.tell()
            process = subprocess.Popen(
                list(command),
                env={**os.environ, **self.variables, **given},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C reaches it through us alone
                preexec_fn=partial(_ask_to_end_with, os.getpid(), ctypes.CDLL(None).prctl),
            )
        self.jobs.append(
            _Job(name, run, log, written, slot, process, time.monotonic(), preparation)
        )
        self.say(f"{time.strftime('%H:%M:%S')} {name}: started, output in {log}")

    def _pass_the_signal_on(self) -> None:
        if self.signal is None or self.told:
            return
        self.told = True
        self.say(
            f"{signal.Signals(self.signal).name}: waiting for {len(self.jobs)} processes to save "
            "and end"
        )
        for job in self.jobs:
            if job.process.poll() is not None:
                continue
            if job.preparation is None:
                job.process.send_signal(signal.SIGTERM)
            else:
                os.killpg(job.process.pid, signal.SIGTERM)

    def _end(self, job: _Job) -> None:
        code, seconds = job.process.returncode, time.monotonic() - job.began
        if code == DONE:
            self.say(
                f"{time.strftime('%H:%M:%S')} {job.name}: done in {seconds:.0f} s "
                f"({len(self.waiting)} wait)"
            )
            if job.preparation is None:
                self.state.ended(job.run, code, None)
            else:
                self.state.has_prepared(job.preparation)
        elif code == STOPPED or (self.signal is not None and code == -signal.SIGTERM):
            self.say(
                f"{time.strftime('%H:%M:%S')} {job.name}: stopped; it goes on with the next start "
                "of the study"
            )
        else:
            error = last_error(job.log, job.written, code)
            if job.preparation is None:
                self._fail(job.run, code, error)
            else:
                self.unprepared[str(job.preparation)] = error
                self.failed = True
                self.say(f"{time.strftime('%H:%M:%S')} {job.name}: failed: {error}")

    def _fail(self, run: StudyRun, code: int, error: str) -> None:
        self.failed = True
        self.state.ended(run, code, error)
        self.say(f"{time.strftime('%H:%M:%S')} {run.name}: failed: {error}")

    def _variables(self) -> dict[str, str]:
        """The cores shared out among runs at once; `policysplit train` shares its part among its
        ranks.
        """
        if self.study.at_once == 1 or "OMP_NUM_THREADS" in os.environ or not self.waiting:
            return {}
        from megatron_policysplit.config.load import load_config, world_size

        ranks = world_size(load_config(self.study.config, self.study.settings(self.waiting[0])))
        cores = len(os.sched_getaffinity(0))
        return {"OMP_NUM_THREADS": str(max(1, cores // (self.study.at_once * ranks)))}


def last_error(log: Path, start: int, code: int) -> str:
    """Why a process ended: its last line that starts with `error: `, else its last line, and how it
    ended.
    """
    with log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - _TAIL_BYTES))
        lines = [
            line.strip()
            for line in file.read().decode("utf-8", errors="replace").splitlines()
            if line.strip()
        ]
    errors = [line for line in lines if line.startswith("error: ")]
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    said = (errors or lines or ["it wrote nothing"])[-1].removeprefix("error: ")
    return f"{said} ({how}; {log})"


def _ask_to_end_with(parent: int, prctl) -> None:
    """In a new process: SIGTERM as soon as the study ends, however it ends."""
    prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(FAILED)
