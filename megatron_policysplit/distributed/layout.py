"""Where a rank stands among all ranks, and the gloo groups over which rows and decisions travel.

A **replica** is one copy of the model: `tensor` x `pipeline` ranks. Its **leader** is tensor rank 0
of the last pipeline stage. The **chief** is the leader of replica 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass
class Layout:
    """Where this rank stands, and our own gloo groups. Made by `actor.parallel.initialize`."""

    rank: int  # in the world; equal to the rank in `control`
    tensor: int  # tensor-parallel size
    pipeline: int  # pipeline-parallel size
    data: int  # number of replicas
    tensor_rank: int
    pipeline_rank: int
    data_rank: int  # number of this rank's replica
    world: dist.ProcessGroup  # all ranks, with parallel.timeout_seconds
    control: dist.ProcessGroup  # all ranks again, with a short time-out (`control.py`)
    replica: dist.ProcessGroup  # the ranks of this replica
    leaders: dist.ProcessGroup | None  # the leaders of all replicas; None on other ranks
    leader_ranks: list[int]  # global rank of each replica's leader
    sequence: bool = False  # hidden states are split over the tensor-parallel ranks by position
    expert: int = 1  # so many replicas in a row share one copy of the experts

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
        """Whether the chief's export needs this replica: the first, and those with its experts."""
        return self.data_rank < self.expert

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline - 1

    def broadcast_from_leader(self, value: Any) -> Any:
        """Return the leader's `value` on every rank of its replica.

        One broadcast of an object over the replica, which is two collectives (size, bytes).
        """
        return _broadcast(value, self.leader, self.replica)

    def broadcast_from_chief(self, value: Any) -> Any:
        """Return the chief's `value` on every rank.

        One broadcast of an object over the world, which is two collectives (size, bytes).
        """
        return _broadcast(value, self.chief, self.world)

    def barrier(self) -> None:
        """Wait for all ranks, however long one is busy (one barrier over the world)."""
        dist.barrier(group=self.world)

    def all_reduce_max(self, value: float) -> float:
        """Return the largest `value` of all ranks (one all-reduce over the world)."""
        box = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(box, op=dist.ReduceOp.MAX, group=self.world)
        return box.item()

    def all_gather_leaders(self, value: Any) -> list[Any]:
        """Return every leader's `value` in replica order on leaders, [] on other ranks.

        With several replicas one all-gather of an object over leaders, which is two collectives;
        other ranks take no part and need not call it.
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
