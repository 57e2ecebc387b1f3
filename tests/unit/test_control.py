"""The control group with real gloo ranks: patience while a leader works, and what one rank's news means to all."""

import asyncio
import concurrent.futures
import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest

from megatron_policysplit.distributed.control import Work
from megatron_policysplit.errors import DataError
from tests.support.dist import run_distributed

GROUP_SECONDS = 3


def make_control(rank: int, heartbeat: float = 0.2):
    import torch.distributed as dist

    from megatron_policysplit.distributed.control import Control
    from megatron_policysplit.distributed.stop_signal import StopSignal

    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=GROUP_SECONDS))
    return Control(group, StopSignal().install(), heartbeat)


async def work(seconds: float, result: str = "done") -> str:
    await asyncio.sleep(seconds)
    return result


async def fail(error: Exception) -> None:
    await asyncio.sleep(0.3)
    raise error


async def record_cancellation(told: list) -> None:
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        told.append("cancelled")
        raise


def long_work(rank: int) -> tuple:
    control = make_control(rank)
    began = time.monotonic()
    first = control.attend(work(2.5 * GROUP_SECONDS) if rank == 0 else None)
    seconds = time.monotonic() - began
    second = control.attend(work(0.0, "again") if rank == 1 else None)
    control.close()
    return first, second, seconds


def test_work_may_take_longer_than_the_groups_time_out():
    results = run_distributed(long_work, 3)
    assert [(first, second) for first, second, _ in results] == [("done", None), (None, "again"), (None, None)]
    assert all(seconds >= 2.5 * GROUP_SECONDS for _, _, seconds in results)


def news(rank: int) -> dict:
    """What each rank raises when others fail or are signalled: one world for several cases, to save its start."""
    from megatron_policysplit.distributed.stop_signal import StopRequested

    control, told = make_control(rank), []

    def raised(work) -> str:
        began = time.monotonic()
        try:
            control.attend(work)
        except Exception as error:
            assert time.monotonic() - began < 45  # no work of 60 s was waited for
            return f"{type(error).__name__}: {error}"
        return "nothing"

    def cases(error: Exception):
        return {0: lambda: record_cancellation(told), 1: lambda: fail(error)}.get(rank, lambda: None)()

    found = {
        "user": raised(cases(DataError("the dump is gone"))),
        "other": raised(cases(KeyError("lost"))),
        "two": raised(fail(ValueError(f"of rank {rank}")) if rank < 2 else None),
    }
    control.check()  # nobody has been signalled
    if rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    found["signal"] = raised(record_cancellation(told) if rank == 0 else None)
    with pytest.raises(StopRequested):
        control.check()
    control.close()
    return found | {"told": told}


@pytest.fixture(scope="module")
def heard() -> list[dict]:
    return run_distributed(news, 3)


def test_a_users_error_on_one_rank_is_raised_on_all(heard):
    assert [found["user"] for found in heard] == ["DataError: the dump is gone"] * 3


def test_another_error_is_raised_where_it_happened_and_named_elsewhere(heard):
    elsewhere = "TrainingError: generation failed on rank 1 (KeyError: 'lost')"
    assert [found["other"] for found in heard] == [elsewhere, "KeyError: 'lost'", elsewhere]


def test_of_two_failures_each_rank_raises_its_own(heard):
    elsewhere = "TrainingError: generation failed on rank 0 (ValueError: of rank 0)"
    assert [found["two"] for found in heard] == ["ValueError: of rank 0", "ValueError: of rank 1", elsewhere]


def test_a_signal_on_one_rank_stops_all(heard):
    assert [found["signal"] for found in heard] == ["StopRequested: "] * 3


def test_unfinished_work_is_cancelled(heard):
    assert [found["told"] for found in heard] == [["cancelled"] * 3, [], []]


def frozen_peer(rank: int, directory: Path) -> float:
    """Rank 1 stops answering without ending, as a hung machine does: its connections stay open.

    directory: where the others say that they have noticed, which all wait for: rank 0 hosts the store.
    """

    def wait_for_the_others():
        while len(list(directory.iterdir())) < 2:
            time.sleep(0.05)

    control = make_control(rank)
    control.check()
    if rank == 1:
        wait_for_the_others()
        return 0.0
    began = time.monotonic()
    with pytest.raises(RuntimeError):
        control.attend(work(60) if rank == 0 else None)
    seconds = time.monotonic() - began
    (directory / str(rank)).touch()
    wait_for_the_others()
    return seconds


def test_a_rank_that_does_not_come_is_noticed_by_the_groups_time_out(tmp_path):
    first, _, last = run_distributed(frozen_peer, 3, tmp_path)
    assert all(GROUP_SECONDS - 1 < seconds < 45 for seconds in (first, last))  # not the work's 60 s


def alone(rank: int) -> tuple:
    control = make_control(rank)
    answer = control.attend(work(0.1)), control.run(work(0.0, "mine"))
    control.close()
    return answer


def test_a_world_of_one():
    assert run_distributed(alone, 1) == [("done", "mine")]


# --- services ------------------------------------------------------------------------------------------


