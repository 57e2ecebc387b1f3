"""The control group: how all ranks agree on what happens next while only some of them work.

While leaders generate, which may take an hour, no collective of the training groups is pending.
Every rank meets the others on a gloo group of its own, with a short time-out, once per heartbeat,
and all of them learn the same four things: is anyone still busy, did anyone get a stop signal, did
anyone fail, does anyone need all ranks to serve it (an engine that came back wants the weights).

Coroutines run on a loop in a thread of its own, so that requests go on while the main thread
trains.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine
from datetime import timedelta
from typing import Any, Generic, Protocol, TypeVar

import torch
import torch.distributed as dist

from megatron_policysplit.distributed.agree import exchange
from megatron_policysplit.distributed.stop_signal import StopRequested, StopSignal

HEARTBEAT_SECONDS = 2.0
MISSING_SECONDS = 10.0
FAILURE = "generation failed on rank {rank} ({error})"

T = TypeVar("T")


class Service(Protocol):
    """Something that may need all ranks while leaders generate."""

    def wanted(self) -> bool:
        """Whether this rank wants `serve` to be called; raises a UserError if the run cannot go on."""

    def serve(self) -> None:
        """Collective over all ranks, in the main thread, once any of them wanted it."""


class Work(Generic[T]):
    """A coroutine under way on the control loop."""

    def __init__(self, coroutine: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._task: asyncio.Task | None = None
        self._cancelled = False
        self._future = asyncio.run_coroutine_threadsafe(self._run(coroutine), loop)

    async def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        self._task = asyncio.ensure_future(coroutine)
        if self._cancelled:
            self._task.cancel()
        return await self._task

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until it is done, at most so long; whether it is."""
        return bool(concurrent.futures.wait({self._future}, seconds).done)

    def failed(self) -> BaseException | None:
        """What it raised, once done; a CancelledError (of concurrent.futures) if it was cancelled."""
        return (
            concurrent.futures.CancelledError()
            if self._future.cancelled()
            else self._future.exception()
        )

    def result(self) -> T:
        """Its result, once done, or what it raised."""
        return self._future.result()

    def cancel(self) -> None:
        """Cancel it and wait until its own clean-up is over."""

        def stop() -> None:
            self._cancelled = True
            if self._task is not None:
                self._task.cancel()

        self._loop.call_soon_threadsafe(stop)
        self.wait()


class Control:
    """One per rank. All ranks call the same methods in the same order."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        stop: StopSignal,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
    ):
        self.group, self.stop, self.heartbeat_seconds = group, stop, heartbeat_seconds
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self.loop.run_forever, name="policysplit-control", daemon=True
        )
        self._thread.start()

    def start(self, work: Coroutine[Any, Any, T]) -> Work[T]:
        """Begin a coroutine of this rank on the control loop; `attend` or `Work.cancel` ends it."""
        return Work(work, self.loop)

    def attend(
        self, work: Work[T] | Coroutine[Any, Any, T] | None, service: Service | None = None
    ) -> T | None:
        """Wait until every rank's work is done (None on ranks that only wait); returns this rank's
        result.

        service: the same kind on every rank; it is served in between, as often as any rank wants
        it. Raises StopRequested on every rank if any got a stop signal. If work failed somewhere,
        the failed ranks raise their own errors, the others the same UserError or else a
        TrainingError that names the rank. RuntimeError (of the backend) if a rank is gone.
        Unfinished work is cancelled.
        """
        if work is not None and not isinstance(work, Work):
            work = self.start(work)
        try:
            while True:
                done = work is None or work.wait(self.heartbeat_seconds)
                failure = work.failed() if done and work is not None else None
                wanted = False
                if service is not None and failure is None:
                    try:
                        wanted = service.wanted()
                    except Exception as error:  # raised by `exchange` below, on every rank
                        failure = error
                busy, stopped, failures, wants = self._tick(
                    [not done, self.stop.received is not None, failure is not None, wanted]
                )
                if failures:
                    exchange(self.group, None, failure, FAILURE)
                if stopped:
                    raise StopRequested
                if not busy:
                    return None if work is None else work.result()
                if wants:
                    service.serve()
        finally:
            if work is not None:
                work.cancel()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine of this rank alone, on the loop that engines live on."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def check(self) -> None:
        """Raise StopRequested on every rank if any has been signalled. One all-reduce of four
        integers.
        """
        self.attend(None)

    def close(self) -> None:
        self.run(self.loop.shutdown_asyncgens())
        self.run(self.loop.shutdown_default_executor())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    def _tick(self, status: list[bool]) -> list[int]:
        total = torch.tensor(status, dtype=torch.int64)
        dist.all_reduce(total, group=self.group)
        return total.tolist()


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
