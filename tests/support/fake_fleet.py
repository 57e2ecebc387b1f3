"""Engines, their processes, a router and a weight sync that only remember, for tests of the fleet that tends them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch.distributed as dist

from megatron_policysplit.config import Config
from megatron_policysplit.distributed.control import Control
from megatron_policysplit.distributed.layout import Layout
from megatron_policysplit.distributed.stop_signal import StopSignal
from megatron_policysplit.errors import EngineError
from megatron_policysplit.rollout.sglang_http import EngineTimedOut, EngineUnreachable
from megatron_policysplit.serving import fleet as fleets
from megatron_policysplit.serving.fleet import EngineSet, Fleet
from megatron_policysplit.serving.identity import PROBE, Identity
from megatron_policysplit.serving.members import Member, Placement, State
from tests.support.fake_weights import FakeWeights

PAUSES = {"TEND_SECONDS": 0.02, "RETRY_SECONDS": 0.2, "PROBE_SECONDS": 0.1}
HEALTH_SECONDS = 0.3
HEARTBEAT_SECONDS = 0.02
IDENTITY = Identity("qwen3", [1, 2, 3], 100)


@dataclass
class FakeEngine:
    """What runs behind an address. generates: whether it answers a probe; `probing` counts those who wait for that."""

    index: int
    log: list[str]
    running: bool = True
    generates: bool = True
    paused: bool = False
    version: str = "default"
    model_type: str = "qwen3"
    tokens: tuple[int, ...] = (1, 2, 3)
    context: int | None = 4096
    probes: int = 0
    probing: int = 0

    @property
    def address(self) -> str:
        return f"http://engine-{self.index}"

    def begin(self, version: str) -> None:
        self.running, self.generates, self.paused, self.version = True, True, False, version


class FakeClient:
    """Speaks like SglangClient."""

    def __init__(self, engine: FakeEngine):
        self.engine, self.address, self.closed = engine, engine.address, False

    async def _answer(self, what: str | None = None) -> None:
        await asyncio.sleep(0)
        if not self.engine.running:
            raise EngineUnreachable(f"{self.address} did not answer")
        if what is not None:
            self.engine.log.append(f"{what} {self.engine.index}")

    async def healthy(self, timeout_seconds: float) -> None:
        await self._answer()
        self.engine.probes += 1
        self.engine.probing += 1
        try:
            if not self.engine.generates or self.engine.paused:
                await asyncio.sleep(timeout_seconds)
                raise EngineTimedOut(f"{self.address} did not answer in {timeout_seconds:g} s")
        finally:
            self.engine.probing -= 1

    async def version(self) -> str:
        await self._answer()
        return self.engine.version

    async def pause(self) -> None:
        await self._answer("pause")
        self.engine.paused = True

    async def model_info(self) -> dict:
        await self._answer("identity")
        return {"model_type": self.engine.model_type, "model_path": "/models/other"}

    async def tokenize(self, text: str) -> list[int]:
        await self._answer()
        assert text == PROBE
        return list(self.engine.tokens)

    async def call(self, method: str, path: str) -> dict:
        await self._answer()
        assert (method, path) == ("GET", "/v1/models")
        return {"data": [{"max_model_len": self.engine.context}]}

    async def server_info(self) -> dict:
        await self._answer()
        return {"tp_size": 2, "dtype": "torch.bfloat16"}

    async def close(self) -> None:
        self.closed = True


class FakeProcess:
    """What servers and routers have in common. failing: errors of the next starts; ready_when: holds `ready` back."""

    def __init__(self, name: str, log: list[str]):
        self.name, self.log = name, log
        self.starts = 0
        self.up = self.stopped = False
        self.failing: list[Exception] = []
        self.ready_when: Callable[[], bool] = lambda: True
        self.stop_fails: Exception | None = None

    def alive(self) -> bool:
        return self.up

    def death(self) -> EngineError:
        return EngineError(f"{self.name} was killed by SIGKILL")

    def start(self) -> None:
        assert not self.up and not self.stopped
        self.starts += 1
        self.log.append(f"start {self.name}")
        self.up = True

    async def _ready(self) -> None:
        await asyncio.sleep(0.01)
        while not self.ready_when():
            if not self.up:
                raise self.death()
            await asyncio.sleep(0.005)
        if self.failing:
            self.up = False
            raise self.failing.pop(0)
        if not self.up:
            raise self.death()

    def kill(self) -> None:
        self.up = False

    async def stop(self) -> None:
        await asyncio.sleep(0.02)
        self.up, self.stopped = False, True
        self.log.append(f"stop {self.name}")
        if self.stop_fails is not None:
            raise self.stop_fails


class FakeServer(FakeProcess):
    """Speaks like Server; its engine lives and dies with it."""

    def __init__(self, engine: FakeEngine):
        super().__init__(str(engine.index), engine.log)
        self.engine, self.address = engine, engine.address
        engine.running = False

    def kill(self) -> None:
        super().kill()
        self.engine.running = False

    async def ready(self, client: FakeClient) -> None:
        assert client.engine is self.engine
        await self._ready()
        self.engine.begin(f"start-{self.starts}")


class FakeRouter(FakeProcess):
    """Speaks like Router. workers: who is behind it; it forgets them when it dies. failing_calls: of add and remove."""

    def __init__(self, log: list[str]):
        super().__init__("router", log)
        self.address = "http://router"
        self.workers: set[str] = set()
        self.failing_calls: list[Exception] = []
        self.delay = 0.0
        self.answers = False

    def kill(self) -> None:
        super().kill()
        self.workers, self.answers = set(), False

    async def ready(self) -> None:
        await self._ready()
        self.answers = True

    async def add(self, address: str) -> None:
        await self._answer()
        if address not in self.workers:
            self.log.append(f"add {address[-1]}")
            self.workers.add(address)

    async def remove(self, address: str) -> None:
        await self._answer()
        if address in self.workers:
            self.log.append(f"remove {address[-1]}")
            self.workers.remove(address)

    async def _answer(self) -> None:
        await asyncio.sleep(self.delay)
        if not self.answers:
            raise EngineUnreachable("http://router/workers did not answer")
        if self.failing_calls:
            raise self.failing_calls.pop(0)


@dataclass
class Turns:
    """Speaks like Colocation, as far as the fleet asks."""

    engines_turn: bool = True
    restarted: list[int] = field(default_factory=list)

    def started(self, member: Member) -> None:
        self.restarted.append(member.index)


@dataclass
class Rig:
    """A fleet on one rank and all that it deals with; the service that a run's rollouts are.

    log: what happened to engines and router, in order. told: the versions that a RESYNC gave. actor_version: of the
    weights that the actor has; None: those of the last sync.
    """

    fleet: Fleet
    control: Control
    weights: FakeWeights
    servers: dict[int, FakeServer]
    engines: dict[int, FakeEngine]
    router: FakeRouter | None
    log: list[str]
    said: list[str]
    told: list[int] = field(default_factory=list)
    actor_version: int | None = None

    def wanted(self) -> bool:
        return self.fleet.wanted()

    def serve(self) -> None:
        version = self.fleet.version if self.actor_version is None else self.actor_version
        self.fleet.resync(version)
        self.told.append(version)

    @property
    def members(self) -> list[Member]:
        return self.fleet.members

    def open(self) -> None:
        self.control.attend(self.fleet.open() if self.fleet.members or self.fleet.router else None)

    def attend(self, condition: Callable[[], bool] | None) -> None:
        """As while leaders generate, until the condition holds; for ranks without one, until the others are done."""
        self.control.attend(None if condition is None else until(condition), self)

    def tended(self) -> None:
        """Wait until every engine of this rank has been looked at several times."""
        self.control.run(asyncio.sleep(10 * fleets.TEND_SECONDS))

    def states(self) -> list[State]:
        return [member.state for member in self.members]

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """While nobody attends, so that no weights are given."""
        self.control.run(until(condition))

    def back(self, index: int = 0, version: int = 7) -> bool:
        """Whether an engine serves weights that it was given since the log was emptied."""
        return self.members[index].state is State.SERVING and f"weights {version} {index}" in self.log

    def of(self, index: int) -> list[str]:
        """What happened to one engine."""
        return [entry for entry in self.log if entry.endswith(f" {index}")]

    def close(self) -> None:
        self.fleet.close()
        self.control.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


def make_rig(
    layout: Layout,
    owners: Sequence[int],
    *,
    given: bool = False,
    router: bool | None = None,
    restarts: int = 3,
    turns: Turns | None = None,
) -> Rig:
    """owners: the rank of each engine. given: they run already. router: by default with several engines, as in a run.

    The caller shortens the fleet's pauses to PAUSES.
    """
    config = Config()
    config.rollout.server.health_seconds, config.rollout.server.restarts = HEALTH_SECONDS, restarts
    log, said = [], []
    placements = [Placement(index, owner, (owner,)) for index, owner in enumerate(owners)]
    mine = [placement for placement in placements if placement.owner == layout.rank]
    engines = {placement.index: FakeEngine(placement.index, log) for placement in mine}
    servers = {} if given else {index: FakeServer(engine) for index, engine in engines.items()}
    members = [Member(placement, FakeClient(engines[placement.index]), 1) for placement in mine]
    has_router = layout.is_chief and (len(owners) > 1 if router is None else router)
    front = FakeRouter(log) if has_router else None
    control = Control(layout.control, StopSignal(), HEARTBEAT_SECONDS)
    weights = FakeWeights(members, layout, log)
    engine_set = EngineSet(placements, members, servers, front, IDENTITY)
    fleet = Fleet(config.rollout.server, layout, control, engine_set, weights, said.append, colocation=turns)
    return Rig(fleet, control, weights, servers, engines, front, log, said)


def make_layout(rank: int, world_size: int, chief: int = 0) -> Layout:
    """Of a world whose process group exists; every rank leads a replica, the chief the first."""
    world = dist.group.WORLD
    leaders = [chief, *(rank for rank in range(world_size) if rank != chief)]
    return Layout(rank, 1, 1, world_size, 0, 0, leaders.index(rank), world, dist.new_group(), world, world, leaders)


@contextmanager
def world_of_one() -> Iterator[Layout]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield make_layout(0, 1)
    finally:
        dist.destroy_process_group()


@contextmanager
def rigs(layout: Layout, monkeypatch) -> Iterator[Callable[..., Rig]]:
    """build(engines, **options of make_rig) -> rig of one rank, closed at the end."""
    for name, seconds in PAUSES.items():
        monkeypatch.setattr(fleets, name, seconds)
    built: list[Rig] = []

    def build(engines: int = 2, **options) -> Rig:
        built.append(make_rig(layout, [0] * engines, **options))
        return built[-1]

    yield build
    for rig in built:
        rig.close()


def serving(rig: Rig) -> Rig:
    """Version 7 is served by all; what happened so far is forgotten."""
    rig.open()
    rig.fleet.sync(7)
    assert set(rig.states()) <= {State.SERVING}
    rig.log.clear()
    rig.weights.pushes.clear()
    return rig
