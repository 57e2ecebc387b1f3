"""Progress bars in bytes or tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

Advance = Callable[[int], None]  # takes the amount done since the last call
Progress = Callable[[int], AbstractContextManager[Advance]]  # takes the total amount


@contextmanager
def silent(total: int) -> Iterator[Advance]:
    """Show nothing."""
    yield lambda done: None


@contextmanager
def bar(total_bytes: int) -> Iterator[Advance]:
    """Show bytes done, rate and time left on stderr."""
    from rich.progress import DownloadColumn, TransferSpeedColumn

    with _rich_bar(total_bytes, DownloadColumn(), TransferSpeedColumn()) as advance:
        yield advance


@contextmanager
def token_bar(total_tokens: int) -> Iterator[Advance]:
    """Show tokens done and time left on stderr."""
    from rich.progress import TextColumn

    tokens = TextColumn("{task.completed:,.0f}/{task.total:,.0f} tokens")
    with _rich_bar(total_tokens, tokens) as advance:
        yield advance


@contextmanager
def _rich_bar(total: int, *columns: ProgressColumn) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    with Bar(BarColumn(), *columns, TimeRemainingColumn(), console=Console(stderr=True)) as rich:
        task = rich.add_task("", total=total)
        yield lambda done: rich.advance(task, done)
