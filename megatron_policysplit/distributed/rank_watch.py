"""How a rank learns that another failed, was killed or hangs while its main thread waits in C++.

gloo raises in every peer when a rank's connections close. NCCL does not: its kernels spin until the
collective's time-out, and torch then ends the process by SIGABRT, without a message and without an
exit code of ours. So two threads run beside the main thread of every rank, with either backend:

- The *teller* alone talks to the store (`rank_notes`). Each `Pace.beat_seconds` it shows that its
  process runs, asks whether there is a note, and looks at the counter of one other rank: the
  nearest one before it that has not ended. If that counter stands still for `Pace.silent_seconds`,
  the teller leaves a note that names the rank.
- The *guard* ends the process where the main thread does not. Once the ranks know of a failure it
  aborts this rank's collectives, gives the main thread `Pace.leave_seconds` to come out with an
  exception, and then calls os._exit. It never talks to the store, which may not answer.

The store answers three requests a beat and rank.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch.distributed as dist

from megatron_policysplit.distributed.device import abort_collectives
from megatron_policysplit.distributed.rank_notes import ENDED, FAILED_ONCE, Note, RankNotes
from megatron_policysplit.distributed.rendezvous import ranks_in_words
from megatron_policysplit.distributed.stop_signal import StopRequested
from megatron_policysplit.errors import FAILED

POLL_SECONDS = 0.25  # between looks once a failure is known


@dataclass(frozen=True)
class Pace:
    """How many seconds the watch takes for what.

    With these values a rank that was killed is noticed after about 31 s, and the last process
    leaves within a minute: 31 + 5 + 1 + 5 + 10.
    """

    beat: float = 1.0  # between two signs of life
    # Whoever holds Python's lock keeps the teller from its beat: to pickle all rollouts of a batch
    # or to collect garbage takes seconds. Half a minute is far above those, and below the control
    # group's time-out, which a rank that was suspended for longer would break anyway.
    silent: float = 30.0  # without a sign of life until a rank is taken for dead
    naming: float = 5.0  # for every rank to show that it runs, once one has failed
    telling: float = 5.0  # for every rank that runs to have read why the run ends
    leave: float = 10.0  # for the main thread to leave after that; twice if it has come out


@dataclass(frozen=True)
class Failure:
    """How an exception of this rank's main thread is reported."""

    text: str  # one line, with which ranks with the same line count as one
    code: int  # the exit code
    # For an error that is no sentence for the user, and that another rank's end may have caused:
    # the line goes on with which ranks do not answer, and then with `remark`.
    names_others: bool = False
    remark: str = ""
    is_of_a_peer: bool = False  # a connection closed or a collective timed out: others know better
    traceback: str = ""  # printed before the line


