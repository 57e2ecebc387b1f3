"""A rank that fails, is killed or hangs while the others wait in C++ for ever, as NCCL's peers do.

Ranks meet and watch each other as in a run; there is no launcher. What stands for an NCCL collective is the C
library's `pause`, called without Python's lock: it comes back for no peer's end.
"""

import ctypes
import json
import os
import signal
import threading
import time
from contextlib import ExitStack

import pytest

from megatron_policysplit.distributed.rank_watch import Failure, Pace, RankWatch
from megatron_policysplit.distributed.stop_signal import StopRequested
from megatron_policysplit.errors import BAD_INPUT, FAILED, DataError
from tests.support.dist import Ranks

PACE = Pace(beat=0.1, silent=2.0, naming=1.0, telling=2.0, leave=1.0)
RANKS = 3
SECONDS = 55  # that no rank may take; what its own time limits add up to is a fraction
GONE = "killed, out of memory, suspended, or without network; see the output of"


def describe(error):
    if isinstance(error, DataError):
        return Failure(f"error: {error}", BAD_INPUT)
    rank, is_of_a_peer = os.environ["RANK"], isinstance(error, ConnectionError)
    return Failure(
        f"error: rank {rank} failed ({error})",
        FAILED,
        names_others=True,
        is_of_a_peer=is_of_a_peer,
        traceback="trace\n",
    )


def block():
    """As in a collective whose peer is gone."""
    ctypes.CDLL(None).pause()


def rank_main(rank, act, directory):
    """One rank, which leaves by os._exit as worker does. act: what its main thread does while it is watched."""
    from megatron_policysplit.distributed.rendezvous import meet, store_host
    from megatron_policysplit.distributed.stop_signal import StopSignal

    watch = RankWatch(describe, RANKS)
    store = meet(StopSignal(), timeout_seconds=600)
    watch.start(store, rank, store_host=store_host(), pace=PACE)
    (directory / f"pid.{rank}").write_text(str(os.getpid()))
    while len(list(directory.glob("pid.*"))) < RANKS:
        time.sleep(0.02)
    time.sleep(0.5)  # every rank has been seen alive
    try:
        with watch.noting():
            act(rank, store)
        code = watch.end(0)
    except BaseException as error:
        code = watch.fail(error)
    os._exit(code)


@pytest.fixture
def start(tmp_path):
    with ExitStack() as stack:

        def start(act):
            return stack.enter_context(Ranks(rank_main, RANKS, act, tmp_path, output=tmp_path / "output"))

        yield start


def errors(ranks) -> list[str]:
    return [line for line in ranks.text().splitlines() if line.startswith("error")]


class Act:
    """What the ranks do: `victim` calls `deed`, the others wait for ever in C++ (or in the store, if `in_store`)."""

    def __init__(self, victim, deed, in_store=False):
        self.victim, self.deed, self.in_store = victim, deed, in_store

    def __call__(self, rank, store):
        if rank == self.victim:
            time.sleep(0.3)
            self.deed()
        elif self.in_store:
            store.wait(["policysplit/never"])  # holds the connection that other threads would use
        else:
            block()


def raise_key_error():
    raise KeyError("lost")


def raise_data_error():
    raise DataError("no rows")


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


def stop_self():
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("victim", [0, 1])
def test_an_exception_ends_every_rank_with_its_message_and_code(start, victim):
    ranks = start(Act(victim, raise_key_error))
    assert ranks.codes(SECONDS) == [FAILED] * RANKS
    assert errors(ranks) == [f"error: rank {victim} failed ('lost'); every rank still answers"]
    assert ranks.text().count("trace") == 1


@pytest.mark.timeout(60)
def test_a_sentence_for_the_user_keeps_its_own_code(start):
    ranks = start(Act(2, raise_data_error, in_store=True))
    assert ranks.codes(SECONDS) == [BAD_INPUT] * RANKS
    assert errors(ranks) == ["error: no rows"]


@pytest.mark.timeout(60)
def test_a_killed_rank_is_found_by_another(start):
    ranks = start(Act(1, kill_self))
    assert ranks.codes(SECONDS) == [FAILED, -signal.SIGKILL, FAILED]
    assert errors(ranks) == [f"error: rank 1 did not answer for 2 s: {GONE} that rank and the kernel's log there"]


@pytest.mark.timeout(60)
def test_the_store_gone_with_its_host(start):
    ranks = start(Act(0, kill_self))
    assert ranks.codes(SECONDS) == [-signal.SIGKILL, FAILED, FAILED]
    assert errors(ranks) == ["error: rank 0, which hosts the store, does not answer"] * 2


