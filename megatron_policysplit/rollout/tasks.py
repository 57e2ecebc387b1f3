"""Groups of coroutines of the `sglang` engine: run to their end, cancelled, and their results."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from megatron_policysplit.rollout.answers import UnusableAnswer
from megatron_policysplit.rollout.engine import EnginePaused

T = TypeVar("T")


async def gather_failures(coroutines: Sequence[Coroutine[Any, Any, None]]) -> list[UnusableAnswer]:
    """Run all coroutines to their end and return the unusable answers that ended some of them.

    Any other error cancels all of them and is raised.
    """
    failures = []

    async def note_failure(coroutine: Coroutine[Any, Any, None]) -> None:
        try:
            await coroutine
        except UnusableAnswer as failure:
            failures.append(failure)

    try:
        async with asyncio.TaskGroup() as group:
            for coroutine in coroutines:
                group.create_task(note_failure(coroutine))
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return failures


def result_of(task: asyncio.Task[T]) -> T:
    """Return the result of a task that has ended, or raise its error.

    Raises EnginePaused for a cancelled task: `SglangEngine.pause` cancels those that are running.
    """
    if task.cancelled():
        raise EnginePaused(
            "the engine was paused while it generated; submit the requests again after resume()"
        )
    return task.result()


async def cancel_all(tasks: Sequence[asyncio.Task]) -> None:
    """Cancel the tasks and wait until their own clean-up is over."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
