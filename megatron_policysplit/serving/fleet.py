"""The SGLang engines of a run: started, watched, started again, and given the weights they lack.

Every rank has a `Fleet`; the rank that owns an engine (`placement.py`) tends it on the control
loop. What needs all ranks, weights for an engine that came back, is asked for through `wanted` and
given by `resync`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Protocol

from megatron_policysplit.config import ServerConfig
from megatron_policysplit.distributed.control import Control, Work
from megatron_policysplit.distributed.layout import Layout
from megatron_policysplit.errors import EngineError, EngineLost
from megatron_policysplit.serving.colocation import Colocation
from megatron_policysplit.serving.engines import (
    EngineSet,
    EngineStatus,
    addresses_in_service,
    gather_engines,
    gather_statuses,
)
from megatron_policysplit.serving.identity import check_identity
from megatron_policysplit.serving.members import Member, State
from megatron_policysplit.serving.router import match_workers
from megatron_policysplit.serving.servers import Server

TEND_SECONDS = 1.0  # from one look at an engine to the next
PROBE_SECONDS = 30.0  # at most this long a probe waits for its token
RETRY_SECONDS = 10.0  # until an engine that the run cannot start is tried again
ANSWERING = (State.WAITING, State.SERVING, State.QUARANTINED)


class Weights(Protocol):
    """The part of `weight_sync.WeightSync` that is used here."""

    @property
    def can_restore(self) -> bool: ...
    def push(self, version: int, engines: set[int]) -> dict[int, str]: ...
    async def restore_from_snapshot(self, member: Member) -> None: ...


class Fleet:
    """The engines of a run, as the rank that owns some of them tends them.

    It can answer `control.Service`'s question (`wanted`); the answer is `resync`, with a version.
    """

    def __init__(
        self,
        server: ServerConfig,
        layout: Layout,
        control: Control,
        engines: EngineSet,
        weights: Weights,
        log: Callable[[str], None],
        *,
        colocation: Colocation | None = None,
    ):
        """Take over engines of which none is started yet.

        server: rollout.server, for the limits on health and restarts.
        weights: the weight sync over all engines.
        log: takes one line of text.
        colocation: where the engines share GPUs with the actor.
        """
        self.layout, self.control, self.log = layout, control, log
        self.server_config, self.weights, self.colocation = server, weights, colocation
        self.members, self.servers = list(engines.members), dict(engines.servers)
        self.router = engines.router
        self.version = -1  # of the last sync
        self._identity = engines.identity
        self._restarts = dict.fromkeys(self.servers, 0)
        self._retry_at: dict[int, float] = {}
        self._behind: set[str] = set()  # addresses that belong behind the router
        self._told: set[str] = set()  # those that it may know
        self._routing = asyncio.Lock()
        self._trouble = ""  # why it could not be told, as said in the log
        self._news = False  # a loss that the chief, whose router should know, has not heard of
        self._locks = {member.index: asyncio.Lock() for member in self.members}
        self._probes: dict[int, asyncio.Task] = {}
        self._tending: list[Work] = []

    async def open(self) -> None:
        """Start this rank's servers and router, wait until they work, and begin to tend them.

        Raises EngineError for the first that does not. On the control loop, whose thread lives as
        long as the run: the servers die with the thread that starts them.
        """
        tasks = [asyncio.ensure_future(self._open_engine(member)) for member in self.members]
        try:
            if self.router is not None:
                self.router.start()
                tasks.append(asyncio.ensure_future(self.router.ready()))
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        self._tending = [self.control.start(self._tend(member)) for member in self.members]
        if self.router is not None:
            self._tending.append(self.control.start(self._tend_router()))

    def close(self) -> None:
        """End what this rank started; engines that others started keep what they serve."""
        # The tending first, or it would start again what is stopped below.
        for work in self._tending:
            work.cancel()
        self.control.run(self._stop_all())

    async def _stop_all(self) -> None:
        routers = [self.router] if self.router is not None else []
        errors = await asyncio.gather(
            *(process.stop() for process in (*routers, *self.servers.values())),
            *(member.client.close() for member in self.members),
            return_exceptions=True,  # one that fails does not keep the others
        )
        for error in errors:
            if error is not None:
                raise error

    def give_up_starting(self) -> None:
        """End servers that are not ready yet, for a run that has to save and stop soon."""

        async def kill_starting() -> None:
            for member in self.members:
                if member.state is State.STARTING:
                    self.servers[member.index].kill()
                    member.state, member.why = State.DOWN, "the run stops"

        self.control.run(kill_starting())

    def wanted(self) -> bool:
        """Whether all ranks are needed: an engine of this rank lacks weights, or was lost.

        Raises what ended the tending, such as EngineLost for one that cannot be started again.
        """
        for work in self._tending:
            if work.wait(0) and work.failed() is not None:
                raise work.failed()
        return self._news or any(self._lacks_weights(member) for member in self.members)

    def resync(self, version: int) -> None:
        """Give the engines that lack weights `version`, while the others go on (over all ranks)."""
        members = [member for member in self.members if self._lacks_weights(member)]
        self._give_weights(version, members)

    def sync(self, version: int) -> None:
        """Give every engine that answers `version` (collective over all ranks).

        Raises EngineError if the first sync of the run fails anywhere: then it is the set-up that
        is wrong. Later an engine that fails is left out, and brought back or given up while the
        others go on.
        """
        is_first, self.version = self.version < 0, version
        members = [member for member in self.members if member.state in ANSWERING]
        failed = self._give_weights(version, members)
        if is_first and failed:
            raise EngineError(
                "; ".join(f"engine {index}: {why}" for index, why in sorted(failed.items()))
            )

    def _give_weights(self, version: int, members: Sequence[Member]) -> dict[int, str]:
        """Push weights to all ranks' `members`; returns by engine why it did not take them."""
        self.control.run(self._lock_engines(members))
        try:
            # Under the locks: an engine that answered before them may have been lost meanwhile.
            self._news = False  # before the states are read: a loss after that sets it again
            statuses = gather_statuses(self.layout, self.members)
            ready = {member.index for member in members if member.state in ANSWERING}
            engines = gather_engines(self.layout, ready)
            failed = self.weights.push(version, engines) if engines else {}
            for member in members:
                if member.index in failed:
                    self._retry_at[member.index] = time.monotonic() + RETRY_SECONDS
                    self.log(
                        f"engine {member.index} ({member.address}) did not take the weights: "
                        f"{failed[member.index]}"
                    )
            if self.router is not None:
                self.control.run(self._route_to_serving(statuses, engines, failed))
            return failed
        finally:
            self.control.run(self._unlock_engines(members))

    def _lacks_weights(self, member: Member) -> bool:
        """Whether a resync should give this engine weights."""
        # After a failed sync a server of the run is started again; any other is tried once more.
        if member.state is State.QUARANTINED and member.index not in self.servers:
            return time.monotonic() >= self._retry_at.get(member.index, 0.0)
        return member.state is State.WAITING

    async def _lock_engines(self, members: Sequence[Member]) -> None:
        """Let nobody tend these engines until `_unlock_engines`: a paused one answers no probe."""
        # The one that probes holds the lock. An engine that has gone silent would keep the sync
        # waiting for the probe's whole time limit.
        for member in members:
            if member.index in self._probes:
                self._probes[member.index].cancel()
        # All at once: while one lock is waited for, no new probe of another engine may begin.
        await asyncio.gather(*(self._locks[member.index].acquire() for member in members))

    async def _unlock_engines(self, members: Sequence[Member]) -> None:
        for member in members:
            self._locks[member.index].release()

    async def _open_engine(self, member: Member) -> None:
        server = self.servers.get(member.index)
        if server is not None:
            await self._start_server(member, server)
        await check_identity(member, self._identity)
        member.state = State.WAITING  # it answers, with weights that are not the run's

    async def _start_server(self, member: Member, server: Server) -> None:
        while self.colocation is not None and not self.colocation.engines_turn:
            await asyncio.sleep(TEND_SECONDS)
        # No `await` between the turn and this state: who ends the turn waits for STARTING servers.
        member.state = State.STARTING
        server.start()
        if self.colocation is not None:
            self.colocation.started(member)
        await server.ready(member.client)

    async def _restore_from_snapshot(self, member: Member) -> bool:
        """Give the weights of the last snapshot on disk; False if they are not the run's.

        No other rank is needed for that.
        """
        async with self._locks[member.index]:
            await self.weights.restore_from_snapshot(member)
            # Nobody answered the last sync, or one goes on at this moment.
            if member.version != self.version:
                member.state = State.WAITING
                await member.client.pause()
                return False
            self.log(
                f"engine {member.index} ({member.address}) is back with the weights of the last "
                "snapshot"
            )
            if self.router is not None:
                await self._update_routes(joining={member.address})
            return True

    async def _tend(self, member: Member) -> None:
        """Watch one engine as long as the run lasts: probe it, mark it lost, recover it."""
        server = self.servers.get(member.index)
        silent_since: float | None = None
        while True:
            await asyncio.sleep(TEND_SECONDS)
            async with self._locks[member.index]:
                if member.state in ANSWERING and server is not None and not server.alive():
                    await self._mark_lost(member, str(server.death()))
                # Its weights are mixed, and a fresh start is the sure way out. An engine that
                # others started stays quarantined until a sync succeeds.
                elif member.state is State.QUARANTINED and server is not None:
                    await self._mark_lost(member, member.why)
                elif member.state is State.SERVING:
                    problem = await self._probe(member)
                    if problem is None:
                        silent_since = None
                    elif silent_since is None:
                        silent_since = time.monotonic()
                    elif time.monotonic() - silent_since > self.server_config.health_seconds:
                        await self._mark_lost(member, f"it does not generate any more ({problem})")
                if member.state is not State.SERVING:
                    silent_since = None
            # Without the lock: a start takes minutes, and a sync must not wait for it.
            if member.state is State.DOWN:
                await self._recover(member)

    async def _probe(self, member: Member) -> str | None:
        """What is wrong with a serving engine; None if nothing is, or if a sync ended the probe."""
        limit = min(PROBE_SECONDS, self.server_config.health_seconds)
        # A task of its own, which `_lock_engines` can cancel without cancelling the tending.
        probe = self._probes[member.index] = asyncio.ensure_future(
            self._ask_for_token(member, limit)
        )
        try:
            await asyncio.wait({probe})
            if probe.cancelled() or probe.exception() is None:
                return None
            if isinstance(probe.exception(), EngineError):
                return str(probe.exception())
            raise probe.exception()
        finally:
            probe.cancel()
            del self._probes[member.index]

    async def _ask_for_token(self, member: Member, limit: float) -> None:
        await member.client.healthy(limit)
        # One that answers need not be the one that was given the weights.
        version = await member.client.version()
        if version != str(member.version):
            await self._mark_lost(
                member, f"somebody else started it again: its weight version is {version}"
            )

    async def _mark_lost(self, member: Member, why: str) -> None:
        self.log(f"engine {member.index} ({member.address}) is lost: {why}")
        member.state, member.why, member.version = State.DOWN, why, None
        self._news = self.router is None  # then the chief hears of it at a resync
        if self.router is not None:
            await self._update_routes(leaving={member.address})
        if member.index in self.servers:
            self.servers[member.index].kill()

    async def _recover(self, member: Member) -> None:
        """Start a server of the run again, or see whether another answers again.

        It then waits for weights, paused. Raises EngineLost when it was started too often.
        """
        server = self.servers.get(member.index)
        try:
            if server is not None:
                # A sync that it did not answer may have found it lost, though it runs.
                server.kill()
                limit = self.server_config.restarts
                if self._restarts[member.index] >= limit:
                    raise EngineLost(
                        f"engine {member.index} ({member.address}) was started again {limit} times "
                        f"(rollout.server.restarts) and is lost once more: {member.why}"
                    )
                self._restarts[member.index] += 1
                await self._start_server(member, server)
            else:  # it may be paused by a sync that failed, and generate nothing
                await check_identity(member, self._identity)
            await member.client.pause()
            # Where engines take turns with the actor, only a sync knows whether the turn is theirs.
            can_restore = self.weights.can_restore and self.colocation is None
            if can_restore and await self._restore_from_snapshot(member):
                return
        except EngineLost:
            raise
        except EngineError as error:
            member.state, member.why = State.DOWN, str(error)
            if server is not None:
                server.kill()
            await asyncio.sleep(RETRY_SECONDS)
            return
        member.state = State.WAITING
        self.log(f"engine {member.index} ({member.address}) is back and waits for weights")

    async def _route_to_serving(
        self, statuses: Sequence[EngineStatus], engines: set[int], failed: Mapping[int, str]
    ) -> None:
        """Have the router send requests to the engines that serve after a sync, and to no others.

        It is told about every engine again: on other ranks some may have been lost or come back
        since the last sync, of which this rank hears only here.
        """
        # On the control loop and without an `await` in between: an engine of this rank that is lost
        # meanwhile would be joined again.
        serving = addresses_in_service(statuses, self.members, engines, failed)
        others = {status.address for status in statuses} - serving
        await self._update_routes(joining=serving, leaving=others)

    async def _update_routes(
        self, *, joining: Set[str] = frozenset(), leaving: Set[str] = frozenset()
    ) -> None:
        # Changed in place: `_tell_router` may be at work, and goes on with what is right now.
        self._behind |= joining
        self._behind -= leaving
        self._told |= leaving  # it knows them, if telling it about them once failed half-way
        await self._tell_router()

    async def _tell_router(self) -> None:
        """Tell the router which engines belong behind it; what it does not take is tried again."""
        async with self._routing:
            try:
                await match_workers(self.router, self._told, self._behind)
                self._trouble = ""
            except EngineError as error:
                if self._trouble != str(error):
                    self._trouble = str(error)
                    self.log(f"sglang-router has not been told yet which engines serve: {error}")

    async def _tend_router(self) -> None:
        """Start the router again when it has died, and tell it what it has not been told."""
        while True:
            await asyncio.sleep(TEND_SECONDS)
            if not self.router.alive():
                self.log(f"{self.router.death()}; it is started again")
                async with self._routing:
                    try:
                        self.router.start()
                        await self.router.ready()
                    except EngineError as error:
                        raise EngineLost(str(error)) from error
                    self._told.clear()  # a new process knows no engine
            # At every look, not only then: a call of it may have failed before.
            await self._tell_router()
