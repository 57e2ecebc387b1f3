"""How far a piece of work is that may take long, on stderr: a bar on a terminal, else lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

PATIENCE_SECONDS = 2.0  # work that takes no longer shows nothing
LINE_SECONDS = 10.0  # between two lines where stderr is no terminal


@contextmanager
def show_progress(
    what: str, total: int, *, is_shown: bool = True
) -> Iterator[Callable[[int], None]]:
    """Yield a function that takes the number done since its last call.

    what: such as "prompts of questions". is_shown: False on ranks other than the one that tells.
    """
    with ExitStack() as resources:
        yield _Progress(what, total, resources).advance if is_shown else lambda count: None


class _Progress:
    def __init__(self, what: str, total: int, resources: ExitStack):
        self._what, self._total, self._resources = what, total, resources
        self._done, self._next = 0, time.monotonic() + PATIENCE_SECONDS
        self._bar: Callable[[int], None] | None = None

    def advance(self, count: int) -> None:
        self._done += count
        if self._bar is not None:
            self._bar(self._done)
        elif time.monotonic() >= self._next and self._done < self._total:
            self._next = time.monotonic() + LINE_SECONDS
            if sys.stderr.isatty():
                self._bar = self._open_bar()
                self._bar(self._done)
            else:
                print(
                    f"{self._done:,} of {self._total:,} {self._what}", file=sys.stderr, flush=True
                )

    def _open_bar(self) -> Callable[[int], None]:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        columns = TextColumn(self._what), BarColumn(), MofNCompleteColumn(), Remaining()
        bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._resources.enter_context(bar)
        task = bar.add_task(self._what, total=self._total)
        return lambda done: bar.update(task, completed=done)
