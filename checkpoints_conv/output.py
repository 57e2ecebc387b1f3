"""Directories that are complete or do not exist: written beside their place, synced, renamed."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from checkpoints_conv.errors import ModelError
from checkpoints_conv.ranks import Ranks

SUFFIX = ".partial"


def is_partial(path: Path) -> bool:
    """Whether `path` has the name of a directory whose writer has not finished, or was killed."""
    return path.absolute().name.endswith(SUFFIX)


def partial_path(path: Path) -> Path:
    """The directory beside `path` in which it is written."""
    return path.with_name(f".{path.name}{SUFFIX}")


def check_free(path: Path, nbytes: int) -> None:
    """Raise ModelError unless `path` is free and its disk has room for `nbytes`.

    Free is what does not exist, and an empty directory.
    """
    if is_partial(path):
        raise ModelError(
            f"--out {path} ends in {SUFFIX}, as what an interrupted write leaves; choose another "
            "name"
        )
    try:
        if path.is_symlink() or path.resolve() == Path.cwd():  # neither can be renamed to
            raise ModelError(
                f"--out {path} is a link or the current directory; name a new directory"
            )
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise ModelError(
                f"--out {path} exists and is not an empty directory; choose another path or remove "
                "it"
            )
        parent = path.absolute().parent
        while not parent.exists():
            parent = parent.parent
        disk = shutil.disk_usage(parent)
    except (OSError, RuntimeError) as error:  # RuntimeError: links that go round
        raise ModelError(
            f"--out {path} cannot be written ({error}); choose another path"
        ) from error
    if disk.total == 0:
        raise ModelError(
            f"--out {path} cannot be written: {parent} is no disk; choose another path"
        )
    if disk.free < nbytes:
        raise ModelError(
            f"no space left for --out {path}: {nbytes / 1e9:.2f} GB are needed, "
            f"{disk.free / 1e9:.2f} GB free"
        )


@contextmanager
def written_beside(path: Path, ranks: Ranks) -> Iterator[Path]:
    """A new directory for all ranks, which becomes `path` if the body ends without an error.

    If the body fails, the directory is removed. Collective over `ranks`: two all-gathers of an
    object. An OSError of the body or of the renaming is raised as a ModelError naming `path`; so is
    another process that is writing there.
    """
    partial = partial_path(path)
    lock = created = None

    def make() -> None:
        nonlocal lock, created
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _acquire_lock(path)
        shutil.rmtree(partial, ignore_errors=True)  # what a killed writer left
        partial.mkdir()
        created = partial.stat()

    def publish() -> None:
        # Where the file system has no locks, a second writer has replaced the directory by its own.
        if not partial.exists() or not os.path.samestat(created, partial.stat()):
            raise ModelError(
                f"--out {path} is being written by another process, too; nothing was kept"
            )
        _sync(partial)  # before the renaming, or a crash could leave the name without the content
        if path.exists():
            path.rmdir()
        partial.rename(path)
        _fsync(path.absolute().parent)

    try:
        ranks.first(make)
        yield partial
        ranks.first(publish)
    except BaseException as error:
        if lock is not None:  # only rank 0 has it, and only if the directory is its own
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise _model_error(error, path) from error
        raise
    finally:
        if lock is not None:
            _lock_path(path).unlink(missing_ok=True)
            lock.close()


def _lock_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _acquire_lock(path: Path) -> IO[str]:
    """Lock the file beside `path` by flock, which lasts until the process ends, however it ends.

    Raises ModelError if another process holds it: two writers would remove, mix and publish each
    other's files. Some cluster file systems have no locks; there a second writer is noticed when
    the first wants to publish.
    """
    while True:
        file = _lock_path(path).open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The last holder may have removed the file between its opening and its locking here.
            if os.path.samestat(os.fstat(file.fileno()), _lock_path(path).stat()):
                return file
        except BlockingIOError as error:
            file.close()
            raise ModelError(
                f"--out {path} is being written by another process; choose another path"
            ) from error
        except FileNotFoundError:
            pass  # removed meanwhile, too: open a new one
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                return file
            file.close()
            raise
        file.close()


def _model_error(error: OSError, path: Path) -> ModelError:
    """The sentence that says why `path` could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ModelError(
            f"no space left for {path} ({error}); nothing was kept; free some or choose another "
            "disk"
        )
    return ModelError(f"{path} could not be written ({error}); nothing was kept")


def _sync(directory: Path) -> None:
    """Flush everything in `directory`, and the directory itself, to the disk."""
    for file in sorted(directory.rglob("*")):
        _fsync(file)
    _fsync(directory)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
