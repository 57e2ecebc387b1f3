"""The processes that share a conversion: one, or those of torch.distributed's default group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """This process's number and their count; a single one needs no torch.distributed."""

    rank: int = 0
    size: int = 1

    def together(self, work: Callable[[], Result]) -> Result:
        """Run `work` on every rank; if one raises, all raise its error.

        Costs one all-gather of an object.
        """
        result, error = None, None
        try:
            result = work()
        except Exception as raised:  # raised again below, on all ranks
            error = raised
        for failure in self.gathered(error):
            if failure is not None:
                raise failure
        return result  # type: ignore[return-value]

    def first(self, work: Callable[[], Any]) -> None:
        """Run `work` on rank 0 while the others wait; if it raises, all raise its error.

        Costs one all-gather of an object.
        """
        self.together(work if self.rank == 0 else lambda: None)

    def share(self, items: Sequence[Item], size_of: Callable[[Item], int]) -> list[Item]:
        """This rank's part of `items`: consecutive ones of about an equal share of the sizes.

        An item goes to the rank in whose share of the total size it begins.
        """
        total, before, local_items = sum(size_of(item) for item in items), 0, []
        for item in items:
            if before * self.size // max(total, 1) == self.rank:
                local_items.append(item)
            before += size_of(item)
        return local_items

    def gathered(self, value: Any) -> list[Any]:
        """The `value` of every rank, in rank order, on every rank (one all-gather of an object)."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


def group_ranks() -> Ranks:
    """The ranks of torch.distributed's default group; this process alone if it is not initialized.

    The group's backend must exchange objects of the CPU, as gloo does. Give it a time-out of hours:
    rank 0 has the whole model on the disk while the others wait.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        return Ranks()
    return Ranks(dist.get_rank(), dist.get_world_size())
