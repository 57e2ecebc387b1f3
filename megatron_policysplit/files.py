"""Writing files so that they are complete or as they were, and saying why one cannot be written."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_policysplit.errors import WriteError

_FULL = {errno.ENOSPC: "free some space", errno.EDQUOT: "free some of your quota"}
# What a disk answers when it takes no more, whoever asks; other errors are about one file.
DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE})
PROBE_BYTES = 1 << 20


def write_error(path: str | Path, error: OSError) -> WriteError:
    """The sentence that says which file cannot be written, why, and what to do."""
    remedy = _FULL.get(error.errno or 0, "see to that disk")
    return WriteError(
        f"{path} cannot be written: {error.strerror or error}; {remedy}, or write to another disk, "
        "and run the same command again"
    )


@contextmanager
def naming_writes(path: str | Path) -> Iterator[None]:
    """Raise an OSError of the block as a WriteError that names `path`."""
    try:
        yield
    except OSError as error:
        raise write_error(path, error) from error


def replace_text(path: Path, text: str | Iterable[str], mode: int | None = None) -> None:
    """Replace a text file, so that readers see the old or the new one as a whole.

    The new one is written beside `path`, flushed to disk and renamed into place. Where `path` is a
    link, the file that it points to is replaced; what is no file (/dev/stdout, a pipe) is written
    to. A lone surrogate is written as its escape. Raises WriteError, and leaves nothing then.

    text: the new content, whole or in parts. mode: the file's permissions; None keeps those of the
    old file.
    """
    parts = [text] if isinstance(text, str) else text
    with naming_writes(path):
        target = path.resolve()
        if target.exists() and not stat.S_ISREG(target.stat().st_mode):
            with target.open("w", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(parts)
            return
        beside = target.with_name(f"{target.name}.partial")
        try:
            with beside.open("w", encoding="utf-8", errors="backslashreplace") as file:
                if mode is None and target.exists():
                    mode = stat.S_IMODE(target.stat().st_mode)
                if mode is not None:  # before there is anything to read
                    os.fchmod(file.fileno(), mode)
                file.writelines(parts)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, target)
        except BaseException:
            # The disk that refused the content may refuse this, too; the first error says why.
            with suppress(OSError):
                beside.unlink(missing_ok=True)
            raise


def disk_error(error: BaseException, directory: Path) -> OSError | None:
    """The disk's own error behind an exception of a library that wrote into `directory`.

    torch reports a full disk in words of its own ("unexpected pos", "iostream error"), or as an
    exception of another rank. So the disk is asked: does it take a file of PROBE_BYTES? None if
    it does, and no OSError of the disk is among the exception's causes.
    """
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.errno in DISK_ERRORS:
            return cause
    while not directory.is_dir():
        directory = directory.parent
    try:
        with tempfile.TemporaryFile(dir=directory) as probe:
            probe.write(bytes(PROBE_BYTES))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as refusal:
        return refusal
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An exception, what it came from, and those that torch's CheckpointException holds."""
    seen: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        cause = waiting.pop()
        if cause is None or cause in seen:
            continue
        seen.append(cause)
        yield cause
        waiting += [cause.__cause__, cause.__context__]
        failures = getattr(cause, "failures", None)  # rank -> (exception, its traceback)
        if isinstance(failures, dict):
            waiting += [failure[0] for failure in failures.values()]
