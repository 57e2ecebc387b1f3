"""Runs a study: several processes at once, each a run or a run's preparation.

What is finished is never run again; what was interrupted goes on.
"""

from __future__ import annotations

import ctypes
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

from megatron_policysplit.distributed.directory_lock import DirectoryLock
from megatron_policysplit.distributed.rank_variables import without_launcher
from megatron_policysplit.errors import DONE, FAILED, STOPPED, ConfigError
from megatron_policysplit.files import replace_text
from megatron_policysplit.study.config import Study, StudyRun, fill

STATE_FILE = "study_state.json"
TRAINER = (sys.executable, "-m", "megatron_policysplit.cli", "train")
_PR_SET_PDEATHSIG = 1
_TAIL_BYTES = 64 * 1024  # of a log, in which a process's last error is looked for


class State:
    """Which runs have ended and how, kept in `study_state.json`.

    The file is replaced as a whole after every run, so a study that was killed knows where it was.
    A run is finished if it ended with exit code 0 under the same configuration and overrides.
    """

    def __init__(self, study: Study):
        self.study, self.path = study, Path(study.dir) / STATE_FILE
        self.runs: dict[str, dict[str, Any]] = {}
        self.prepared: list[list[str]] = []
        if self.path.exists():
            try:
                content = json.loads(self.path.read_text(encoding="utf-8"))
                self.runs, self.prepared = dict(content["runs"]), list(content["prepared"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"{self.path} is damaged; delete it: finished runs are then only looked at, "
                    "not trained, again"
                ) from error

    def finished(self, run: StudyRun) -> bool:
        """Whether there is nothing left to do for this run."""
        end = self.runs.get(run.name)
        return end is not None and end["code"] == DONE and end["settings"] == self._digest(run)

    def error(self, run: StudyRun) -> str | None:
        """Why the run failed when it was last started; None if it did not."""
        return self.runs.get(run.name, {}).get("error")

    def ended(self, run: StudyRun, code: int, error: str | None) -> None:
        """Record that a run ended, with its exit code and, if it failed, why."""
        self.runs[run.name] = {"code": code, "settings": self._digest(run), "error": error}
        self._write()

    def forget(self, run: StudyRun) -> None:
        """Drop what became of a run before, because it starts again."""
        if self.runs.pop(run.name, None) is not None:
            self._write()

    def has_prepared(self, command: list[str]) -> None:
        """Record that a preparation succeeded."""
        self.prepared.append(command)
        self._write()

    def _digest(self, run: StudyRun) -> str:
        """A hash of the configuration file and the overrides of a run."""
        config = Path(self.study.config).read_text(encoding="utf-8")
        text = json.dumps([config, self.study.settings(run)])
        return hashlib.sha256(text.encode()).hexdigest()

    def _write(self) -> None:
        content = {"runs": self.runs, "prepared": self.prepared}
        replace_text(self.path, json.dumps(content, indent=2) + "\n")


@dataclass
class _Job:
    """A process at work: a run, or the preparation that it and others wait for."""

    name: str  # in messages
    run: StudyRun
    log: Path
    written: int  # bytes of the log that earlier starts wrote
    slot: int  # its place among those at work, from 0
    process: subprocess.Popen
    began: float  # by time.monotonic
    preparation: list[str] | None  # the command, if it is one


def run_study(
    study: Study, *, trainer: Sequence[str] = TRAINER, say: Callable[[str], None] = print
) -> int:
    """Run what is not finished; return DONE, FAILED if a run failed, STOPPED if one was stopped.

    SIGTERM or SIGINT is passed to the processes once; they save and end, and the same study goes on
    later. If this process is killed, they get SIGTERM from the kernel. The next call tries a run
    that failed again. Must be called in the main thread. Raises ConfigError where the directory
    cannot be written, or where another process runs the study.

    trainer: the command that trains, before CONFIG and overrides. say: takes each message.
    """
    directory = Path(study.dir)
    lock = DirectoryLock(directory / "study.lock", f"dir={directory}", "give another dir")
    with lock.held():
        return _Runner(study, State(study), trainer, say).run()


class _Runner:
    """One call of `run_study`: the loop that starts, watches and ends processes."""

    def __init__(
        self, study: Study, state: State, trainer: Sequence[str], say: Callable[[str], None]
    ):
        self.study, self.state, self.trainer, self.say = study, state, trainer, say
        self.waiting = [run for run in study.runs if not state.finished(run)]
        self.jobs: list[_Job] = []
        self.unprepared: dict[str, str] = {}  # preparation that failed -> its error
        self.signal: int | None = None  # the first one that arrived
        self.signal_is_passed = False
        self.failed = False
        self.variables = self._thread_variables()

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
                self._start_jobs()
                self._pass_signal()
                time.sleep(0.05)
                for job in [job for job in self.jobs if job.process.poll() is not None]:
                    self.jobs.remove(job)
                    self._end(job)
        finally:
            for job in self.jobs:  # there are some only where this process itself fails
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

    def _start_jobs(self) -> None:
        """Start the runs and preparations that there is room for."""
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
                # Every preparation gets a log of its own, those of earlier calls included.
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
        environment = {
            name: fill(value, self.study.dir, run, slot)
            for name, value in self.study.environment.items()
        }
        with log.open("ab") as output:
            written = output.tell()
            process = subprocess.Popen(
                list(command),
                # A run starts its own ranks, whatever launcher's variables the study was left with.
                env={**without_launcher(os.environ), **self.variables, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C reaches it through us alone
                # prctl is looked up before the fork, because the child must not load a library.
                preexec_fn=partial(_end_with_parent, os.getpid(), ctypes.CDLL(None).prctl),
            )
        self.jobs.append(
            _Job(name, run, log, written, slot, process, time.monotonic(), preparation)
        )
        self.say(f"{time.strftime('%H:%M:%S')} {name}: started, output in {log}")

    def _pass_signal(self) -> None:
        """Pass a signal on as SIGTERM, once."""
        if self.signal is None or self.signal_is_passed:
            return
        self.signal_is_passed = True
        self.say(
            f"{signal.Signals(self.signal).name}: waiting for {len(self.jobs)} processes to save "
            "and end"
        )
        for job in self.jobs:
            if job.process.poll() is not None:
                continue
            # A run passes it to its ranks itself; a preparation is any command, with any children.
            if job.preparation is None:
                job.process.send_signal(signal.SIGTERM)
            else:
                os.killpg(job.process.pid, signal.SIGTERM)

    def _end(self, job: _Job) -> None:
        """Record and report how a process ended."""
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
        """Record and report that a run failed."""
        self.failed = True
        self.state.ended(run, code, error)
        self.say(f"{time.strftime('%H:%M:%S')} {run.name}: failed: {error}")

    def _thread_variables(self) -> dict[str, str]:
        """OMP_NUM_THREADS for every process: the cores shared out among all ranks at work.

        Empty for one run at a time, which `policysplit train` shares out itself, and where the
        variable is set.
        """
        if self.study.at_once == 1 or "OMP_NUM_THREADS" in os.environ or not self.waiting:
            return {}
        from megatron_policysplit.config.load import load_config, world_size

        ranks = world_size(load_config(self.study.config, self.study.settings(self.waiting[0])))
        cores = len(os.sched_getaffinity(0))
        return {"OMP_NUM_THREADS": str(max(1, cores // (self.study.at_once * ranks)))}


def last_error(log: Path, start: int, code: int) -> str:
    """Why a process ended: its last line that starts with `error: `, else its last, and how.

    log: the file it wrote to. start: bytes of the file that are older. code: its return code,
    negative for a signal.
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
    reason = (errors or lines or ["it wrote nothing"])[-1].removeprefix("error: ")
    return f"{reason} ({how}; {log})"


def _end_with_parent(parent: int, prctl) -> None:
    """In a new process: ask the kernel for SIGTERM as soon as the study ends, however it ends."""
    prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # the study ended before the request
        os._exit(FAILED)
