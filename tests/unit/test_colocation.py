"""The order in which memory changes hands, recorded on real gloo ranks with recording engines and actors."""

import asyncio
import contextlib
import functools
import re
import threading
import time
from dataclasses import dataclass, field
from datetime import timedelta

import pytest

from megatron_policysplit.errors import EngineError
from megatron_policysplit.rollout.sglang_http import EngineRefused, EngineUnreachable
from megatron_policysplit.serving.members import Member, State
from megatron_policysplit.serving.placement import place_engines
from tests.support.dist import run_distributed

ALL = ("kv_cache", "weights", "cuda_graph")
OFFLOADS = ["offload_optimizer", "offload_gradients", "offload_parameters"]
RESTORES = ["restore_parameters", "restore_gradients", "restore_optimizer"]
SYNC = ["pause", "resume weights", "begin", "bucket", "end", "resume kv_cache cuda_graph", "flush", "set", "continue"]
RELEASE = ["pause", "flush", "release kv_cache weights cuda_graph"]
GIB = 2**30
# What goes wrong when a turn of the engines ends: engine or "rank N" -> attributes; and what every rank then says.
FAILURES = {
    "it refuses": ({1: {"fails": {RELEASE[-1]: "no memory saver"}}}, "engine 1 .*no memory saver"),
    "it does not answer": ({1: {"fails": {"pause": "silence"}}}, "engine 1 .*did not answer"),
    "it never is idle": ({1: {"busy": 10**6}}, "engine 1 .*pending requests"),
    "both": ({number: {"fails": {"flush": "silence"}} for number in (0, 1)}, "engine [01] .*did not answer"),
    "a defect": ({1: {"busy": "no number"}}, "unsupported operand type"),
    "it only says so": ({"rank 3": {"free": [6 * GIB]}}, r"GPU of rank 3 has 6\.00 GiB .* actor needs 40\.00 GiB"),
}


@dataclass
class Log:
    """(begin, end, who, what) of every call; the clock is the machine's, so that the logs of ranks can be merged."""

    entries: list = field(default_factory=list)

    @contextlib.contextmanager
    def of(self, who, what):
        began = time.monotonic_ns()
        yield
        self.entries.append((began, time.monotonic_ns(), who, what))

    def calls(self, who):
        return [what for _, _, name, what in sorted(self.entries) if name == who]


class RecordingEngine:
    """Speaks like SglangClient. Asserts on what kills SGLang: a release while busy, a release or resume twice.

    busy: how many flushes it refuses. fails: call -> what it says; "silence" is no answer, all else a refusal.
    """

    def __init__(self, index, log, delay=0.0):
        self.address, self.who, self.log, self.delay = f"http://engine-{index}", f"engine {index}", log, delay
        self.held, self.busy, self.fails = set(ALL), 0, {}
        self.paused = self.flushed = False

    async def _call(self, what):
        with self.log.of(self.who, what):
            await asyncio.sleep(self.delay)
            if self.fails.get(what) == "silence":
                raise EngineUnreachable(f"{self.address} did not answer")
            if what in self.fails:
                raise EngineRefused(f"{self.address} answered 400: {self.fails[what]}", 400)

    async def pause(self):
        self.paused = True
        await self._call("pause")

    async def flush(self):
        if self.busy:
            self.busy -= 1
            await self._call("flush refused")
            raise EngineRefused(f"{self.address} answered 400: pending requests", 400)
        await self._call("flush")
        self.flushed = True

    async def release_memory(self, tags):
        assert self.paused and self.flushed, "an engine that is not idle dies of a release"
        assert set(tags) <= self.held, f"{self.who} does not hold {tags}"
        await self._call("release " + " ".join(tags))
        self.held -= set(tags)

    async def resume_memory(self, tags):
        assert self.paused and not self.held & set(tags), f"{self.who} holds {tags}"
        await self._call("resume " + " ".join(tags))
        self.held |= set(tags)

    async def load(self, colocation, member):
        """What the weight sync does with an engine, in its order."""
        await self.pause()
        await colocation.before_load(member)
        assert "weights" in self.held
        for what in ("begin", "bucket", "end"):
            await self._call(what)
        await colocation.after_load(member)
        assert self.held == set(ALL)
        await self.flush()
        await self._call("set")
        await self._call("continue")
        self.paused = self.flushed = False
        member.state = State.SERVING


