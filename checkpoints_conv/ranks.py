"""One process, or several started by torchrun that share a conversion."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """This process is number `rank` of `size`; alone it needs no torch.distributed."""

    rank: int = 0
    size: int = 1

    def together(self, work: Callable[[], Result]) -> Result:
        """Every rank works; if one raises, all raise its error (one all-gather of an object)."""
        result, error = None, None
        try:
            result = work()
        except Exception as raised:  # raised again below, on all ranks
            error = raised
        for found in self.gathered(error):
            if found is not None:
                raise found
        return result  # type: ignore[return-value]

    def first(self, work: Callable[[], Any]) -> None:
        """Rank 0 works while the others wait; if it raises, all raise its error (one all-gather of
        an object).
        """
        self.together(work if self.rank == 0 else lambda: None)

    def share(self, items: Sequence[Item], size_of: Callable[[Item], int]) -> list[Item]:
        """This rank's part of `items`: consecutive ones, of about a `size`-th of all that `size_of`
        adds up to.
        """
        total, before, mine = sum(size_of(item) for item in items), 0, []
        for item in items:
            if before * self.size // max(total, 1) == self.rank:
                mine.append(item)
            before += size_of(item)
        return mine

    def gathered(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order, on every rank (one all-gather of an object)."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


def started_ranks() -> Ranks:
    """The ranks that torchrun started, joined in a gloo group (RANK, WORLD_SIZE, MASTER_*); alone
    without it.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Ranks()
    import torch.distributed as dist

    if not dist.is_initialized():
        # Rank 0 has the whole model on the disk while the others wait, which takes longer than the
        # usual 30 minutes on slow ones. A rank that dies is noticed at once all the same: its
        # connections end.
        dist.init_process_group("gloo", timeout=timedelta(days=1))
    return Ranks(dist.get_rank(), size)
