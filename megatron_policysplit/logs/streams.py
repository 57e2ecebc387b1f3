"""Standard output and standard error that may go away while a command runs.

A pipe whose reader has ended (`| head`, a lost `tee`), a full disk behind `> file`, a terminal that
was closed: each write then fails, and so does Python's own flush at the end of the process.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

from megatron_policysplit.errors import WriteError

PIPE_CLOSED = 141  # 128 + SIGPIPE, as shells report a program whose reader has ended


class GuardedStream:
    """A text stream that calls `lost` once, with the error, when it cannot be written any more.

    From then on what is written goes nowhere. In all else it is the stream that it stands for.
    """

    def __init__(self, stream: TextIO, lost: Callable[[OSError], None]):
        self._stream, self._lost = stream, lost

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def writelines(self, lines) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except OSError as error:
            _discard(self._stream)
            self._lost(error)


def _discard(stream: TextIO) -> None:
    """Send what a stream still holds, and all that follows, to /dev/null."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, stream.fileno())
    finally:
        os.close(nowhere)


class LostOutput:
    """What a training knows of its console: None, or why it is gone. One a process."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._told = False

    def lost(self, error: OSError) -> None:
        """Note the first loss, and say it on standard error if that is still there."""
        if self.reason is None:
            self.reason = error.strerror or str(error)
            print(
                f"policysplit: the console is gone ({self.reason}); the training goes on without "
                "it, see messages.log and metrics.jsonl in run.dir",
                file=sys.stderr,
                flush=True,
            )

    def news(self) -> str | None:
        """A sentence for the log, once after the console was lost; else None."""
        if self.reason is None or self._told:
            return None
        self._told = True
        return f"the console is gone ({self.reason}); the training goes on without it"


CONSOLE = LostOutput()


def outlive_console() -> None:
    """Let this process go on where its standard output or standard error goes away."""
    for name in ("stdout", "stderr"):
        _guard(name, CONSOLE.lost)


def end_with_console() -> None:
    """End this process where its standard output goes away, with the usual exit code.

    PIPE_CLOSED, without a word, where a reader has ended; else WriteError. What is said on standard
    error after that has gone away is lost.
    """
    _guard("stdout", _end)
    _guard("stderr", lambda error: None)


def _end(error: OSError) -> None:
    if error.errno == errno.EPIPE:
        sys.exit(PIPE_CLOSED)
    raise WriteError(
        f"standard output cannot be written: {error.strerror or error}; send it elsewhere"
    ) from error


def _guard(name: str, lost: Callable[[OSError], None]) -> None:
    stream = getattr(sys, name)
    if isinstance(stream, GuardedStream):
        stream._lost = lost
    elif stream is not None and _has_file(stream):
        setattr(sys, name, GuardedStream(stream, lost))


def _has_file(stream: TextIO) -> bool:
    """Whether a stream writes to a file of the system, and not to a test's memory."""
    try:
        stream.fileno()
    except (OSError, ValueError, AttributeError):
        return False
    return True
