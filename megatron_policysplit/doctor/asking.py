"""How the machine is asked: in a child process or a thread, for so many seconds at most.

A broken driver, a dead file server or a name server that is gone may let a call wait for ever, and
an extension for another torch may end the process that imports it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from megatron_policysplit.doctor.record import Record, warn

T = TypeVar("T")
SCRIPTS = Path(__file__).with_name("scripts")


class ProbeFailed(Exception):
    """The machine did not answer; the text says why, as half a sentence."""


def within(seconds: float, call: Callable[[], T]) -> T:
    """Return the result of a call that runs in a thread of its own, or raise its error.

    Raises ProbeFailed after `seconds`; the thread is left behind and ends with the process.
    """
    outcome: list[tuple[bool, Any]] = []

    def run() -> None:
        try:
            outcome.append((True, call()))
        except BaseException as error:  # raised again below, in the caller's thread
            outcome.append((False, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise ProbeFailed(f"no answer within {seconds:g} s")
    succeeded, value = outcome[0]
    if not succeeded:
        raise value
    return value


def output_of(
    command: Sequence[str], seconds: float, environ: Mapping[str, str] | None = None
) -> str:
    """Return what a command prints to standard output.

    Raises ProbeFailed if it cannot be run, fails, or needs longer than `seconds`. A command that
    hangs in the kernel, which cannot be killed, is left behind.
    """
    try:
        process = subprocess.Popen(
            command,
            env=None if environ is None else dict(environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise ProbeFailed(f"{command[0]} cannot be run ({error.strerror})") from error
    try:
        stdout, stderr = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise ProbeFailed(f"{command[0]} gave no answer within {seconds:g} s") from None
    if process.returncode:
        last = ([line for line in stderr.splitlines() if line.strip()] or ["no message"])[-1]
        raise ProbeFailed(f"{command[0]} ended with code {process.returncode} ({last.strip()})")
    return stdout


def ask_script(
    name: str,
    arguments: Sequence[str],
    seconds: float,
    *,
    python: str = sys.executable,
    environ: Mapping[str, str] = os.environ,
) -> dict[str, Any]:
    """Return what a file of `scripts/` finds out, run by any interpreter of Python 3.9 or newer.

    Such a file prints one JSON object to standard output. Raises ProbeFailed as `output_of` does.
    """
    printed = output_of([python, str(SCRIPTS / f"{name}.py"), *arguments], seconds, environ)
    try:
        answer = json.loads(printed)
    except ValueError as error:
        raise ProbeFailed(f"{python} printed something else than an answer ({error})") from error
    return answer


def guarded(name: str, check: Callable[[], Sequence[Record]]) -> list[Record]:
    """The records of a check, or one WARN that says why it could not be made."""
    try:
        return list(check())
    except ProbeFailed as error:
        return [warn(name, f"could not be checked: {error}", "look at it by hand")]
    except Exception as error:  # whatever a machine has that nobody thought of
        said = " ".join(str(error).split()) or "no reason given"
        return [
            warn(
                name,
                f"could not be checked: {type(error).__name__}: {said}",
                "look at it by hand, and report this as a defect of policysplit doctor",
            )
        ]
