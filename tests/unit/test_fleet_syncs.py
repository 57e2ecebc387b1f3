"""A fleet on one rank: syncs that fail, routers that die, snapshots, and engines that take turns with the actor."""

import time

import pytest

from megatron_policysplit.errors import EngineError, EngineLost
from megatron_policysplit.rollout.sglang_http import EngineRefused, EngineUnreachable
from megatron_policysplit.serving import fleet as fleets
from megatron_policysplit.serving.members import State
from tests.support.fake_fleet import HEALTH_SECONDS, PAUSES, Turns, rigs, serving, world_of_one

SERVING, WAITING, QUARANTINED, DOWN = State.SERVING, State.WAITING, State.QUARANTINED, State.DOWN


@pytest.fixture(scope="module")
def layout():
    with world_of_one() as layout:
        yield layout


@pytest.fixture
def build(layout, monkeypatch):
    with rigs(layout, monkeypatch) as build:
        yield build


@pytest.fixture
def serve(build):
    """Like build, but version 7 is served and the log is empty."""
    return lambda engines=2, **options: serving(build(engines, **options))


# --- syncs that fail ----------------------------------------------------------------------------------


def test_the_first_sync_must_succeed_everywhere(build):
    rig = build(2)
    rig.open()
    rig.weights.failing.append({1: "shapes differ"})
    with pytest.raises(EngineError, match="^engine 1: shapes differ$"):
        rig.fleet.sync(0)
    assert rig.router.workers == {"http://engine-0"}


def test_a_later_sync_may_fail_and_the_server_is_started_again(serve):
    rig = serve(2)
    rig.weights.failing.append({0: "half-way"})
    rig.fleet.sync(8)
    assert rig.states()[1] is SERVING and rig.router.workers == {"http://engine-1"}
    rig.attend(lambda: rig.back(version=8))
    assert rig.weights.pushes == [(8, [0, 1]), (8, [0])]
    assert rig.of(0) == ["remove 0", "start 0", "pause 0", "weights 8 0", "add 0"]
    assert "engine 0 (http://engine-0) did not take the weights: half-way" in rig.said


@pytest.mark.parametrize("given", [False, True])
def test_a_later_sync_may_fail_everywhere(serve, given):
    rig = serve(2, given=given)
    rig.weights.failing.append({0: "half-way", 1: "half-way"})
    rig.fleet.sync(8)
    assert rig.router.workers == set()
    rig.attend(lambda: rig.back(0, 8) and rig.back(1, 8))
    assert rig.router.workers == {"http://engine-0", "http://engine-1"}


def test_a_given_engine_that_failed_is_tried_again_after_a_while(serve):
    rig = serve(2, given=True)
    rig.weights.failing += [{0: "half-way"}, {0: "again"}]
    rig.fleet.sync(8)
    began = time.monotonic()
    assert rig.members[0].state is QUARANTINED and not rig.fleet.wanted()
    rig.attend(lambda: rig.back(version=8))
    assert time.monotonic() - began > 2 * PAUSES["RETRY_SECONDS"]
    assert rig.weights.pushes == [(8, [0, 1]), (8, [0]), (8, [0])]
    assert rig.of(1) == ["weights 8 1"]


def test_a_full_sync_takes_a_quarantined_engine_with_it(serve):
    rig = serve(2, given=True)
    rig.weights.failing.append({0: "half-way"})
    rig.fleet.sync(8)
    rig.fleet.sync(9)
    assert rig.states() == [SERVING] * 2
    assert rig.router.workers == {"http://engine-0", "http://engine-1"}


def test_an_engine_that_a_sync_found_dead_comes_back(serve):
    """The sync, not the one who tends it, is the first to see it."""
    rig = serve(2)
    rig.weights.during = rig.servers[0].kill
    rig.fleet.sync(8)
    rig.weights.during = lambda: None
    assert rig.router.workers == {"http://engine-1"}
    rig.attend(lambda: rig.back(version=8))
    assert rig.servers[0].starts == 2


def test_no_probe_is_judged_during_a_sync(serve):
    """The engine is paused for longer than it may be silent, and was asked for a token just before."""
    rig = serve(1)
    engine = rig.engines[0]
    engine.paused = True
    rig.attend(lambda: engine.probing)

    def slow():
        assert engine.probing == 0
        probes = engine.probes
        time.sleep(2 * HEALTH_SECONDS)
        assert engine.probes == probes

    rig.weights.during = slow
    rig.fleet.sync(8)
    rig.weights.during = lambda: None
    rig.tended()
    assert rig.states() == [SERVING] and rig.servers[0].starts == 1