class Counter:
    """A service. wants: what `wanted` says or raises, one after another, then False; meanwhile: done by `serve`."""

    def __init__(self, *wants, meanwhile=lambda: None):
        self.wants, self.meanwhile = list(wants), meanwhile
        self.asked = self.served = 0

    def wanted(self) -> bool:
        self.asked += 1
        want = self.wants.pop(0) if self.wants else False
        if isinstance(want, Exception):
            raise want
        return want

    def serve(self) -> None:
        import torch.distributed as dist

        dist.barrier()  # every rank has to be here
        self.meanwhile()
        self.served += 1


def services(rank: int) -> dict:
    """Rank 0 works, rank 1 wants to be served or fails, rank 2 only waits."""
    from megatron_policysplit.distributed.stop_signal import StopRequested

    control, told, found = make_control(rank, heartbeat=0.1), [], {}

    def attend(work, service) -> str:
        try:
            result = control.attend(work, service)
        except Exception as error:
            result = f"{type(error).__name__}: {error}"
        found[len(found)] = (result, service.asked, service.served)

    async def until_served(service, times: int) -> str:
        while service.served < times:
            await asyncio.sleep(0.01)
        return "done"

    twice = Counter(*[True, False, True][: 3 * (rank == 1)])
    attend(until_served(twice, 2) if rank == 0 else None, twice)
    attend(None, Counter(rank == 1))  # nobody works any more, so that nobody waits for a service
    error = DataError("the engine is lost") if rank == 1 else None
    attend(record_cancellation(told) if rank == 0 else None, Counter(False, error or False))
    error = KeyError("state") if rank == 1 else None
    attend(record_cancellation(told) if rank == 0 else None, Counter(False, error or False))

    def signalled():
        if rank == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    attend(record_cancellation(told) if rank == 0 else None, Counter(rank == 1, meanwhile=signalled))
    with pytest.raises(StopRequested):
        control.check()
    control.stop.received = None

    begun = control.start(record_cancellation(told)) if rank == 0 else None
    if begun is not None:
        begun.cancel()
    attend(begun, Counter())
    attend(work(1.0) if rank == 0 else None, Counter())
    control.close()
    return found | {"told": told}


@pytest.fixture(scope="module")
def served() -> list[dict]:
    return run_distributed(services, 3)


def test_every_rank_serves_when_one_wants_it_and_the_work_goes_on(served):
    assert [found[0][0] for found in served] == ["done", None, None]
    assert [found[0][2] for found in served] == [2, 2, 2]


def test_heartbeats_are_the_same_on_every_rank(served):
    """A rank without work asks neither more often than the one that works, nor only at the end."""
    (asked,) = {found[6][1] for found in served}
    assert 2 <= asked <= 12


def test_nobody_is_served_once_the_work_is_done(served):
    assert [found[1] for found in served] == [(None, 1, 0)] * 3


def test_a_service_that_cannot_go_on_ends_every_rank(served):
    assert [found[2][0] for found in served] == ["DataError: the engine is lost"] * 3
    elsewhere = "TrainingError: generation failed on rank 1 (KeyError: 'state')"
    assert [found[3][0] for found in served] == [elsewhere, "KeyError: 'state'", elsewhere]


def test_a_signal_during_a_service_stops_all_after_it(served):
    assert [found[4][0] for found in served] == ["StopRequested: "] * 3
    assert [found[4][2] for found in served] == [1, 1, 1]


def test_work_that_was_cancelled_before_fails_on_every_rank(served):
    elsewhere = "TrainingError: generation failed on rank 0 (CancelledError: )"
    assert [found[5][0] for found in served] == ["CancelledError: ", elsewhere, elsewhere]


def test_work_of_services_that_ended_was_cancelled(served):
    assert [found["told"] for found in served] == [["cancelled"] * len(served[0]["told"]), [], []]
    assert len(served[0]["told"]) >= 3


# --- work ----------------------------------------------------------------------------------------------


@pytest.fixture
def loop():
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_work_that_is_cancelled_before_it_starts(loop):
    ran = []

    async def note():
        ran.append(1)

    blocked = threading.Event()
    loop.call_soon_threadsafe(blocked.wait)
    never = Work(note(), loop)
    threading.Timer(0.1, blocked.set).start()
    never.cancel()
    assert never.wait(0)
    assert ran == []
    assert isinstance(never.failed(), concurrent.futures.CancelledError)
    with pytest.raises(concurrent.futures.CancelledError):
        never.result()


def test_cancel_waits_for_the_clean_up(loop):
    told, begun = [], threading.Event()

    async def clean_up_slowly():
        try:
            begun.set()
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.2)
            told.append("clean")

    under_way = Work(clean_up_slowly(), loop)
    assert begun.wait(20)
    assert not under_way.wait(0)
    under_way.cancel()
    assert told == ["clean"]
    under_way.cancel()  # again, and nothing happens
    assert told == ["clean"]


def test_what_work_raised_and_returned(loop):
    failed, done = Work(fail(KeyError("lost")), loop), Work(work(0.0), loop)
    assert failed.wait(20) and done.wait(20)
    assert repr(failed.failed()) == "KeyError('lost')" and done.failed() is None
    with pytest.raises(KeyError, match="lost"):
        failed.result()
    assert done.result() == "done"
    failed.cancel()
    done.cancel()
    assert repr(failed.failed()) == "KeyError('lost')" and done.result() == "done"
