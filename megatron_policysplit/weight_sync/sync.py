"""The actor's weights into every SGLang engine, and the order in which that happens.

Order: pause, begin, the weights, end, flush, set version, continue, read the version back.
`session.py` has the calls before and after, a transport (`transport.py`) gives the weights. No
engine ever generates with mixed weights: one on which anything failed stays paused, and out of use
until it has taken a full set. The others go on without it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from torch import Tensor

from megatron_policysplit.actor.actor import Actor
from megatron_policysplit.actor.weights import Read
from megatron_policysplit.distributed.control import Control
from megatron_policysplit.distributed.device import return_freed_memory
from megatron_policysplit.distributed.layout import Layout
from megatron_policysplit.errors import EngineError
from megatron_policysplit.serving.members import Member, Placement, State
from megatron_policysplit.weight_sync import session
from megatron_policysplit.weight_sync.disk import DiskTransport
from megatron_policysplit.weight_sync.distributed import DistributedTransport
from megatron_policysplit.weight_sync.outcome import Failure, Failures, merge, results_of_all_ranks
from megatron_policysplit.weight_sync.session import Hook, Step
from megatron_policysplit.weight_sync.tensor import TensorTransport
from megatron_policysplit.weight_sync.transport import SyncSettings, Transport, TransportContext

# By weight_sync.transport of the configuration, whose choices are these (config/rollout_schema.py).
TRANSPORTS: dict[str, Callable[[TransportContext], Transport]] = {
    "tensor": TensorTransport,
    "distributed": DistributedTransport,
    "disk": DiskTransport,
}

ABSENT = (State.STARTING, State.DOWN)  # states in which an engine is given no weights
ABANDON_SECONDS = 10.0  # for each call to an engine that has failed


class WeightSync:
    """Gives the actor's weights to the engines. One per rank; `serving.fleet.Fleet` uses it.

    The constructor, `push` and nothing else are collective over all ranks, in the main thread.
    The constructor raises ConfigError, on every rank, if the transport cannot reach the engines.

    Args:
        settings: of the configuration (`sync_settings`).
        layout: where this rank stands.
        control: on whose loop engines are called.
        actor: whose weights they are.
        placements: of all engines, the same on every rank.
        members: the engines that this rank owns, often none.
        before_load: called for each engine between pause and begin.
        after_load: called for each engine between end and flush.
        read: gives a parameter's values on the rank's own device.
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
        """Give `engines` (None: all) the actor's weights as `version`; return who failed, and why.

        The answer, by engine index, is the same on every rank, {} if all took the weights. Those
        are SERVING then; the others are QUARANTINED, or DOWN if nothing answers there any more.
        Engines that are STARTING or DOWN are left as they are and named with their own reason. What
        fails besides engines (an export, a disk) is raised on every rank; the engines are
        QUARANTINED then.

        Collective over all ranks, in the main thread: at most four all-gathers of an object over
        the world, a barrier if engines are colocated, and what the transport needs.
        """
        members = [
            member for index, member in self.members.items() if engines is None or index in engines
        ]
        absent, present = self._split_absent(members)
        members = [member for member in members if member.index in present]
        try:
            failures = self._push(version, present, members)
        except Exception as error:
            # Sessions may be open and weights mixed: no engine of this rank may go on.
            broken_off = Failure(f"the weight sync was broken off ({error})")
            self._abandon({member.index: broken_off for member in members})
            raise
        self._abandon(failures)
        for member in members:
            if member.index not in failures:
                _serve(member, version)
        reasons = absent | {engine: failure.why for engine, failure in failures.items()}
        return dict(sorted(reasons.items()))

    def _push(self, version: int, present: set[int], members: Sequence[Member]) -> Failures:
        """Return the engines of `present` that failed. members: those that this rank owns."""
        begins = self._transport.has_session

        async def begin(member: Member) -> None:
            await session.open_session(
                member, begins=begins, limit=self.limit, before_load=self._before_load
            )

        async def end(member: Member) -> None:
            await session.end(member, self.limit)

        async def serve_again(member: Member) -> None:
            await session.serve_again(
                member, version, limit=self.limit, after_load=self._after_load
            )

        failures = self._call_each(members, begin)
        live = present - set(failures)
        if live:
            for member in members:
                if member.index in live:
                    member.version = None  # mixed weights, from the first bucket on
            failures |= self._transport.send(version, live)
            steps = [end, serve_again] if begins else [serve_again]
            for step in steps:
                remaining = [member for member in members if member.index not in failures]
                if step is serve_again and self._after_load is not None:
                    self._return_memory()
                failures |= self._call_each(remaining, step)
        return failures

    def _return_memory(self) -> None:
        """Give back what this rank's export and buffers took of its GPU, and wait for all ranks.

        A colocated engine takes memory for its cache next, also on GPUs of other ranks than its
        owner's. One barrier over the world.
        """
        return_freed_memory()
        self.layout.barrier()

    @property
    def can_restore(self) -> bool:
        """Whether the transport has a snapshot to restore from: with disk, after the first push."""
        return self._transport.snapshot is not None

    async def restore_from_snapshot(self, member: Member) -> None:
        """Give one engine of this rank the newest weights without any other rank.

        On the control loop. Raises EngineError, with the engine QUARANTINED or DOWN, if it does not
        take them; RuntimeError unless `can_restore`.
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
            await session.serve_again(
                member, snapshot.version, limit=self.limit, after_load=self._after_load
            )
        except EngineError as error:
            await self._leave_paused(member, session.as_failure(error))
            raise
        _serve(member, snapshot.version)

    def close(self) -> None:
        """Give up what the transport holds: groups, shared memory. Engines keep their weights.

        Each rank for itself, not collective.
        """
        self._transport.close()

    def _split_absent(self, members: Sequence[Member]) -> tuple[dict[int, str], set[int]]:
        """Return why engines cannot be tried, and which can, over all ranks (one all-gather)."""
        local_states = {member.index: (member.state, member.why) for member in members}
        # Exchanged, not asked again later: a state may change on the control loop meanwhile, and
        # all ranks have to act on the same one.
        states = {
            index: state
            for rank_states in results_of_all_ranks(self.layout, lambda: local_states)
            for index, state in rank_states.items()
        }
        absent = {
            index: f"it is {state.value}" + (f" ({why})" if why else "")
            for index, (state, why) in states.items()
            if state in ABSENT
        }
        return absent, set(states) - set(absent)

    def _abandon(self, failures: Failures) -> None:
        """Leave the failed engines of this rank paused, and say so in their state."""

        async def leave_all() -> None:
            await asyncio.gather(
                *(
                    self._leave_paused(self.members[index], failure)
                    for index, failure in failures.items()
                    if index in self.members
                )
            )

        self.control.run(leave_all())

    async def _leave_paused(self, member: Member, failure: Failure) -> None:
        limit = min(self.limit, ABANDON_SECONDS)
        answered = await session.abandon(member, ends=self._transport.has_session, limit=limit)
        member.state, member.why = State.QUARANTINED if answered else State.DOWN, failure.why

    def _call_each(self, members: Sequence[Member], step: Step) -> Failures:
        """Call `step` on this rank's members; return all ranks' failures (one all-gather)."""
        return merge(
            results_of_all_ranks(
                self.layout, lambda: self.control.run(session.call_each(members, step))
            )
        )


def _serve(member: Member, version: int) -> None:
    member.state, member.version, member.why = State.SERVING, version, ""