def test_a_sync_does_not_wait_for_a_probe(serve, monkeypatch):
    rig = serve(1)
    rig.fleet.server_config.health_seconds = 120.0
    monkeypatch.setattr(fleets, "PROBE_SECONDS", 60.0)
    rig.wait_for(lambda: rig.engines[0].probing == 0)
    rig.engines[0].generates = False
    began = time.monotonic()
    rig.wait_for(lambda: rig.engines[0].probing)
    rig.fleet.sync(8)
    assert time.monotonic() - began < 40
    rig.engines[0].generates = True


def test_an_engine_that_dies_between_the_wish_and_the_service(serve):
    rig = serve(2)
    rig.servers[0].kill()
    rig.wait_for(lambda: rig.members[0].state is WAITING)
    assert rig.fleet.wanted()
    rig.servers[0].ready_when = lambda: False
    rig.servers[0].kill()
    rig.wait_for(lambda: rig.members[0].state is State.STARTING)
    rig.serve()
    assert rig.weights.pushes == []
    assert rig.router.workers == {"http://engine-1"}
    rig.servers[0].ready_when = lambda: True
    rig.attend(rig.back)


def test_an_engine_that_dies_after_it_was_chosen(serve):
    rig = serve(2)
    rig.servers[0].kill()
    rig.wait_for(lambda: rig.members[0].state is WAITING)
    lacks = rig.fleet._lacks_weights

    def at_the_last_moment(member):
        chosen = lacks(member)
        if chosen:
            rig.servers[0].ready_when = lambda: False
            rig.servers[0].kill()
            rig.wait_for(lambda: member.state is State.STARTING)
        return chosen

    rig.fleet._lacks_weights = at_the_last_moment
    rig.serve()
    assert rig.weights.pushes == []


def test_an_engine_that_dies_while_another_is_given_weights(serve):
    rig = serve(3)

    def lose_another():
        rig.servers[1].ready_when = lambda: False
        rig.servers[1].kill()
        rig.wait_for(lambda: rig.members[1].state is State.STARTING)

    rig.weights.during = lose_another
    rig.servers[0].kill()
    rig.attend(rig.back)
    assert rig.of(1) == ["remove 1", "start 1"]
    assert rig.router.workers == {"http://engine-0", "http://engine-2"}


def test_an_engine_that_comes_back_gets_what_the_actor_has_by_then(serve):
    """With generation beside training the actor may be a version ahead: its weights keep their own name."""
    rig = serve(2)
    rig.actor_version = 8
    rig.servers[0].kill()
    rig.attend(lambda: rig.back(version=8))
    assert rig.weights.pushes == [(8, [0])] and rig.told == [8]
    assert [member.version for member in rig.members] == [8, 7]
    rig.tended()
    assert rig.states() == [SERVING] * 2 and not rig.fleet.wanted()
    rig.fleet.sync(8)
    assert [member.version for member in rig.members] == [8, 8]


# --- the router ---------------------------------------------------------------------------------------


def test_a_router_that_died_comes_back_with_its_workers(serve):
    rig = serve(2)
    rig.router.kill()
    rig.attend(lambda: len(rig.router.workers) == 2 and rig.router.starts == 2)
    assert rig.log[0] == "start router" and sorted(rig.log[1:]) == ["add 0", "add 1"]
    assert rig.states() == [SERVING] * 2


def test_two_engines_lost_at_once_are_both_used_again(serve):
    rig = serve(3)
    rig.router.delay = 0.1
    for index in (0, 1):
        rig.servers[index].ready_when = lambda: rig.router.workers == {"http://engine-2"}
        rig.servers[index].kill()
    rig.attend(lambda: all(rig.back(index) for index in (0, 1)))
    assert rig.router.workers == {f"http://engine-{index}" for index in range(3)}


def test_router_and_engine_die_together(serve):
    rig = serve(2)
    rig.router.ready_when = lambda: any("is lost" in line for line in rig.said)
    rig.servers[0].ready_when = lambda: rig.router.workers == {"http://engine-1"}
    rig.router.kill()
    rig.servers[0].kill()
    rig.attend(rig.back)
    assert rig.router.workers == {"http://engine-0", "http://engine-1"}


def test_an_engine_lost_while_the_router_starts_is_not_put_back(serve):
    rig = serve(2)
    rig.servers[0].ready_when = lambda: False
    rig.router.ready_when = lambda: any("is lost" in line for line in rig.said)
    rig.router.kill()
    rig.attend(lambda: rig.router.starts == 2)
    rig.servers[0].kill()
    rig.attend(lambda: rig.router.workers == {"http://engine-1"})
    assert "add 0" not in rig.log


