"""The control group: how all ranks agree on what happens next while only some of them work.

While leaders generate, which may take an hour, no collective of the training groups is pending. Every
rank meets the others on a gloo group of its own, with a short time-out, once per heartbeat, and all of
them learn the same three things: is anyone still busy, did anyone get a stop signal, did anyone fail.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_policysplit.errors import TrainingError, UserError
from megatron_policysplit.stopping import StopRequested, StopSignal

HEARTBEAT_SECONDS = 2.0
MISSING_SECONDS = 10.0

T = TypeVar("T")


class Control:
    """One per rank. All ranks call the same methods in the same order."""

    def __init__(self, group: dist.ProcessGroup, stop: StopSignal, heartbeat_seconds: float = HEARTBEAT_SECONDS):
        self.group, self.stop, self.heartbeat_seconds = group, stop, heartbeat_seconds
        self.loop = asyncio.new_event_loop()

    def attend(self, work: Coroutine[Any, Any, T] | None) -> T | None:
        """Run `work` (None on ranks that only wait) until every rank's is done; returns this rank's result.

        Raises StopRequested on every rank if any got a stop signal. If work failed somewhere, the failed ranks
        raise their own errors, the others the same UserError or else a TrainingError that names the rank.
        RuntimeError (of the backend) if a rank is gone. Unfinished work is cancelled.
        """
        return self.loop.run_until_complete(self._attend(work))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine of this rank alone, on the loop that engines live on."""
        return self.loop.run_until_complete(work)

    def check(self) -> None:
        """Raise StopRequested on every rank if any has been signalled. One all-reduce of three integers."""
        self.attend(None)

    def close(self) -> None:
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()

    async def _attend(self, work: Coroutine[Any, Any, T] | None) -> T | None:
        task = None if work is None else asyncio.ensure_future(work)
        try:
            while True:
                if task is not None and not task.done():
                    await asyncio.wait({task}, timeout=self.heartbeat_seconds)
                done = task is None or task.done()
                failed = done and task is not None and task.exception() is not None
                busy, stopped, failures = await asyncio.to_thread(
                    self._tick, [not done, self.stop.received is not None, failed]
                )
                if failures:
                    raise await asyncio.to_thread(self._failure, task.exception() if failed else None)
                if stopped:
                    raise StopRequested
                if not busy:
                    return None if task is None else task.result()
        finally:
            if task is not None and not task.done():
                task.cancel()
                await asyncio.wait({task})

    def _tick(self, status: list[bool]) -> list[int]:
        total = torch.tensor(status, dtype=torch.int64)
        dist.all_reduce(total, group=self.group)
        return total.tolist()

    def _failure(self, own: BaseException | None) -> BaseException:
        """What this rank raises after work failed somewhere. One all-gather of the errors."""
        said = own if own is None or isinstance(own, UserError) else f"{type(own).__name__}: {own}"
        errors: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(errors, said, group=self.group)
        if own is not None:
            return own
        rank, error = next((rank, error) for rank, error in enumerate(errors) if error is not None)
        return error if isinstance(error, UserError) else TrainingError(f"generation failed on rank {rank} ({error})")


def missing_ranks(rank: int, world_size: int) -> str:
    """After a collective failed: say which ranks no longer answer, as far as the store can tell."""
    if world_size == 1:
        return "no other rank takes part in this run"
    store = dist.distributed_c10d._get_default_store()
    try:
        store.set(f"policysplit/failed/{rank}", "1")
        missing = []
        for other in range(world_size):
            try:
                store.wait([f"policysplit/failed/{other}"], timedelta(seconds=MISSING_SECONDS))
            except dist.DistStoreError:
                missing.append(other)
    except (dist.DistNetworkError, dist.DistStoreError, RuntimeError):
        return "rank 0, which hosts the store, does not answer"
    if not missing:
        return "every rank still answers"
    return f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))} did not answer"
