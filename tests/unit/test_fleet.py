"""A fleet on one rank: engines start, end, die, hang and come back; what they and the router are told, in order."""

import asyncio
import time

import pytest

from megatron_policysplit.distributed.stop_signal import StopRequested
from megatron_policysplit.errors import ConfigError, EngineError
from megatron_policysplit.serving.members import State
from tests.support.fake_fleet import HEALTH_SECONDS, rigs, serving, world_of_one

SERVING, WAITING, DOWN = State.SERVING, State.WAITING, State.DOWN


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


# --- the start and the end ----------------------------------------------------------------------------


def test_the_first_sync_puts_engines_behind_the_router(build):
    rig = build(2)
    rig.open()
    assert rig.states() == [WAITING] * 2 and rig.router.workers == set()
    assert [member.tensor for member in rig.members] == [2, 2]
    rig.fleet.sync(0)
    assert rig.weights.pushes == [(0, [0, 1])]
    for index in (0, 1):
        assert rig.of(index) == [f"start {index}", f"identity {index}", f"weights 0 {index}", f"add {index}"]
    rig.tended()
    assert not rig.fleet.wanted()


def test_close_ends_everything_and_nothing_comes_back(build):
    rig = build(2)
    rig.open()
    rig.fleet.sync(0)
    rig.servers[1].kill()
    rig.fleet.close()
    assert all(process.stopped for process in (*rig.servers.values(), rig.router))
    assert all(member.client.closed for member in rig.members)
    rig.tended()
    assert not any(process.up for process in (*rig.servers.values(), rig.router))


def test_given_engines_outlive_the_run(build):
    rig = build(2, given=True)
    rig.open()
    rig.fleet.close()
    assert all(engine.running and not engine.paused for engine in rig.engines.values())
    assert rig.log == ["start router", "identity 0", "identity 1", "stop router"]


def test_close_after_an_engine_that_cannot_start(build):
    rig = build(2)
    rig.servers[0].failing.append(EngineError("out of memory"))
    rig.servers[1].ready_when = lambda: False
    with pytest.raises(EngineError, match="out of memory"):
        rig.open()
    rig.fleet.close()
    rig.tended()
    assert all(process.stopped and not process.up for process in (*rig.servers.values(), rig.router))
    assert rig.servers[1].starts == 1


def test_nothing_is_left_starting_when_the_router_cannot_start(build, monkeypatch):
    rig = build(2)

    def taken():
        raise EngineError("the port is taken")

    async def tasks():
        return len(asyncio.all_tasks())

    monkeypatch.setattr(rig.router, "start", taken)
    for server in rig.servers.values():
        server.ready_when = lambda: False
    with pytest.raises(EngineError, match="taken"):
        rig.open()
    rig.tended()
    assert rig.control.run(tasks()) == 1
    rig.fleet.close()
    rig.tended()
    assert not any(server.up for server in rig.servers.values())


def test_close_after_a_stop_signal_during_the_start(build):
    rig = build(2)
    rig.servers[0].ready_when = lambda: False
    rig.control.loop.call_soon_threadsafe(rig.control.loop.call_later, 0.1, setattr, rig.control.stop, "received", 15)
    with pytest.raises(StopRequested):
        rig.open()
    rig.fleet.close()
    rig.tended()
    assert all(process.stopped and not process.up for process in (*rig.servers.values(), rig.router))


def test_one_that_cannot_be_stopped_does_not_keep_the_others(build):
    rig = build(2)
    rig.open()
    rig.router.stop_fails = OSError("gone")
    with pytest.raises(OSError, match="gone"):
        rig.fleet.close()
    assert all(server.stopped for server in rig.servers.values())
    assert all(member.client.closed for member in rig.members)
    rig.router.stop_fails = None


def test_an_engine_of_another_model_is_refused(build):
    rig = build(1, given=True)
    rig.engines[0].model_type = "llama"
    with pytest.raises(EngineError, match="of type llama"):
        rig.open()


# --- servers that are lost ----------------------------------------------------------------------------


def test_a_killed_server_comes_back(serve):
    rig = serve(2)
    rig.servers[0].kill()
    rig.attend(rig.back)
    assert rig.of(0) == ["remove 0", "start 0", "pause 0", "weights 7 0", "add 0"]
    assert rig.of(1) == []
    assert rig.weights.pushes == [(7, [0])]
    assert rig.servers[0].starts == 2
    assert any("engine 0 (http://engine-0) is lost: 0 was killed by SIGKILL" in line for line in rig.said)
    assert rig.router.workers == {"http://engine-0", "http://engine-1"}


def test_a_lost_server_leaves_the_router_before_it_is_back(serve):
    rig = serve(2)
    rig.servers[0].ready_when = lambda: False
    rig.servers[0].kill()
    rig.attend(lambda: rig.router.workers == {"http://engine-1"})
    rig.tended()
    assert rig.members[0].state is State.STARTING and not rig.fleet.wanted()
    assert rig.weights.pushes == []


