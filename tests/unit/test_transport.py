"""The interface of a transport: those of the project satisfy it, and another one takes an entry in a table."""

import inspect
from dataclasses import dataclass, fields
from typing import get_type_hints

import pytest
import torch.distributed as dist

from megatron_policysplit.config import Config, WeightSyncConfig
from megatron_policysplit.distributed.control import Control
from megatron_policysplit.distributed.layout import Layout
from megatron_policysplit.distributed.stop_signal import StopSignal
from megatron_policysplit.errors import EngineError
from megatron_policysplit.rollout.sglang_http import EngineRefused
from megatron_policysplit.serving.members import Member, Placement, State
from megatron_policysplit.weight_sync import WeightSync, sync, sync_settings
from megatron_policysplit.weight_sync.disk import DiskSnapshot
from megatron_policysplit.weight_sync.outcome import Failure
from megatron_policysplit.weight_sync.transport import Snapshot, Transport, TransportContext

METHODS = [name for name, _ in inspect.getmembers(Transport, inspect.isfunction) if not name.startswith("_")]


def signature(function) -> list:
    """The parameters, named and annotated; what comes back may be narrower."""
    return [(parameter.name, parameter.annotation) for parameter in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("name", sync.TRANSPORTS)
def test_every_transport_satisfies_the_protocol(name):
    transport = sync.TRANSPORTS[name]
    assert METHODS == ["close", "send"]
    for method in METHODS:
        assert signature(getattr(transport, method)) == signature(getattr(Transport, method))
        assert inspect.iscoroutinefunction(getattr(transport, method)) is False
    assert signature(transport.__init__)[1:] == [("context", "TransportContext")]
    assert get_type_hints(Transport).keys() == {"has_session", "snapshot"}
    assert isinstance(transport.has_session, bool)
    assert transport.snapshot is None  # before the first push


def test_the_snapshot_of_a_transport_satisfies_its_protocol():
    assert signature(DiskSnapshot.load) == signature(Snapshot.load)
    assert inspect.iscoroutinefunction(DiskSnapshot.load)
    assert "version" in {field.name for field in fields(DiskSnapshot)}


def test_the_table_has_what_the_configuration_offers():
    (transport,) = [field for field in fields(WeightSyncConfig) if field.name == "transport"]
    assert tuple(sync.TRANSPORTS) == tuple(transport.metadata["choices"])


# --- a transport that is not in the project ------------------------------------------------------------


@dataclass
class Pigeon:
    """A transport. refuses: engines that take nothing from it."""

    context: TransportContext
    has_session: bool = True
    snapshot: Snapshot | None = None
    refuses: tuple[int, ...] = ()
    closed: bool = False

    def send(self, version: int, live: set[int]) -> dict[int, Failure]:
        for engine in live - set(self.refuses):
            self.context.members[engine].client.calls.append(f"weights {version}")
        self.snapshot = Seed(version)
        return {engine: Failure("it shot the pigeon") for engine in live & set(self.refuses)}

    def close(self) -> None:
        self.closed = True


@dataclass(frozen=True)
class Seed:
    version: int

    async def load(self, member: Member) -> None:
        if member.index in (1,):
            raise EngineRefused("it does not eat", 400)
        member.client.calls.append(f"snapshot {self.version}")


class Client:
    """Notes its calls, and says the version that was set."""

    def __init__(self, index: int):
        self.address, self.calls, self.served = f"http://engine-{index}", [], None

    def __getattr__(self, name):
        async def call(*arguments):
            self.calls.append(name)
            self.served = arguments[0] if name == "set_version" else self.served
            return self.served

        return call


@pytest.fixture
def pigeons(monkeypatch):
    """(weight sync, members, transport) over two engines of a world of one rank."""
    monkeypatch.setitem(sync.TRANSPORTS, "pigeon", Pigeon)
    config = Config()
    config.weight_sync.transport, config.rollout.colocated = "pigeon", True
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    world = dist.group.WORLD
    layout = Layout(0, 1, 1, 1, 0, 0, 0, world, world, world, world, [0])
    control = Control(world, StopSignal())
    members = [Member(Placement(index, 0, (0,)), Client(index), 1, state=State.WAITING) for index in range(2)]
    placements = [member.placement for member in members]
    weights = WeightSync(sync_settings(config), layout, control, None, placements, members)
    yield weights, members, weights._transport
    weights.close()
    assert weights._transport.closed
    control.close()
    dist.destroy_process_group()


AFTER = ["flush", "set_version", "proceed", "version"]


def test_a_transport_needs_an_entry_in_the_table(pigeons):
    weights, members, transport = pigeons
    assert isinstance(transport, Pigeon) and not weights.can_restore
    assert transport.context.placements == [member.placement for member in members]
    assert transport.context.members == dict(enumerate(members)) and transport.context.settings.colocated
    assert weights.push(3) == {}
    for member in members:
        assert (member.state, member.version) == (State.SERVING, 3)
        assert member.client.calls == ["pause", "begin_update", "weights 3", "end_update", *AFTER]


def test_ranks_give_memory_back_before_engines_take_theirs(pigeons, monkeypatch):
    """All sessions have ended then, and no engine has been told to take memory for its cache."""
    weights, members, _ = pigeons
    calls = []
    for member in members:
        member.client.calls = calls

    async def after_load(member):
        calls.append("after_load")

    weights._after_load = after_load
    monkeypatch.setattr(sync, "return_freed_memory", lambda: calls.append("return memory"))
    assert weights.push(3) == {}
    returned = calls.index("return memory")
    assert calls.count("return memory") == 1
    assert calls[:returned].count("end_update") == 2 and "after_load" not in calls[:returned]
    assert calls[returned + 1 :].count("after_load") == 2


def test_an_engine_that_a_transport_names_is_left_paused(pigeons):
    weights, members, transport = pigeons
    transport.refuses = (1,)
    assert weights.push(3) == {1: "it shot the pigeon"}
    assert [member.state for member in members] == [State.SERVING, State.QUARANTINED]
    assert members[1].client.calls == ["pause", "begin_update", "pause", "end_update"]


def test_a_transport_without_a_session(pigeons):
    weights, members, transport = pigeons
    transport.has_session = False
    assert weights.push(3, {0}) == {}
    assert members[0].client.calls == ["pause", "end_update", "weights 3", *AFTER]  # ends one that was left open
    assert members[1].client.calls == []


def test_an_engine_takes_the_snapshot_that_a_transport_keeps(pigeons):
    weights, members, _ = pigeons
    with pytest.raises(RuntimeError, match="no snapshot"):
        weights.control.run(weights.restore_from_snapshot(members[0]))
    weights.push(3, {0})
    assert weights.can_restore
    members[0].client.calls.clear()
    weights.control.run(weights.restore_from_snapshot(members[0]))
    assert members[0].client.calls == ["pause", "end_update", "snapshot 3", *AFTER]
    with pytest.raises(EngineError, match="does not eat"):
        weights.control.run(weights.restore_from_snapshot(members[1]))
    assert members[1].state is State.QUARANTINED
