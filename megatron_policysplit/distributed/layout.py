"""Where a rank stands among all ranks, and the gloo groups over which rows and decisions travel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass
class Layout:
    """Where this rank stands, and the gloo groups it needs.

    world: all ranks. control: all ranks again, with a short time-out (`control.py`).
    replica: the TP x PP ranks of this replica. leaders: the leaders of all replicas; None on other
    ranks.
    sequence: whether hidden states are split over the tensor-parallel ranks by position. expert:
    replicas in a row that share one copy of the experts.
    """

    rank: int
    tensor: int
    pipeline: int
    data: int
    tensor_rank: int
    pipeline_rank: int
    data_rank: int
    world: dist.ProcessGroup
    control: dist.ProcessGroup
    replica: dist.ProcessGroup
    leaders: dist.ProcessGroup | None
    leader_ranks: list[int]
    sequence: bool = False
    expert: int = 1

    @property
    def is_leader(self) -> bool:
        return self.leaders is not None

    @property
    def is_chief(self) -> bool:
        return self.rank == self.chief

    @property
    def chief(self) -> int:
        """Global rank of the chief."""
        return self.leader_ranks[0]

    @property
    def leader(self) -> int:
        """Global rank of this replica's leader."""
        return self.leader_ranks[self.data_rank]

    @property
    def is_exported(self) -> bool:
        """Whether this replica is the first, or has experts of the first: whose weights the chief
        exports.
        """
        return self.data_rank < self.expert

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline - 1

    def broadcast_from_leader(self, value: Any) -> Any:
        """The leader's `value` on every rank of the replica (a broadcast; collective over the
        replica).
        """
        return _broadcast(value, self.leader, self.replica)

    def broadcast_from_chief(self, value: Any) -> Any:
        """The chief's `value` on every rank (a broadcast; collective over the world)."""
        return _broadcast(value, self.chief, self.world)

    def barrier(self) -> None:
        """Wait for all ranks, however long one was busy writing (a barrier over the world)."""
        dist.barrier(group=self.world)

    def all_reduce_max(self, value: float) -> float:
        """The largest `value` of all ranks (one all-reduce over the world)."""
        box = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(box, op=dist.ReduceOp.MAX, group=self.world)
        return box.item()

    def all_gather_leaders(self, value: Any) -> list[Any]:
        """Every leader's `value` in replica order, on leaders (an all-gather over leaders); []
        elsewhere.
        """
        if self.leaders is None:
            return []
        if self.data == 1:
            return [value]
        values: list[Any] = [None] * self.data
        dist.all_gather_object(values, value, group=self.leaders)
        return values


def _broadcast(value: Any, source: int, group: dist.ProcessGroup) -> Any:
    box = [value]
    dist.broadcast_object_list(box, src=source, group=group)
    return box[0]
