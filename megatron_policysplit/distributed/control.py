"""The control group: how all ranks agree on what happens next while only some of them work.

While leaders generate, which may take an hour, no collective of the training groups is pending.
Instead all ranks meet once per heartbeat on the control group, a gloo group with a short time-out:
one all-reduce tells every rank the same four things. Is any rank still busy? Did any get a stop
signal? Did any fail? Does any need all ranks to serve it (an engine that came back wants weights)?
A rank that is gone is thus noticed by the short time-out, not by that of a training collective.

Coroutines run on the control loop, an event loop in a thread that lives as long as the run, so that
requests go on while the main thread trains.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine
from typing import Any, Generic, Protocol, TypeVar

import torch
import torch.distributed as dist

from megatron_policysplit.distributed.agree import exchange
from megatron_policysplit.distributed.stop_signal import StopRequested, StopSignal

HEARTBEAT_SECONDS = 2.0
FAILURE = "generation failed on rank {rank} ({error})"

T = TypeVar("T")


class Service(Protocol):
    """Something that may need all ranks while leaders generate (`training.generation`)."""

    def wanted(self) -> bool:
        """Whether this rank wants `serve` to be called; asked at every heartbeat.

        In the main thread. Raises a UserError if the run cannot go on: `Control.attend` raises it
        on every rank.
        """

    def serve(self) -> None:
        """Do what was wanted. Collective over all ranks, in the main thread, once any wanted it."""


class Work(Generic[T]):
    """A coroutine that runs on the control loop while the main thread does something else."""

    def __init__(self, coroutine: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._task: asyncio.Task | None = None
        self._cancelled = False
        self._future = asyncio.run_coroutine_threadsafe(self._run(coroutine), loop)

    async def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        self._task = asyncio.ensure_future(coroutine)
        if self._cancelled:  # `cancel` came before the loop got here
            self._task.cancel()
        return await self._task

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until it is done, at most `seconds` (None: for ever); return whether it is."""
        return bool(concurrent.futures.wait({self._future}, seconds).done)

    def failed(self) -> BaseException | None:
        """Return what it raised, once done; if cancelled, concurrent.futures' CancelledError."""
        return (
            concurrent.futures.CancelledError()
            if self._future.cancelled()
            else self._future.exception()
        )

    def result(self) -> T:
        """Return its result, once done, or raise what it raised."""
        return self._future.result()

    def cancel(self) -> None:
        """Cancel it and wait until its own clean-up is over."""

        def stop() -> None:
            self._cancelled = True
            if self._task is not None:
                self._task.cancel()

        # The task is cancelled, not the future: a future that is cancelled is done at once, while
        # the coroutine still cleans up.
        self._loop.call_soon_threadsafe(stop)
        self.wait()


class Control:
    """The control group and the control loop of a rank.

    `attend` and `check` are collective over all ranks: all call them in the same order, in the main
    thread. `start` and `run` concern this rank alone.
    """

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
        """Start a coroutine of this rank on the control loop; `attend` or `Work.cancel` ends it."""
        return Work(work, self.loop)

    def attend(
        self, work: Work[T] | Coroutine[Any, Any, T] | None, service: Service | None = None
    ) -> T | None:
        """Wait until every rank's work is done; return the result of this rank's.

        Collective over all ranks, in the main thread. One all-reduce of four integers over the
        control group per heartbeat, at least one; if work failed, one all-gather of an object more.
        Whatever is raised, unfinished work of this rank is cancelled first.

        Args:
            work: this rank's, started or not; None on a rank that only waits.
            service: None or the same kind on every rank. All ranks call its `serve` between two
                heartbeats, as often as any rank wants it.

        Raises:
            StopRequested: on every rank if any got a stop signal.
            Exception: if work, or `service.wanted`, failed on a rank. That rank raises its own
                error, the others the same UserError or else a TrainingError that names the rank
                (`distributed.agree`).
            RuntimeError: of the backend, if a rank is gone.
        """
        if work is not None and not isinstance(work, Work):
            work = self.start(work)
        try:
            while True:
                # A rank without work does not wait here but in the all-reduce, for those that do.
                done = work is None or work.wait(self.heartbeat_seconds)
                failure = work.failed() if done and work is not None else None
                wanted = False
                if service is not None and failure is None:
                    try:
                        wanted = service.wanted()
                    except Exception as error:  # raised by `exchange` below, on every rank
                        failure = error
                # Four flags in one all-reduce. All ranks see the same sums, so that all take the
                # same branch below: none is left alone in a collective.
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
        """Return the result of a coroutine of this rank alone, run on the control loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def check(self) -> None:
        """Raise StopRequested on every rank if any got a stop signal.

        Collective over all ranks: one all-reduce of four integers over the control group.
        """
        self.attend(None)

    def close(self) -> None:
        """End the control loop and its thread. This rank alone; nothing may run on it any more."""
        self.run(self.loop.shutdown_asyncgens())
        self.run(self.loop.shutdown_default_executor())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    def _tick(self, status: list[bool]) -> list[int]:
        """Return over how many ranks each flag is set."""
        total = torch.tensor(status, dtype=torch.int64)
        dist.all_reduce(total, group=self.group)
        return total.tolist()
