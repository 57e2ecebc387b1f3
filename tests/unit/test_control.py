"""The control group with real gloo ranks: patience while a leader works, and what one rank's news means to all."""

import asyncio
import os
import signal
import time
from datetime import timedelta

import pytest

from megatron_policysplit.errors import DataError
from tests.support.dist import run_distributed

GROUP_SECONDS = 3


def make_control(rank: int, heartbeat: float = 0.2):
    import torch.distributed as dist

    from megatron_policysplit.control import Control
    from megatron_policysplit.stopping import StopSignal

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
    from megatron_policysplit.stopping import StopRequested

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


def frozen_peer(rank: int) -> tuple:
    """Rank 1 stops answering without ending, as a hung machine does: its connections stay open."""
    import megatron_policysplit.control as module

    module.MISSING_SECONDS = 1.0
    control = make_control(rank)
    control.check()
    if rank == 1:
        time.sleep(GROUP_SECONDS + 5)
        return "", 0.0
    began = time.monotonic()
    with pytest.raises(RuntimeError):
        control.attend(work(60) if rank == 0 else None)
    seconds = time.monotonic() - began
    return module.missing_ranks(rank, 3), seconds


def test_a_rank_that_does_not_answer_is_named():
    answers = run_distributed(frozen_peer, 3)
    assert [text for text, _ in answers] == ["rank 1 did not answer", "", "rank 1 did not answer"]
    assert all(GROUP_SECONDS - 1 < seconds < 45 for text, seconds in answers if text)  # not the work's 60 s


def alone(rank: int) -> tuple:
    from megatron_policysplit.control import missing_ranks

    control = make_control(rank)
    answer = control.attend(work(0.1)), control.run(work(0.0, "mine"))
    control.close()
    return *answer, missing_ranks(0, 1)


def test_a_world_of_one():
    assert run_distributed(alone, 1) == [("done", "mine", "no other rank takes part in this run")]
