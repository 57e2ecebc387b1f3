"""Directories that are complete or not there: written beside their place, synced to the disk, and renamed."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from checkpoints_conv.ranks import Ranks
from megatron_policysplit.errors import ModelError

SUFFIX = ".partial"


def is_partial(path: Path) -> bool:
    """Whether this is the name of a directory that is still being written, or that a killed writer left."""
    return path.absolute().name.endswith(SUFFIX)


def partial_of(path: Path) -> Path:
    """The directory beside `path` in which it is written."""
    return path.with_name(f".{path.name}{SUFFIX}")


def check_free(path: Path, nbytes: int) -> None:
    """Raise ModelError unless `path` is free (or an empty directory) and its disk has room for `nbytes`."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ModelError(f"--out {path} exists and is not an empty directory; choose another path or remove it")
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < nbytes:
        raise ModelError(f"no space left for --out {path}: {nbytes / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB free")


@contextmanager
def written_beside(path: Path, ranks: Ranks) -> Iterator[Path]:
    """A new directory for all ranks, which becomes `path` if the body ends without an error, and is removed if not.

    Collective. An OSError of the body or of the renaming is raised as a ModelError naming `path`.
    """
    partial = partial_of(path)

    def make() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def publish() -> None:
        _sync(partial)
        if path.exists():
            path.rmdir()
        partial.rename(path)
        _fsync(path.absolute().parent)

    try:
        ranks.first(make)
        yield partial
        ranks.first(publish)
    except BaseException as error:
        if ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise _explained(error, path) from error
        raise


def _explained(error: OSError, path: Path) -> ModelError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ModelError(f"no space left for {path} ({error}); nothing was kept; free some or choose another disk")
    return ModelError(f"{path} could not be written ({error}); nothing was kept")


def _sync(directory: Path) -> None:
    """Have everything in `directory` on the disk."""
    for file in sorted(directory.rglob("*")):
        _fsync(file)
    _fsync(directory)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
