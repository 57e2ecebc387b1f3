"""Runs checks one after the other, each in a process of its own with a time limit.

Imports no torch: a check that hangs, crashes or cannot import costs itself alone.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PASS, FAIL, SKIP = "PASS", "FAIL", "SKIP"


class Skip(Exception):
    """Raised by a check that means nothing on this machine; says why."""


@dataclass(frozen=True)
class Check:
    """A check, and where its function is.

    The function gets an `Options` and returns measured values; it raises Skip, or anything else for
    a failure.
    """

    name: str
    shows: str  # what passes if it passes
    function: str  # "module:function"
    seconds: float  # time limit
    needs_gpu: bool = False


@dataclass(frozen=True)
class Options:
    """What a check's function gets."""

    directory: str  # of its own, empty
    sglang_python: str | None = None  # interpreter of SGLang's environment


@dataclass(frozen=True)
class Result:
    """How a check ended."""

    name: str
    status: str
    reason: str  # why it failed or was skipped; empty if it passed
    seconds: float
    values: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        what = self.reason or ", ".join(f"{key} {value}" for key, value in self.values.items())
        return f"{self.status}  {self.name:<26} {self.seconds:6.1f} s  {what}".rstrip()


def run_check(check: Check, options: Options, environ: dict[str, str]) -> Result:
    """Run a check in a process of its own; everything that it started ends with it."""
    directory = Path(options.directory)
    directory.mkdir(parents=True)
    answer, log = directory / "answer.json", directory / "output.log"
    command = [sys.executable, "-m", "benchmarks.gpu_check.child", json.dumps(asdict(check))]
    command += [json.dumps(asdict(options)), str(answer)]
    start = time.monotonic()
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environ,
            start_new_session=True,
        )
        try:
            code = process.wait(check.seconds)
        except subprocess.TimeoutExpired:
            code = None
        _end_group(process)
    seconds = time.monotonic() - start
    if code is None:
        return _failed(check, f"took longer than {check.seconds:g} s", seconds, log)
    if not answer.exists():
        ended = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        return _failed(check, ended, seconds, log)
    said = json.loads(answer.read_text())
    return Result(check.name, said["status"], said["reason"], seconds, said["values"])


def _end_group(process: subprocess.Popen) -> None:
    """Kill what is left of the check: its process, if it runs, and what it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _failed(check: Check, why: str, seconds: float, log: Path) -> Result:
    lines = log.read_text(errors="replace").strip().splitlines()
    last = f": {lines[-1][:200]}" if lines else ""
    return Result(check.name, FAIL, f"{why}{last} ({log})", seconds)


def run_checks(
    checks: Sequence[Check],
    directory: Path,
    *,
    environ: dict[str, str],
    sglang_python: str | None = None,
    tell: Callable[[str], None] = print,
) -> list[Result]:
    """Run checks in their order, telling how each ended at once."""
    results = []
    for check in checks:
        options = Options(str(directory / check.name), sglang_python)
        results.append(run_check(check, options, environ))
        tell(str(results[-1]))
    return results


def summary(results: Sequence[Result]) -> str:
    """The last line: how many of each, and which failed."""
    counts = {status: sum(r.status == status for r in results) for status in (PASS, FAIL, SKIP)}
    text = f"{counts[PASS]} passed, {counts[FAIL]} failed, {counts[SKIP]} skipped"
    failed = [result.name for result in results if result.status == FAIL]
    return f"{text}: {', '.join(failed)} failed" if failed else text
