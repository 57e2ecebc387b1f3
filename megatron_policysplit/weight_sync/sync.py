"""The actor's weights into every SGLang engine, and the order in which that happens.

pause, begin, the weights, end, flush, set version, continue, read the version back: `session.py`
for the calls before and after, a transport for the weights. No engine ever generates with mixed
weights: one on which anything failed stays paused, and out of use until it has taken a full set.
Engines do not wait for each other's failures.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from torch import Tensor

from megatron_policysplit.actor.actor import Actor
from megatron_policysplit.actor.weights import Read
from megatron_policysplit.distributed.control import Control
from megatron_policysplit.distributed.layout import Layout
from megatron_policysplit.errors import EngineError
from megatron_policysplit.serving.members import Member, Placement, State
from megatron_policysplit.weight_sync import session
from megatron_policysplit.weight_sync.disk import DiskTransport
from megatron_policysplit.weight_sync.distributed import DistributedTransport
from megatron_policysplit.weight_sync.outcome import Failure, Failures, merged, results_of_all_ranks
from megatron_policysplit.weight_sync.session import Hook
from megatron_policysplit.weight_sync.tensor import TensorTransport
from megatron_policysplit.weight_sync.transport import SyncSettings, Transport, TransportContext

# By weight_sync.transport of the configuration, whose choices are these (config/schema.py).
TRANSPORTS: dict[str, Callable[[TransportContext], Transport]] = {
    "tensor": TensorTransport,
    "distributed": DistributedTransport,
    "disk": DiskTransport,
}

ABSENT = (State.STARTING, State.DOWN)
ABANDON_SECONDS = 10.0


class WeightSync:
    """Built on every rank at once, and then called on every rank at once, in the main thread.

    placements: of all engines, the same on every rank. members: those that this rank owns.
    before_load, after_load: of an engine, between pause and begin, and between end and flush. read:
    gives a parameter's values on the rank's own device.

    Raises ConfigError on every rank if weight_sync.transport cannot reach the engines.
    """

    def __init__(
        self,
        settings: SyncSettings,
        layout: Layout,
        control: Control,
        actor: Actor,
        placements: Sequence[Placement],
        members: Sequence[Member],
        *,
        before_load: Hook | None = None,
        after_load: Hook | None = None,
        read: Read = Tensor.detach,
    ):
        self.layout, self.control = layout, control
        self.members = {member.index: member for member in members}
        self.limit = settings.weight_sync.timeout_seconds
        self._before_load, self._after_load = before_load, after_load
        context = TransportContext(settings, layout, control, actor, placements, self.members, read)
        self._transport = TRANSPORTS[settings.weight_sync.transport](context)

    def push(self, version: int, engines: set[int] | None = None) -> dict[int, str]:
        """Give `engines` (None: all) the actor's weights as `version`; which of them did not take
        them, and why.

        Collective over all ranks; the same answer on each, {} if all took them. Those are SERVING
        then; the others are QUARANTINED, or DOWN if nothing answers there any more. Engines that
        are STARTING or DOWN are left as they are and named with their own reason. What fails
        besides engines (an export, a disk) is raised on every rank; the engines are QUARANTINED
        then.
        """
        mine = [
            member for index, member in self.members.items() if engines is None or index in engines
        ]
        absent, tried = self._absent(mine)
        mine = [member for member in mine if member.index in tried]
        try:
            failures = self._push(version, tried, mine)
        except Exception as error:
            self._abandon(
                {
                    member.index: Failure(f"the weight sync was broken off ({error})")
                    for member in mine
                }
            )
            raise
        self._abandon(failures)
        for member in mine:
            if member.index not in failures:
                _serve(member, version)
        return dict(
            sorted((absent | {engine: failure.why for engine, failure in failures.items()}).items())
        )

    def _push(self, version: int, tried: set[int], mine: Sequence[Member]) -> Failures:
        """The engines of `tried` that failed. mine: those of them that this rank owns."""
        begins = self._transport.has_session

        async def begin(member: Member) -> None:
            await session.open_session(
                member, begins=begins, limit=self.limit, before_load=self._before_load
            )

        async def end(member: Member) -> None:
            await session.close_session(
                member, version, ends=begins, limit=self.limit, after_load=self._after_load
            )

        failures = self._on_each(mine, begin)
        live = tried - set(failures)
        if live:
            for member in mine:
                if member.index in live:
                    member.version = None
            failures |= self._transport.send(version, live)
            failures |= self._on_each(
                [member for member in mine if member.index not in failures], end
            )
        return failures

    @property
    def can_restore(self) -> bool:
        """Whether `restore_from_snapshot` has something to give: after the first push with
        transport=disk.
        """
        return self._transport.snapshot is not None

    async def restore_from_snapshot(self, member: Member) -> None:
        """Give one engine of this rank the newest weights without any other rank; on the control
        loop.

        Raises EngineError, with the engine QUARANTINED or DOWN, if it does not take them;
        RuntimeError unless `can_restore`.
        """
        snapshot = self._transport.snapshot  # the main thread may replace it meanwhile
        if snapshot is None:
            raise RuntimeError("there is no snapshot to restore an engine from")
        member.version = None
        try:
            await session.open_session(
                member, begins=False, limit=self.limit, before_load=self._before_load
            )
            await snapshot.load(member)
            await session.close_session(
                member, snapshot.version, ends=False, limit=self.limit, after_load=self._after_load
            )
        except EngineError as error:
            await self._leave_paused(member, session.as_failure(error))
            raise
        _serve(member, snapshot.version)

    def close(self) -> None:
        """Give up what the transport holds: groups, shared memory. Engines keep their weights."""
        self._transport.close()

    def _absent(self, mine: Sequence[Member]) -> tuple[dict[int, str], set[int]]:
        """Over all ranks: the engines that cannot be tried, with their reason, and those that can."""
        own = {member.index: (member.state, member.why) for member in mine}
        everyone = {
            index: found
            for rank in results_of_all_ranks(self.layout, lambda: own)
            for index, found in rank.items()
        }
        absent = {
            index: f"it is {state.value}" + (f" ({why})" if why else "")
            for index, (state, why) in everyone.items()
            if state in ABSENT
        }
        return absent, set(everyone) - set(absent)

    def _abandon(self, failures: Failures) -> None:
        """Leave the failed engines of this rank paused, and say so in their state."""

        async def leave_all() -> None:
            failed = [
                (self.members[index], why)
                for index, why in failures.items()
                if index in self.members
            ]
            await asyncio.gather(
                *(self._leave_paused(member, failure) for member, failure in failed)
            )

        self.control.run(leave_all())

    async def _leave_paused(self, member: Member, failure: Failure) -> None:
        limit = min(self.limit, ABANDON_SECONDS)
        answered = await session.abandon(member, ends=self._transport.has_session, limit=limit)
        member.state, member.why = State.QUARANTINED if answered else State.DOWN, failure.why

    def _on_each(self, members: Sequence[Member], step: Callable) -> Failures:
        return merged(
            results_of_all_ranks(self.layout, lambda: self.control.run(session.each(members, step)))
        )


def _serve(member: Member, version: int) -> None:
    member.state, member.version, member.why = State.SERVING, version, ""
