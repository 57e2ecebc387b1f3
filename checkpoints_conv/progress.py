"""A progress bar in bytes, or in something else that is counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

Advance = Callable[[int], None]  # what was done since the last call
Progress = Callable[[int], AbstractContextManager[Advance]]  # given all there is to do


@contextmanager
def silent(total: int) -> Iterator[Advance]:
    """No bar."""
    yield lambda done: None


@contextmanager
def bar(total_bytes: int) -> Iterator[Advance]:
    """Bytes done, rate and time left, on stderr."""
    from rich.progress import DownloadColumn, TransferSpeedColumn

    with _shown(total_bytes, DownloadColumn(), TransferSpeedColumn()) as advance:
        yield advance


@contextmanager
def token_bar(total_tokens: int) -> Iterator[Advance]:
    """Tokens done and time left, on stderr."""
    from rich.progress import TextColumn

    with _shown(
        total_tokens, TextColumn("{task.completed:,.0f}/{task.total:,.0f} tokens")
    ) as advance:
        yield advance


@contextmanager
def _shown(total: int, *columns: ProgressColumn) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    with Bar(BarColumn(), *columns, TimeRemainingColumn(), console=Console(stderr=True)) as shown:
        task = shown.add_task("", total=total)
        yield lambda done: shown.advance(task, done)
