"""What ranks tell each other about failures, in the store in which they met.

Under NCCL nothing else tells a rank that another one is gone: its kernels spin until the time-out
of the collective. The keys are few, so that a thousand ranks can share one store: a counter per
rank, one note, and two counters of ranks.

- `beats/RANK` grows while that rank's process runs. FAILED_ONCE is added when its main thread has
  raised, ENDED when it leaves in order.
- `note` is the first failure of the run. Whoever comes later reads it instead of leaving one.
- `verdict` is that note once it says which ranks do not answer.
- `told` counts the ranks that have the verdict or have left in order, `ended` the latter.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

import torch.distributed as dist

# Far above what a rank adds by its beats, so that one number holds all three.
FAILED_ONCE, ENDED = 10**9, 10**12


@dataclass(frozen=True)
class Note:
    """Why the run ends, the same on every rank."""

    rank: int  # who left it
    text: str  # the line that is printed, once for all ranks
    code: int  # every rank's exit code
    is_complete: bool = True  # otherwise the ranks that do not answer are still to be named
    silent: tuple[int, ...] = ()  # the ranks that do not answer


class RankNotes:
    """One rank's access to the notes.

    Every method is one to three round trips to the store and raises dist.DistError (a RuntimeError)
    once the store is gone. A store whose process is stopped does not answer at all: the time-out of
    a store does not hold for these calls, so they belong into a thread that may be left behind.

    store: a connection that no other thread uses; a thread that waits in a store blocks it for all.
    """

    def __init__(self, store: dist.Store, rank: int):
        self._store, self._rank = dist.PrefixStore("policysplit/ranks", store), rank

    def beat(self) -> None:
        """Show that this rank's process runs."""
        self._store.add(self._beats_key(self._rank), 1)

    def beats(self, rank: int) -> int:
        """Return a rank's counter; 0 if it has not begun."""
        return self._store.add(self._beats_key(rank), 0)

    def mark_failed(self) -> None:
        """Say that this rank's main thread has raised."""
        self._store.add(self._beats_key(self._rank), FAILED_ONCE)

    def mark_ended(self) -> None:
        """Say that this rank leaves in order."""
        self._store.add(self._beats_key(self._rank), ENDED)
        self._store.add("told", 1)
        self._store.add("ended", 1)

    def ended(self) -> int:
        """Return how many ranks have left in order."""
        return self._store.add("ended", 0)

    def leave(self, note: Note) -> Note:
        """Leave a note unless there is one; return the one that is there then."""
        return _parse(self._store.compare_set("note", "", json.dumps(asdict(note))))

    def note(self) -> Note | None:
        """Return the run's first failure, if there is one."""
        return self._get("note")

    def settle(self, verdict: Note) -> None:
        """Complete the note. Only the rank that left it may."""
        self._store.set("verdict", json.dumps(asdict(verdict)))

    def verdict(self) -> Note | None:
        """Return the completed note, once it is there."""
        return self._get("verdict")

    def mark_told(self) -> None:
        """Say that this rank has the verdict."""
        self._store.add("told", 1)

    def told(self) -> int:
        """Return how many ranks have the verdict or have left in order."""
        return self._store.add("told", 0)

    def is_first_to_say(self, text: str) -> bool:
        """Whether no other rank has asked this for the same text: then this one prints it."""
        return self._store.add(f"said/{hashlib.sha256(text.encode()).hexdigest()[:16]}", 1) == 1

    def _get(self, key: str) -> Note | None:
        return _parse(self._store.get(key)) if self._store.check([key]) else None

    @staticmethod
    def _beats_key(rank: int) -> str:
        return f"beats/{rank}"


def _parse(value: bytes) -> Note:
    fields = json.loads(value)
    return Note(**{**fields, "silent": tuple(fields["silent"])})