@pytest.mark.timeout(60)
@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_that_hangs_is_taken_for_dead(start, victim):
    """A stopped host of the store answers nobody, and does not close its connections either."""
    ranks = start(Act(victim, stop_self))
    others = [rank for rank in range(RANKS) if rank != victim]
    for rank in others:
        ranks.processes[rank].join(SECONDS)
    assert [ranks.processes[rank].exitcode for rank in others] == [FAILED, FAILED]
    if victim == 0:
        assert errors(ranks) == ["error: rank 0, which hosts the store, does not answer"] * 2
    else:
        assert errors(ranks) == [f"error: rank 2 did not answer for 2 s: {GONE} that rank and the kernel's log there"]


class TwoGone:
    """Neighbours that are killed together, as with their machine; the finder names both."""

    def __call__(self, rank, store):
        if rank == 0:
            block()
        time.sleep(0.3)
        kill_self()


@pytest.mark.timeout(60)
def test_all_that_are_gone_are_named(start):
    ranks = start(TwoGone())
    assert ranks.codes(SECONDS) == [FAILED, -signal.SIGKILL, -signal.SIGKILL]
    assert errors(ranks) == [f"error: ranks 1, 2 did not answer for 2 s: {GONE} those ranks and the kernel's log there"]


class Consequences:
    """Rank 1 fails, and rank 2, which notices by its connection, a little later."""

    def __call__(self, rank, store):
        if rank == 0:
            block()
        time.sleep(0.3 * rank)
        raise (KeyError if rank == 1 else ConnectionError)("closed by peer" if rank == 2 else "lost")


@pytest.mark.timeout(60)
def test_the_first_failure_is_told_and_not_its_consequences(start):
    ranks = start(Consequences())
    assert ranks.codes(SECONDS) == [FAILED] * RANKS
    assert errors(ranks) == ["error: rank 1 failed ('lost'); every rank still answers"]
    assert ranks.text().count("trace") == 1


class OneByOne:
    """All ranks end in order, far apart; the host of the store first."""

    def __call__(self, rank, store):
        time.sleep([0, 1.5, 4.5][rank])  # the last runs alone for longer than PACE.silent


@pytest.mark.timeout(60)
def test_ranks_that_end_in_order_are_not_missed(start):
    ranks = start(OneByOne())
    assert ranks.codes(SECONDS) == [0] * RANKS
    assert errors(ranks) == []


class LastOneFails:
    """Two ranks have ended in order when the third is killed."""

    def __call__(self, rank, store):
        if rank == 2:
            time.sleep(1.5)
            kill_self()


@pytest.mark.timeout(60)
def test_a_rank_that_dies_after_others_have_ended_is_found_by_the_host(start):
    ranks = start(LastOneFails())
    assert ranks.codes(SECONDS) == [FAILED, 0, -signal.SIGKILL]
    assert errors(ranks) == [f"error: rank 2 did not answer for 2 s: {GONE} that rank and the kernel's log there"]


class Busy:
    """Rank 1 works without a sign of the main thread, rank 2 holds Python's lock for a while."""

    def __call__(self, rank, store):
        if rank == 2:
            ctypes.PyDLL(None).usleep(1_200_000)  # does not let go of the lock
        time.sleep(2.5)


@pytest.mark.timeout(60)
def test_a_rank_that_is_busy_is_not_taken_for_dead(start):
    ranks = start(Busy())
    assert ranks.codes(SECONDS) == [0] * RANKS
    assert errors(ranks) == []


def test_a_world_of_one_prints_and_returns_the_code(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    watch = RankWatch(describe)
    assert watch.end(75) == 75
    assert watch.fail(DataError("no rows")) == BAD_INPUT
    assert watch.fail(KeyError("lost")) == FAILED
    assert capsys.readouterr().err.splitlines() == [
        "error: no rows",
        "trace",
        "error: rank 0 failed ('lost'); no other rank takes part in this run",
    ]
    threads = [thread.name for thread in threading.enumerate()]
    assert not [name for name in threads if name in ("policysplit-teller", "policysplit-guard")]


def test_a_stop_signal_is_no_failure():
    watch = RankWatch(lambda error: pytest.fail("described"))
    with pytest.raises(StopRequested), watch.noting():
        raise StopRequested


def test_the_notes_are_the_first_ones(tmp_path):
    import torch.distributed as dist

    from megatron_policysplit.distributed.rank_notes import ENDED, FAILED_ONCE, Note, RankNotes

    store = dist.HashStore()
    first, second = RankNotes(store, 0), RankNotes(store, 1)
    assert first.note() is None and second.verdict() is None
    note = Note(1, "error: a", 2, False, (3, 4))
    assert second.leave(note) == note
    assert first.leave(Note(0, "error: b", 1)) == note == first.note()
    second.beat()
    second.mark_failed()
    assert first.beats(1) == FAILED_ONCE + 1 and first.beats(2) == 0
    first.mark_ended()
    assert second.beats(0) >= ENDED and (second.ended(), second.told()) == (1, 1)
    assert [notes.is_first_to_say("x") for notes in (first, second)] == [True, False]
    assert json.loads(dist.PrefixStore("policysplit/ranks", store).get("note"))["silent"] == [3, 4]