class RankWatch:
    """Watches the other ranks of a run, and tells them how this one ends. One per process.

    Until `start`, and in a world of one, there is nobody to watch and `fail` only prints.

    describe: how an exception of the main thread is reported. world_size: of the run.
    """

    def __init__(self, describe: Callable[[BaseException], Failure], world_size: int = 1):
        self._describe, self._world_size = describe, world_size
        self._started = False
        self._failure: Failure | None = None  # the main thread's own
        self._ends = False  # the main thread wants to leave in order
        self._first: Note | None = None  # the run's first failure, as it was left
        self._verdict: Note | None = None  # why the run ends
        self._wake = threading.Event()  # the teller has something to do
        self._noted = threading.Event()  # the main thread's failure is in the store, or is known
        self._told = threading.Event()  # the teller is through
        self._finished = threading.Event()  # the main thread leaves by itself
        self._settling = threading.Lock()

    # --- the main thread

    def start(
        self,
        store: dist.Store,
        rank: int,
        *,
        store_host: int | None = 0,
        pace: Pace = Pace(),  # noqa: B008 (frozen)
    ) -> None:
        """Begin to watch; every rank does as soon as all have met.

        store: that in which they met. It is cloned: a thread that waits in a store blocks every
            other thread that uses the same connection.
        store_host: the rank that hosts the store, which then leaves last; None if another process
            does, as under torchrun.
        """
        self._rank, self._store_host, self._pace = rank, store_host, pace
        self._notes = RankNotes(store.clone(), rank)
        self._answered = time.monotonic()  # when the store last did
        # The rank that this one looks at, its counter then, and how many looks found the same.
        self._watched, self._counter, self._looks = self._before(rank), -1, 0
        self._started = True
        for name, run in (("teller", self._tell), ("guard", self._guard)):
            threading.Thread(target=run, name=f"policysplit-{name}", daemon=True).start()

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Leave a note at once if the block raises, before what it has started is taken down.

        A stop signal is no failure.
        """
        try:
            yield
        except StopRequested:
            raise
        except BaseException as error:
            self._note(error)
            raise

    def fail(self, error: BaseException) -> int:
        """Report an exception that ends this rank; return the exit code to leave with.

        Where another rank had failed before, that failure is reported, with its code. Returns once
        it is known here, at most `naming` seconds later; on the rank that hosts the store once
        every rank that answers knows it, at most `telling` seconds after that.
        """
        if not self._started:
            failure = self._describe(error)
            others = (
                "no other rank takes part in this run"
                if self._world_size == 1
                else "the ranks had not met yet"
            )
            _say(failure.traceback + _whole_text(failure, others))
            return failure.code
        if self._failure is None:
            self._note(error)
        self._told.wait()
        self._finished.set()
        return self._verdict.code

    def end(self, code: int) -> int:
        """Tell the others that this rank leaves in order; return the exit code to leave with.

        That is `code`, unless a failure of another rank is known. The rank that hosts the store
        waits until all have left.
        """
        if self._started:
            self._ends = True
            self._wake.set()
            self._told.wait()
            self._finished.set()
        return code if self._verdict is None else self._verdict.code

    def _note(self, error: BaseException) -> None:
        if self._started and self._failure is None:
            self._failure = self._describe(error)
            self._wake.set()
            self._noted.wait(self._pace.naming)

    # --- the teller

    def _tell(self) -> None:
        try:
            note = self._watch()
            if note is not None:
                self._noted.set()
                self._settle(note)
        except dist.DistError:
            self._lose_store()
        except Exception as error:  # the main thread must not wait for a teller that is gone
            text = f"error: rank {self._rank} can watch the others no longer ({error!r})"
            self._conclude(Note(self._rank, text, FAILED), is_shared=False)
        self._noted.set()
        self._told.set()

    def _watch(self) -> Note | None:
        """Return the run's first failure; None once this rank may leave in order."""
        while not self._ends:
            self._notes.beat()
            if (note := self._first_note()) is not None:
                return note
            self._answered = time.monotonic()
            self._wake.wait(self._pace.beat)
            self._wake.clear()
        self._notes.mark_ended()
        if self._rank == self._store_host:
            while self._notes.ended() < self._world_size:
                if (note := self._first_note()) is not None:
                    return note
                self._answered = time.monotonic()
                time.sleep(min(POLL_SECONDS, self._pace.beat))
        return None

    def _first_note(self) -> Note | None:
        """Return the run's first failure; leave a note of it if it is this rank's to do so."""
        if (failure := self._failure) is not None:
            self._notes.mark_failed()
            note = Note(self._rank, failure.text, failure.code, not failure.names_others)
            return self._notes.leave(note)
        if (note := self._notes.note()) is not None:
            return note
        if (dead := self._dead_rank()) is not None:
            text = f"error: rank {dead} did not answer for {self._pace.silent:g} s"
            return self._notes.leave(Note(self._rank, text, FAILED, False, (dead,)))
        return None

    def _before(self, rank: int) -> int:
        return (rank - 1) % self._world_size

    def _dead_rank(self) -> int | None:
        """Look at the nearest rank before this one that has not ended; return it if it is dead."""
        if self._watched == self._rank:
            return None  # all others have ended
        counter = self._notes.beats(self._watched)
        while counter >= ENDED:
            self._watched, self._counter = self._before(self._watched), -1
            if self._watched == self._rank:
                return None
            counter = self._notes.beats(self._watched)
        # Looks are counted, not seconds: after a pause of the store, or of this process, a rank
        # that runs has had no time for a beat.
        self._looks = self._looks + 1 if counter == self._counter else 0
        self._counter = counter
        return self._watched if self._looks * self._pace.beat >= self._pace.silent else None

    def _settle(self, note: Note) -> None:
        """Bring all ranks that answer to the same verdict, and print it once."""
        self._first = note
        if not note.is_complete:
            if note.rank == self._rank:
                note = self._completed(note)
                self._notes.settle(note)
            else:
                # Its author may be gone by now; then the note has to do as it is.
                self._wait_until(lambda: self._notes.verdict() is not None, 2 * self._pace.naming)
                note = self._notes.verdict() or note
        self._conclude(note, is_shared=True)
        # The last word to the store: whoever hosts it leaves once all have said this, and torch
        # would print a trace in C++ for a request that it cuts off.
        self._notes.mark_told()
        if self._rank == self._store_host:
            answering = self._world_size - len(note.silent)
            self._wait_until(lambda: self._notes.told() >= answering, self._pace.telling)

    def _completed(self, note: Note) -> Note:
        """The note of this rank with the ranks that do not answer."""
        failure = self._failure if self._failure and self._failure.text == note.text else None
        # After a time-out, others that wait in the same collective are about to fail, too.
        is_late = failure is not None and "timed out" in failure.text.lower()
        counters = {r: self._notes.beats(r) for r in range(self._world_size) if r != self._rank}
        silent, working = set(counters) - set(note.silent), set(counters)

        def all_answer() -> bool:
            for rank in sorted(silent | (working if is_late else set())):
                counter = self._notes.beats(rank)
                if counter > counters[rank] or counter >= ENDED:
                    silent.discard(rank)
                if counter >= FAILED_ONCE:
                    working.discard(rank)
            return not silent and not (is_late and working)

        self._wait_until(all_answer, self._pace.naming)
        gone = tuple(sorted(silent | set(note.silent)))
        if failure is None:
            text = (
                f"error: {ranks_in_words(list(gone))} did not answer for {self._pace.silent:g} s: "
                "killed, out of memory, suspended, or without network; see the output of "
                f"{'that rank' if len(gone) == 1 else 'those ranks'} and the kernel's log there"
            )
            return replace(note, text=text, is_complete=True, silent=gone)
        others = "every rank still answers"
        if gone:
            others = f"{ranks_in_words(list(gone))} did not answer"
        elif is_late and working:
            others += f"; still at work: {ranks_in_words(sorted(working))}"
        return replace(note, text=_whole_text(failure, others), is_complete=True, silent=gone)

    def _wait_until(self, condition: Callable[[], bool], seconds: float) -> None:
        """Wait until it holds, at most so long, and go on to show that this rank runs."""
        deadline = time.monotonic() + seconds
        while True:
            self._notes.beat()
            holds = condition()
            self._answered = time.monotonic()
            if holds or self._answered > deadline:
                return
            time.sleep(min(POLL_SECONDS, self._pace.beat))

    # --- what either thread concludes

    def _lose_store(self) -> None:
        host = (
            "torchrun's agent, which hosts the store,"
            if self._store_host is None
            else f"rank {self._store_host}, which hosts the store,"
        )
        others = f"{host} does not answer"
        text, code = f"error: {others}", FAILED
        if (failure := self._failure) is not None:
            text, code = _whole_text(failure, others), failure.code
        # Who hosts the store may have left for a failure that this rank had heard of already.
        verdict = self._first or Note(self._rank, text, code)
        self._conclude(verdict, is_shared=False)

    def _conclude(self, verdict: Note, *, is_shared: bool) -> None:
        """Take it for why the run ends, unless that is settled, and print it.

        is_shared: whether the store is asked who prints it for all ranks. The guard must not ask.
        """
        with self._settling:
            if self._verdict is not None:
                return
            self._verdict = verdict
        failure, lines = self._failure, [verdict.text]
        if failure is not None and verdict.rank != self._rank and not failure.is_of_a_peer:
            # A second failure, which the first one did not cause.
            lines += [failure.text + failure.remark] * (failure.text != verdict.text)
        if failure is not None and (verdict.rank == self._rank or not failure.is_of_a_peer):
            _say(failure.traceback.rstrip())
        for line in lines:
            if not is_shared or self._notes.is_first_to_say(line):
                _say(line)

    # --- the guard

    def _guard(self) -> None:
        ticked = time.monotonic()
        while not self._told.wait(self._pace.beat):
            now = time.monotonic()
            if now - ticked > 3 * self._pace.beat:
                self._answered = now  # this process stood still itself: the teller, too
            ticked = now
            if now - self._answered > self._pace.silent:
                self._lose_store()
                self._noted.set()
                self._told.set()
        if self._verdict is None:
            return  # this rank leaves in order
        if self._failure is None:
            # Aborting may wait for the device: not in this thread, which has to end the process.
            threading.Thread(target=abort_collectives, daemon=True).start()
        # A main thread that has come out takes down what it started: engines, logs.
        for _ in range(2):
            if self._finished.wait(self._pace.leave):
                return
            if self._failure is None:
                break
        os._exit(self._verdict.code)


def _whole_text(failure: Failure, others: str) -> str:
    if not failure.names_others:
        return failure.text
    return f"{failure.text}; {others}{failure.remark}"


def _say(text: str) -> None:
    if text:
        # In one piece: the main thread may print meanwhile.
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