class RecordingActor:
    """Speaks like Offload. free: what free_bytes answers one after another, the last for good."""

    def __init__(self, rank, log, *, delay=0.0, free=(1e12,)):
        self.rank, self.log, self.delay, self.free = rank, log, delay, list(free)

    bytes_away = 40 * 2**30

    def free_bytes(self):
        return self.free.pop(0) if len(self.free) > 1 else self.free[0]

    def __getattr__(self, name):
        if name not in OFFLOADS + RESTORES:
            raise AttributeError(name)

        def call():
            with self.log.of(f"rank {self.rank}", name):
                time.sleep(self.delay)

        return call


# --- on several ranks --------------------------------------------------------------------------------


def build(rank, world, tensor, log, actor):
    import torch.distributed as dist

    from megatron_policysplit.distributed.control import Control
    from megatron_policysplit.distributed.layout import Layout
    from megatron_policysplit.distributed.stop_signal import StopSignal
    from megatron_policysplit.serving.colocation import Colocation

    control = Control(dist.group.WORLD, StopSignal())
    layout = Layout(rank, 1, 1, world, 0, 0, rank, dist.group.WORLD, dist.group.WORLD, None, None, list(range(world)))
    members = [
        Member(placement, RecordingEngine(placement.index, log), tensor, State.WAITING)
        for placement in place_engines(world, 0, count=None, tensor=tensor, colocated=True)
        if placement.owner == rank
    ]
    limits = {"start_seconds": 60.0, "release_seconds": 0.5, "settle_seconds": 0.3}
    return Colocation(actor, members, control, layout, **limits)


def run_rank(rank, world, tensor, scenarios):
    """Two cycles of each scenario, whose troubles (engine or "rank N" -> attributes) begin when the second one ends."""
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    outcomes = {}
    for name, troubles in scenarios.items():
        log = Log()
        slow = name == "none"  # the order of calls is compared there alone
        actor = RecordingActor(rank, log, delay=0.15 if slow and rank == world - 1 else 0.0)
        colocation = build(rank, world, tensor, log, actor)
        ending = "done"
        try:
            for cycle in range(2):
                colocation.to_generation()
                for member in colocation.members:
                    member.client.delay = 0.1 if slow and member.index == 0 else 0.0
                    load(colocation, member)
                    vars(member.client).update(troubles.get(member.index, {}) if cycle else {})
                vars(actor).update(troubles.get(f"rank {rank}", {}) if cycle else {})
                colocation.layout.barrier()  # generation ends
                colocation.to_training()
        except Exception as error:
            ending = str(error)
        colocation.control.close()
        dist.barrier()
        states = [member.state for member in colocation.members]
        outcomes[name] = Outcome(log.entries, ending, states, colocation.engines_turn)
    dist.destroy_process_group()
    return outcomes


def load(colocation, member):
    colocation.control.run(member.client.load(colocation, member))


@dataclass
class Outcome:
    """Of one rank."""

    entries: list
    ending: str
    states: list
    engines_turn: bool


@functools.cache
def run_ranks(world, tensor):
    """scenario -> each rank's Outcome."""
    scenarios = {"none": {0: {"busy": 2}}} | {name: troubles for name, (troubles, _) in FAILURES.items()}
    if world < 4:
        scenarios = {"none": scenarios["none"]}
    outcomes = run_distributed(run_rank, world, world, tensor, scenarios)
    return {name: [outcome[name] for outcome in outcomes] for name in scenarios}


