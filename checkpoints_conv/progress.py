"""A progress bar in bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Advance = Callable[[int], None]  # bytes done since the last call
Progress = Callable[[int], AbstractContextManager[Advance]]  # given all bytes there are


@contextmanager
def silent(total_bytes: int) -> Iterator[Advance]:
    """No bar."""
    yield lambda nbytes: None


@contextmanager
def bar(total_bytes: int) -> Iterator[Advance]:
    """Bytes done, rate and time left, on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True)) as shown:
        task = shown.add_task("", total=total_bytes)
        yield lambda nbytes: shown.advance(task, nbytes)