def test_what_the_router_refuses_once_is_told_again(serve):
    rig = serve(2)
    rig.router.failing_calls += [EngineRefused("busy", 503), EngineRefused("busy", 503)]
    rig.servers[0].kill()
    rig.attend(lambda: rig.back() and len(rig.router.workers) == 2)
    assert [line for line in rig.said if "sglang-router" in line] == [
        "sglang-router has not been told yet which engines serve: busy"
    ]


def test_an_engine_that_the_router_took_without_saying_so_leaves_it_again(serve):
    rig = serve(2)
    add = rig.router.add

    async def silently(address):
        await add(address)
        raise EngineUnreachable("no answer in time")

    rig.router.add = silently
    rig.servers[0].kill()
    rig.attend(rig.back)
    assert len(rig.router.workers) == 2
    rig.servers[0].ready_when = lambda: False
    rig.servers[0].kill()
    rig.attend(lambda: rig.router.workers == {"http://engine-1"})


def test_a_sync_whose_router_is_gone_is_a_sync(serve):
    rig = serve(2)
    rig.weights.failing.append({0: "half-way"})
    rig.weights.during = rig.router.kill
    rig.fleet.sync(8)
    rig.weights.during = lambda: None
    rig.attend(lambda: rig.router.starts == 2 and rig.back(version=8) and len(rig.router.workers) == 2)


def test_a_router_that_cannot_start_again_ends_the_run(serve):
    rig = serve(2)
    rig.router.failing.append(EngineError("sglang-router ended with exit code 1"))
    rig.router.kill()
    with pytest.raises(EngineLost, match="exit code 1"):
        rig.attend(lambda: False)


# --- weights from disk --------------------------------------------------------------------------------


def test_a_server_takes_the_last_snapshot_without_other_ranks(serve):
    rig = serve(2)
    rig.weights.can_restore = True
    rig.servers[0].kill()
    rig.wait_for(rig.back)
    rig.tended()
    assert rig.of(0) == ["remove 0", "start 0", "pause 0", "restore 0", "weights 7 0", "add 0"]
    assert not rig.fleet.wanted() and rig.weights.pushes == []


def test_a_snapshot_that_is_not_the_runs_is_not_served(serve):
    """The only engine was down during the last sync, so that nothing was written."""
    rig = serve(1)
    rig.weights.can_restore = True
    rig.servers[0].ready_when = lambda: rig.fleet.version == 8
    rig.servers[0].kill()
    rig.wait_for(lambda: rig.members[0].state is State.STARTING)
    rig.fleet.sync(8)
    rig.wait_for(lambda: rig.members[0].state is WAITING)
    assert rig.engines[0].paused
    rig.attend(lambda: rig.back(version=8))
    assert rig.weights.pushes == [(8, [0])]


def test_a_snapshot_that_is_not_taken(serve):
    rig = serve(2)
    rig.weights.can_restore = True
    rig.weights.restores_fail.append(EngineUnreachable("no answer"))
    rig.servers[0].kill()
    rig.attend(lambda: rig.servers[0].starts == 3 and rig.back())


# --- engines on the actor's GPUs ----------------------------------------------------------------------


def test_no_server_starts_while_it_is_not_the_engines_turn(serve):
    turns = Turns()
    rig = serve(2, turns=turns)
    turns.restarted.clear()
    turns.engines_turn = False
    rig.servers[0].kill()
    rig.wait_for(lambda: rig.members[0].state is DOWN)
    rig.tended()
    assert rig.servers[0].starts == 1 and rig.members[0].state is DOWN
    turns.engines_turn = True
    rig.attend(rig.back)
    assert turns.restarted == [0]


def test_engines_that_take_turns_get_no_snapshot(serve):
    """A snapshot is loaded by nobody's leave but the engine's own, maybe into memory that is the actor's by then."""
    rig = serve(2, turns=Turns())
    rig.weights.can_restore = True
    rig.servers[0].kill()
    rig.attend(rig.back)
    assert "restore 0" not in rig.log and rig.weights.pushes == [(7, [0])]


def test_a_run_that_stops_gives_up_what_is_starting(serve):
    turns = Turns()
    rig = serve(2, turns=turns)
    rig.servers[0].ready_when = lambda: False
    rig.servers[0].kill()
    rig.wait_for(lambda: rig.members[0].state is State.STARTING)
    rig.fleet.give_up_starting()
    assert not rig.servers[0].up and rig.members[0].state is DOWN
    assert rig.states()[1] is SERVING and rig.servers[1].up
    turns.engines_turn = False
    time.sleep(2 * PAUSES["RETRY_SECONDS"])
    assert not rig.servers[0].up and rig.members[0].state is DOWN