@pytest.mark.parametrize("engines", [1, 2])
def test_a_silent_server_is_killed_and_comes_back(serve, engines):
    rig = serve(engines)
    began = time.monotonic()
    rig.engines[0].generates = False
    rig.attend(rig.back)
    assert time.monotonic() - began > HEALTH_SECONDS
    routed = [["remove 0"], ["add 0"]] if engines == 2 else [[], []]
    assert rig.of(0) == [*routed[0], "start 0", "pause 0", "weights 7 0", *routed[1]]
    assert "did not answer in 0.1 s" in rig.said[0]


def test_a_probe_without_an_answer_is_not_the_end(serve):
    rig = serve(1)
    engine = rig.engines[0]
    engine.generates = False
    rig.attend(lambda: engine.probes > 1)
    engine.generates = True
    rig.tended()
    assert rig.states() == [SERVING] and rig.servers[0].starts == 1


def test_silence_before_a_restart_does_not_count_after_it(serve):
    rig = serve(1)
    server, engine = rig.servers[0], rig.engines[0]
    engine.generates, probes = False, engine.probes
    rig.attend(lambda: engine.probes > probes + 1)
    server.kill()
    died = time.monotonic()
    server.ready_when = lambda: time.monotonic() > died + HEALTH_SECONDS
    rig.weights.during = lambda: setattr(engine, "generates", False)
    rig.attend(rig.back)
    probes = engine.probes
    rig.attend(lambda: engine.probes > probes + 1)
    assert server.starts == 2


def test_restarts_are_not_endless(serve):
    rig = serve(2, restarts=1)
    rig.servers[1].kill()
    rig.attend(lambda: rig.back(1))
    rig.servers[1].kill()
    with pytest.raises(EngineError, match=r"engine 1 .* started again 1 times \(rollout.server.restarts\)"):
        rig.attend(lambda: False)
    assert rig.router.workers == {"http://engine-0"}


def test_a_server_that_fails_to_start_again_is_tried_until_the_limit(serve):
    rig = serve(2, restarts=3)
    rig.servers[0].failing += [EngineError("CUDA out of memory"), EngineError("CUDA out of memory")]
    rig.servers[0].kill()
    rig.attend(lambda: rig.back() and rig.servers[0].starts == 4)


def test_an_error_of_the_set_up_in_a_restart_ends_the_run(serve):
    rig = serve(2)
    rig.servers[0].failing.append(ConfigError("rollout.server.python cannot be run"))
    rig.servers[0].kill()
    with pytest.raises(ConfigError, match="cannot be run"):
        rig.attend(lambda: False)


def test_a_server_that_dies_between_its_start_and_its_pause(serve):
    rig = serve(2)
    server = rig.servers[0]
    pause = rig.members[0].client.pause

    async def die_once():
        rig.members[0].client.pause = pause
        server.kill()
        await pause()

    rig.members[0].client.pause = die_once
    server.kill()
    rig.attend(lambda: rig.back() and server.starts == 3)
    assert rig.weights.pushes == [(7, [0])]


# --- engines that were given --------------------------------------------------------------------------


def test_a_given_engine_that_went_and_came_back(serve):
    rig = serve(2, given=True)
    rig.engines[0].running = False
    rig.attend(lambda: rig.router.workers == {"http://engine-1"})
    rig.tended()
    assert rig.states() == [DOWN, SERVING]
    rig.log.clear()
    rig.engines[0].begin("default")
    rig.attend(rig.back)
    assert rig.of(0) == ["identity 0", "pause 0", "weights 7 0", "add 0"]
    assert rig.of(1) == []


@pytest.mark.parametrize("engines", [1, 2])
def test_a_given_engine_that_somebody_else_started_again(serve, engines):
    rig = serve(engines, given=True)
    rig.engines[0].begin("default")
    rig.attend(lambda: rig.weights.pushes == [(7, [0])] and rig.back())
    routed = [["remove 0"], ["add 0"]] if engines == 2 else [[], []]
    assert rig.of(0) == [*routed[0], "identity 0", "pause 0", "weights 7 0", *routed[1]]
    assert "its weight version is default" in rig.said[0]


def test_a_given_engine_that_comes_back_with_another_model_is_not_used(serve):
    rig = serve(2, given=True)
    rig.engines[0].tokens = (4, 5)
    rig.engines[0].begin("default")
    rig.attend(lambda: rig.members[0].state is DOWN and "tokenizer" in rig.members[0].why)
    assert rig.router.workers == {"http://engine-1"} and not rig.fleet.wanted()
    rig.engines[0].tokens = (1, 2, 3)
    rig.attend(rig.back)


def test_other_errors_of_a_tending_are_not_swallowed(serve):
    rig = serve(1)

    async def broken():
        raise KeyError("weight_version")

    rig.members[0].client.version = broken
    with pytest.raises(KeyError, match="weight_version"):
        rig.attend(lambda: False)
