"""Process groups: Megatron's own, and the gloo groups over which rows and decisions travel.

A *replica* is one copy of the model, TP x PP ranks. Its *leader* is the tensor-rank-0 rank of the last
pipeline stage: it generates, and token statistics are born there. The *chief*, leader of replica 0,
logs and writes. Model parallelism is Megatron's; the groups here carry Python objects between CPUs.

Under expert parallelism EP replicas in a row share one copy of the experts. Every layer sends tokens between them, so
they run the same number of forward and backward passes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_policysplit.actor import megatron_on_cpu as cpu
from megatron_policysplit.config import ParallelConfig
from megatron_policysplit.errors import ConfigError

CONTROL_TIMEOUT_SECONDS = 45


@dataclass
class Layout:
    """Where this rank stands, and the gloo groups it needs.

    world: all ranks. control: all ranks again, with a short time-out (`control.py`).
    replica: the TP x PP ranks of this replica. leaders: the leaders of all replicas; None on other ranks.
    sequence: whether hidden states are split over the tensor-parallel ranks by position. expert: replicas in a row
    that share one copy of the experts.
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
        """Whether this replica is the first, or has experts of the first: whose weights the chief exports."""
        return self.data_rank < self.expert

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline - 1

    def from_leader(self, value: Any) -> Any:
        """The leader's `value` on every rank of the replica (a broadcast; collective over the replica)."""
        return _broadcast(value, self.leader, self.replica)

    def from_chief(self, value: Any) -> Any:
        """The chief's `value` on every rank (a broadcast; collective over the world)."""
        return _broadcast(value, self.chief, self.world)

    def meet(self) -> None:
        """Wait for all ranks, however long one was busy writing (a barrier over the world)."""
        dist.barrier(group=self.world)

    def largest(self, value: float) -> float:
        """The largest `value` of all ranks (one all-reduce over the world)."""
        box = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(box, op=dist.ReduceOp.MAX, group=self.world)
        return box.item()

    def gather_leaders(self, value: Any) -> list[Any]:
        """Every leader's `value` in replica order, on leaders (an all-gather over leaders); [] elsewhere."""
        if self.leaders is None:
            return []
        if self.data == 1:
            return [value]
        values: list[Any] = [None] * self.data
        dist.all_gather_object(values, value, group=self.leaders)
        return values


def initialize(parallel: ParallelConfig, seed: int, *, timeout_seconds: float = 3600.0) -> Layout:
    """Set torch.distributed, Megatron's groups and the model-parallel RNG up, from RANK, WORLD_SIZE, MASTER_*.

    timeout_seconds: of a training collective; ranks that write no part of a checkpoint wait in one for those that do.
    A process started alone (no RANK) is a world of one. Raises ConfigError if the world's size is not
    the product of the parallel sizes.
    """
    cpu.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    wanted = parallel.tensor * parallel.pipeline * parallel.data
    if world_size != wanted:
        raise ConfigError(
            f"{world_size} processes are running but parallel.tensor={parallel.tensor} x parallel.pipeline="
            f"{parallel.pipeline} x parallel.data={parallel.data} needs {wanted}; start as many or change the layout"
        )
    cpu.set_device(int(os.environ.get("LOCAL_RANK", rank)))
    timeout = timedelta(seconds=timeout_seconds)
    if world_size == 1:
        dist.init_process_group(cpu.backend(), store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(cpu.backend(), rank=rank, world_size=world_size, timeout=timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        expert_model_parallel_size=parallel.expert,
        distributed_timeout_minutes=max(1, int(timeout_seconds // 60)),
    )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    return _layout(parallel, rank)


def _layout(parallel: ParallelConfig, rank: int) -> Layout:
    from megatron.core import parallel_state

    tensor_rank = parallel_state.get_tensor_model_parallel_rank()
    pipeline_rank = parallel_state.get_pipeline_model_parallel_rank()
    data_rank = parallel_state.get_data_parallel_rank()
    place = (data_rank, pipeline_rank, tensor_rank)
    places: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(places, place)
    by_place = {place: rank for rank, place in enumerate(places)}
    last = parallel.pipeline - 1
    leader_ranks = [by_place[data, last, 0] for data in range(parallel.data)]

    world = dist.new_group(backend="gloo")
    control = dist.new_group(backend="gloo", timeout=timedelta(seconds=CONTROL_TIMEOUT_SECONDS))
    replica = None
    for data in range(parallel.data):
        ranks = [rank for rank, place in enumerate(places) if place[0] == data]
        group = dist.new_group(ranks, backend="gloo")
        if data == data_rank:
            replica = group
    leaders = dist.new_group(leader_ranks, backend="gloo")
    return Layout(
        rank=rank,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        data=parallel.data,
        tensor_rank=tensor_rank,
        pipeline_rank=pipeline_rank,
        data_rank=data_rank,
        world=world,
        control=control,
        replica=replica,
        leaders=leaders if rank in leader_ranks else None,
        leader_ranks=leader_ranks,
        sequence=parallel.sequence,
        expert=parallel.expert,
    )


def shutdown() -> None:
    """Leave all process groups."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _broadcast(value: Any, source: int, group: dist.ProcessGroup) -> Any:
    box = [value]
    dist.broadcast_object_list(box, src=source, group=group)
    return box[0]
