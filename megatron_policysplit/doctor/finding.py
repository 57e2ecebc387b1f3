"""What a check of the machine says."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

OK, WARN, FAIL = "OK", "WARN", "FAIL"


@dataclass(frozen=True)
class Finding:
    """One line of `policysplit doctor`."""

    name: str  # what was looked at
    status: str  # OK, WARN: a run may start and go wrong or slowly, FAIL: none will start
    value: str  # what is there
    remedy: str = ""  # what to do about it; empty where nothing is to be done

    def __str__(self) -> str:
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{self.status:<4}  {self.name:<20}  {self.value}{remedy}"

    def record(self) -> dict[str, str]:
        """The fields, for JSON."""
        return asdict(self)


def guarded(name: str, check: Callable[[], Sequence[Finding]]) -> list[Finding]:
    """The findings of a check; a WARN that says so if the check itself fails."""
    try:
        return list(check())
    except Exception as error:  # whatever an odd machine makes of it: the other checks go on
        said = " ".join(str(error).split()) or type(error).__name__
        return [Finding(name, WARN, f"cannot be checked ({type(error).__name__}: {said[:200]})")]


def output_of(
    command: Sequence[str], seconds: float, environ: Mapping[str, str] | None = None
) -> str:
    """What a program prints. Raises RuntimeError if it fails, OSError if there is none.

    A program that takes longer is killed, and TimeoutError raised.
    """
    try:
        done = subprocess.run(
            list(command),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            env=None if environ is None else dict(environ),
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"{command[0]} did not answer within {seconds:g} s") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {said[-1]}")
    return done.stdout


def gib(nbytes: float) -> str:
    """A number of bytes as people read it."""
    return f"{nbytes / 2**30:.1f} GiB"