def merged(outcomes):
    return Log([entry for outcome in outcomes for entry in outcome.entries])


def spans(log, who, what):
    return [(began, ended) for began, ended, name, call in sorted(log.entries) if (name, call) == (who, what)]


@pytest.mark.parametrize(("world", "tensor"), [(4, 2), (2, 1)])
def test_the_order_over_ranks_and_engines(world, tensor):
    """The last rank is slow to make room and the first engine slow to release: the others wait for them."""
    engines = place_engines(world, 0, count=None, tensor=tensor, colocated=True)
    outcomes = run_ranks(world, tensor)["none"]
    log = merged(outcomes)
    for rank in range(world):
        assert log.calls(f"rank {rank}") == (OFFLOADS + RESTORES) * 2
    # A server is started with all of its memory: only from the second time on is there something to resume.
    for placement in engines:
        refused = ["flush refused"] * 2 if placement.index == 0 else []
        started = [call for call in SYNC if not call.startswith("resume")]
        last = [RELEASE[0], *refused, *RELEASE[1:]]
        assert log.calls(f"engine {placement.index}") == started + RELEASE + SYNC + last
    for rank, outcome in enumerate(outcomes):
        assert (outcome.ending, outcome.engines_turn) == ("done", False)
        assert outcome.states == [State.WAITING for placement in engines if placement.owner == rank]

    for cycle in range(2):
        room = [spans(log, f"rank {rank}", "offload_parameters")[cycle][1] for rank in range(world)]
        back = [spans(log, f"rank {rank}", "restore_parameters")[cycle][0] for rank in range(world)]
        for placement in engines:
            engine = f"engine {placement.index}"
            first_use = spans(log, engine, "resume weights")[0] if cycle else spans(log, engine, "begin")[0]
            release = spans(log, engine, RELEASE[-1])[cycle]
            assert max(room[rank] for rank in placement.ranks) < first_use[0]
            assert release[1] < min(back[rank] for rank in placement.ranks)


@pytest.mark.parametrize("name", FAILURES)
def test_an_engine_that_does_not_release_stops_every_rank(name):
    """No rank restores anything over it, and none hangs."""
    outcomes = run_ranks(4, 2)[name]
    for rank, outcome in enumerate(outcomes):
        assert re.search(FAILURES[name][1], outcome.ending), (rank, outcome.ending)
        assert not outcome.engines_turn
        assert merged(outcomes).calls(f"rank {rank}") == OFFLOADS + RESTORES + OFFLOADS


# --- on one rank -------------------------------------------------------------------------------------


@pytest.fixture
def alone():
    """build(**options of RecordingActor) -> colocation, member, log; of one engine."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    opened = []

    def make(**options):
        log = Log()
        colocation = build(0, 1, 1, log, RecordingActor(0, log, **options))
        opened.append(colocation)
        return colocation, colocation.members[0], log

    yield make
    for colocation in opened:
        colocation.control.close()
    dist.destroy_process_group()


def test_calls_out_of_turn(alone):
    colocation, member, log = alone()
    with pytest.raises(RuntimeError, match="are not the engines'"):
        colocation.to_training()
    with pytest.raises(RuntimeError, match="engine 0 may not take the GPUs"):
        colocation.control.run(colocation.before_load(member))
    assert log.entries == []
    assert not colocation.engines_turn
    colocation.to_generation()
    assert colocation.engines_turn
    with pytest.raises(RuntimeError, match="the engines' already"):
        colocation.to_generation()
    assert log.calls("rank 0") == OFFLOADS


def test_an_engine_started_again_resumes_nothing_and_releases_all(alone):
    """It died and was started while engines had their turn; RESYNC loads it, and the turn ends as ever."""
    colocation, member, log = alone()
    for _ in range(2):
        colocation.to_generation()
        load(colocation, member)
        colocation.to_training()
    colocation.to_generation()
    member.client.held = set(ALL)
    colocation.started(member)
    log.entries.clear()
    load(colocation, member)
    assert log.calls("engine 0") == [call for call in SYNC if not call.startswith("resume")]
    colocation.to_training()
    assert log.calls("engine 0")[-3:] == RELEASE
    assert member.client.held == set()


def test_an_engine_that_nobody_loaded_has_nothing_more_to_release(alone):
    """A stop signal between two turns' beginnings and the load."""
    colocation, member, log = alone()
    colocation.to_generation()
    load(colocation, member)
    colocation.to_training()
    colocation.to_generation()
    colocation.to_training()
    assert log.calls("engine 0")[-2:] == ["pause", "flush"]
    assert log.calls("rank 0") == (OFFLOADS + RESTORES) * 2


