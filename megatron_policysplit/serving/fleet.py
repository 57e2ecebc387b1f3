"""The SGLang engines of a run: started, watched, started again, and given the weights they lack.

Every rank has a `Fleet`; the rank that owns an engine (`placement.py`) tends it on the control
loop. What needs all ranks, weights for an engine that came back, is asked for through `wanted` and
done in `serve` (`control.Service`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Protocol

import torch.distributed as dist

from megatron_policysplit.config import ServerConfig
from megatron_policysplit.distributed.control import Control, Work
from megatron_policysplit.distributed.layout import Layout
from megatron_policysplit.errors import EngineError, EngineLost
from megatron_policysplit.serving.colocation import Colocation
from megatron_policysplit.serving.identity import Identity, check_identity
from megatron_policysplit.serving.members import Member, Placement, State
from megatron_policysplit.serving.router import Router
from megatron_policysplit.serving.servers import Server

TEND_SECONDS = 1.0
PROBE_SECONDS = 30.0
RETRY_SECONDS = 10.0
ANSWERING = (State.WAITING, State.SERVING, State.QUARANTINED)


class Weights(Protocol):
    """What is asked of `weight_sync.WeightSync`."""

    @property
    def can_restore(self) -> bool: ...
    def push(self, version: int, engines: set[int]) -> dict[int, str]: ...
    async def restore_from_snapshot(self, member: Member) -> None: ...


@dataclass(frozen=True)
class Sighting:
    """What a rank tells the others about an engine it owns."""

    index: int
    address: str
    state: State


@dataclass(frozen=True)
class EngineSet:
    """The engines of a run as one rank has them, before anything is started."""

    placements: Sequence[Placement]  # of all engines, the same on every rank
    members: Sequence[Member]  # the engines that this rank owns
    servers: Mapping[int, Server]  # by engine, those of them that the run starts itself
    router: Router | None  # on the chief, where there are several engines
    identity: Identity | None  # what an engine must be to serve this run; None without members


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
        """Start this rank's servers and wait until each has generated; raises EngineError for the
        first that cannot.
        """
        tasks = [asyncio.ensure_future(self._open(member)) for member in self.members]
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
        """End what this rank started; engines that were given keep what they serve."""
        for work in self._tending:
            work.cancel()
        self.control.run(self._close())

    async def _close(self) -> None:
        ours = [self.router] if self.router is not None else []
        ends = await asyncio.gather(
            *(process.stop() for process in (*ours, *self.servers.values())),
            *(member.client.close() for member in self.members),
            return_exceptions=True,  # one that fails does not keep the others
        )
        for end in ends:
            if end is not None:
                raise end

    def give_up_starting(self) -> None:
        """End servers that are not ready yet, for a run that has to save and stop soon."""

        async def end() -> None:
            for member in self.members:
                if member.state is State.STARTING:
                    self.servers[member.index].kill()
                    member.state, member.why = State.DOWN, "the run stops"

        self.control.run(end())

    def wanted(self) -> bool:
        """Whether an engine of this rank lacks weights, or was lost; EngineError when one cannot be
        brought back.
        """
        for work in self._tending:
            if work.wait(0) and work.failed() is not None:
                raise work.failed()
        return self._news or any(self._lacks_weights(member) for member in self.members)

    def resync(self, version: int) -> None:
        """Give the engines that lack weights `version`, while the others go on (over all ranks)."""
        self._give(version, [member for member in self.members if self._lacks_weights(member)])

    def sync(self, version: int) -> None:
        """Weights for every engine that answers (collective over all ranks).

        Raises EngineError if the first sync of the run fails anywhere: then it is the set-up that
        is wrong. Later an engine that fails is left out, and brought back or given up while the
        others go on.
        """
        first, self.version = self.version < 0, version
        failed = self._give(
            version, [member for member in self.members if member.state in ANSWERING]
        )
        if first and failed:
            raise EngineError(
                "; ".join(f"engine {index}: {why}" for index, why in sorted(failed.items()))
            )

    def _give(self, version: int, members: Sequence[Member]) -> dict[int, str]:
        self.control.run(self._hold(members))
        try:
            seen = (
                self._sightings()
            )  # under the locks: what had been waiting may have been lost meanwhile
            mine = {member.index for member in members if member.state in ANSWERING}
            engines = {index for part in self._gather(mine) for index in part}
            failed = self.weights.push(version, engines) if engines else {}
            for member in members:
                if member.index in failed:
                    self._retry_at[member.index] = time.monotonic() + RETRY_SECONDS
                    self.log(
                        f"engine {member.index} ({member.address}) did not take the weights: "
                        f"{failed[member.index]}"
                    )
            if self.router is not None:
                self.control.run(self._reroute(seen, engines, failed))
            return failed
        finally:
            self.control.run(self._release(members))

    def _sightings(self) -> list[Sighting]:
        self._news = False
        mine = [Sighting(member.index, member.address, member.state) for member in self.members]
        return [sighting for part in self._gather(mine) for sighting in part]

    def _gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * dist.get_world_size(self.layout.world)
        dist.all_gather_object(values, value, group=self.layout.world)
        return values

    def _lacks_weights(self, member: Member) -> bool:
        """Ours are started again after a failed sync; one that was given is tried again after a
        while.
        """
        if member.state is State.QUARANTINED and member.index not in self.servers:
            return time.monotonic() >= self._retry_at.get(member.index, 0.0)
        return member.state is State.WAITING

    async def _hold(self, members: Sequence[Member]) -> None:
        """Nobody tends these engines until `_release`: a paused engine answers no probe."""
        for member in members:
            if member.index in self._probes:
                self._probes[member.index].cancel()
        # All at once: while one is waited for, no new probe of another may begin.
        await asyncio.gather(*(self._locks[member.index].acquire() for member in members))

    async def _release(self, members: Sequence[Member]) -> None:
        for member in members:
            self._locks[member.index].release()

    async def _open(self, member: Member) -> None:
        server = self.servers.get(member.index)
        if server is not None:
            await self._start(member, server)
        await check_identity(member, self._identity)
        member.state = State.WAITING

    async def _start(self, member: Member, server: Server) -> None:
        while self.colocation is not None and not self.colocation.engines_turn:
            await asyncio.sleep(TEND_SECONDS)
        member.state = State.STARTING
        server.start()
        if self.colocation is not None:
            self.colocation.started(member)
        await server.ready(member.client)

    async def _restore(self, member: Member) -> bool:
        """Weights from the last snapshot on disk, for which no other rank is needed; whether they
        are the run's.
        """
        async with self._locks[member.index]:
            await self.weights.restore_from_snapshot(member)
            if (
                member.version != self.version
            ):  # nobody answered the last sync, or one goes on at this moment
                member.state = State.WAITING
                await member.client.pause()
                return False
            self.log(
                f"engine {member.index} ({member.address}) is back with the weights of the last "
                "snapshot"
            )
            if self.router is not None:
                await self._route(joining={member.address})
            return True

    async def _tend(self, member: Member) -> None:
        """As long as the run lasts."""
        server = self.servers.get(member.index)
        silent_since: float | None = None
        while True:
            await asyncio.sleep(TEND_SECONDS)
            async with self._locks[member.index]:
                if member.state in ANSWERING and server is not None and not server.alive():
                    await self._lose(member, str(server.death()))
                elif member.state is State.QUARANTINED and server is not None:
                    await self._lose(member, member.why)
                elif member.state is State.SERVING:
                    problem = await self._probe(member)
                    if problem is None:
                        silent_since = None
                    elif silent_since is None:
                        silent_since = time.monotonic()
                    elif time.monotonic() - silent_since > self.server_config.health_seconds:
                        await self._lose(member, f"it does not generate any more ({problem})")
                if member.state is not State.SERVING:
                    silent_since = None
            if member.state is State.DOWN:
                await self._bring_back(member)

    async def _probe(self, member: Member) -> str | None:
        """What is wrong with a serving engine; None if nothing is, or if a sync would not wait for
        the answer.
        """
        limit = min(PROBE_SECONDS, self.server_config.health_seconds)
        probe = self._probes[member.index] = asyncio.ensure_future(self._ask(member, limit))
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

    async def _ask(self, member: Member, limit: float) -> None:
        await member.client.healthy(limit)
        version = await member.client.version()
        if version != str(member.version):
            await self._lose(
                member, f"somebody else started it again: its weight version is {version}"
            )

    async def _lose(self, member: Member, why: str) -> None:
        self.log(f"engine {member.index} ({member.address}) is lost: {why}")
        member.state, member.why, member.version = State.DOWN, why, None
        self._news = self.router is None
        if self.router is not None:
            await self._route(leaving={member.address})
        if member.index in self.servers:
            self.servers[member.index].kill()

    async def _bring_back(self, member: Member) -> None:
        """Start our own again, or see whether one that was given answers again; it then waits,
        paused, for weights.
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
                await self._start(member, server)
            else:  # it may be paused by a sync that failed, and generate nothing
                await check_identity(member, self._identity)
            await member.client.pause()
            # Where engines take turns with the actor, only a sync knows whether the turn is theirs.
            if self.weights.can_restore and self.colocation is None and await self._restore(member):
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

    async def _reroute(
        self, seen: Sequence[Sighting], engines: set[int], failed: Mapping[int, str]
    ) -> None:
        """After a sync of `engines`: the router sends requests to those that serve, and to no
        others.

        seen: all engines before it. Of its own engines this rank knows how they stand now.
        """
        own = {member.index: member.state for member in self.members}
        states = {sighting.index: sighting.state for sighting in seen}
        states |= {
            index: State.QUARANTINED if index in failed else State.SERVING for index in engines
        } | own
        serving = {sighting.address for sighting in seen if states[sighting.index] is State.SERVING}
        await self._route(
            joining=serving, leaving={sighting.address for sighting in seen} - serving
        )

    async def _route(
        self, *, joining: Set[str] = frozenset(), leaving: Set[str] = frozenset()
    ) -> None:
        self._behind = (self._behind | joining) - leaving
        self._told |= leaving  # it knows them, if telling it about them once failed half-way
        await self._tell_router()

    async def _tell_router(self) -> None:
        """Let the router know the engines that belong behind it; what it does not take now is tried
        again.
        """
        async with self._routing:
            try:
                while self._told != self._behind:
                    if lost := self._told - self._behind:
                        await self.router.remove(address := lost.pop())
                        self._told.discard(address)
                    else:
                        await self.router.add(address := (self._behind - self._told).pop())
                        self._told.add(address)
                self._trouble = ""
            except EngineError as error:
                if self._trouble != str(error):
                    self._trouble = str(error)
                    self.log(f"sglang-router has not been told yet which engines serve: {error}")

    async def _tend_router(self) -> None:
        """A router that died is started again in front of the engines that belong behind it."""
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
                    self._told = set()
            await self._tell_router()