@pytest.mark.parametrize("state", [State.DOWN, State.STARTING, State.QUARANTINED])
def test_a_dead_engine_holds_nothing(alone, state):
    """Nobody talks to it; one that is being started or stopped is waited for."""
    colocation, member, log = alone()
    colocation.to_generation()
    member.state = state
    change = threading.Timer(0.3, lambda: setattr(member, "state", State.DOWN))
    change.start()
    colocation.to_training()
    change.join()
    assert log.calls("engine 0") == []
    assert log.calls("rank 0") == OFFLOADS + RESTORES


def test_an_engine_that_is_starting_is_waited_for_and_released(alone):
    colocation, member, log = alone()
    colocation.to_generation()
    member.state = State.STARTING
    change = threading.Timer(0.3, lambda: setattr(member, "state", State.WAITING))
    change.start()
    colocation.to_training()
    change.join()
    assert log.calls("engine 0") == RELEASE


def test_an_engine_that_never_starts_is_an_error(alone):
    colocation, member, log = alone()
    colocation.to_generation()
    member.state, colocation.start_seconds = State.STARTING, 0.5
    with pytest.raises(EngineError, match=r"engine 0 \(http://engine-0\) is starting after 0.5 s and still holds"):
        colocation.to_training()
    assert log.calls("rank 0") == OFFLOADS


def test_an_engine_that_dies_while_it_releases_is_no_error(alone):
    """Its memory is free all the same; who tends it finds it dead a moment later."""
    colocation, member, log = alone()
    colocation.to_generation()
    load(colocation, member)
    member.client.fails, colocation.settle_seconds = {"flush": "silence"}, 60.0
    change = threading.Timer(0.1, lambda: setattr(member, "state", State.DOWN))
    change.start()
    colocation.to_training()
    change.join()
    assert member.state is State.DOWN
    assert log.calls("rank 0") == OFFLOADS + RESTORES


def test_an_early_answer_is_not_believed(alone):
    """The engine answered, but its GPU has the memory only a few looks later; and not just as much as is needed."""
    colocation, member, log = alone(free=[free * GIB for free in (70, 5, 5, 30, 45, 45, 64, 65)])
    colocation.settle_seconds = colocation.release_seconds = 60.0
    colocation.to_generation()
    load(colocation, member)
    colocation.to_training()
    assert colocation.offload.free == [65 * GIB]  # it stopped looking at 64
    assert log.calls("rank 0") == OFFLOADS + RESTORES


def test_enough_memory_is_enough_after_a_moment(alone):
    """An engine may keep more than it had before; only what the actor needs must come back."""
    colocation, member, log = alone(free=[70 * GIB, 5 * GIB, 41 * GIB])
    colocation.to_generation()
    load(colocation, member)
    colocation.to_training()
    assert log.calls("rank 0") == OFFLOADS + RESTORES


def test_nothing_is_waited_for_where_memory_is_not_shared(alone):
    colocation, member, log = alone(free=[float("inf")])
    colocation.settle_seconds = 1e6
    colocation.to_generation()
    load(colocation, member)
    colocation.to_training()
    assert log.calls("rank 0") == OFFLOADS + RESTORES
