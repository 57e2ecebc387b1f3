"""Sets process groups up: Megatron's own, and the gloo groups over which rows and decisions travel.

A *replica* is one copy of the model, TP x PP ranks. Its *leader* is the tensor-rank-0 rank of the
last pipeline stage: it generates, and token statistics are computed there. The *chief*, leader of
replica 0, logs and writes. Model parallelism is Megatron's; the groups made here carry Python
objects between CPUs.

Under expert parallelism EP replicas in a row share one copy of the experts. Every layer sends
tokens between them, so they run the same number of forward and backward passes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_policysplit.actor.megatron_on_cpu import install
from megatron_policysplit.config import ParallelConfig
from megatron_policysplit.distributed.device import backend, set_device
from megatron_policysplit.distributed.layout import Layout
from megatron_policysplit.distributed.rank_variables import rank_place
from megatron_policysplit.distributed.rank_watch import Pace, RankWatch
from megatron_policysplit.distributed.rendezvous import meet, store_host
from megatron_policysplit.distributed.stop_signal import StopSignal
from megatron_policysplit.errors import ConfigError

# Of the control group alone, whose heartbeat must notice a dead rank soon.
CONTROL_TIMEOUT_SECONDS = 45


def initialize(
    parallel: ParallelConfig,
    seed: int,
    *,
    timeout_seconds: float | None = None,
    environ: Mapping[str, str] = os.environ,
    stop: StopSignal | None = None,
    watch: RankWatch | None = None,
) -> Layout:
    """Set torch.distributed, Megatron's groups and the model-parallel RNG up.

    A process that was started alone (no RANK) is a world of one. Collective over all ranks. Raises
    ConfigError if the world's size is not the product of the parallel sizes, and what
    `rendezvous.meet` raises while ranks wait for each other.

    timeout_seconds: of every collective but the control group's; parallel.timeout_seconds if None.
    environ: where RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* are; {} for a process that is alone
        whatever is set.
    stop: ends the wait for other ranks.
    watch: begins as soon as all ranks have met, so that one that fails in here is noticed, too.
    """
    # Before Megatron is imported: without a GPU it asks for CUDA already then.
    install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    place = rank_place(environ) if "RANK" in environ else None
    rank, local_rank, world_size = (
        (0, 0, 1) if place is None else (place.rank, place.local_rank, place.world_size)
    )
    needed = parallel.tensor * parallel.pipeline * parallel.data
    if world_size != needed:
        raise ConfigError(
            f"{world_size} processes are running but parallel.tensor={parallel.tensor} x "
            f"parallel.pipeline={parallel.pipeline} x parallel.data={parallel.data} "
            f"needs {needed}; start as many or change the layout"
        )
    set_device(local_rank)
    if timeout_seconds is None:
        timeout_seconds = parallel.timeout_seconds
    timeout = timedelta(seconds=timeout_seconds)
    if world_size == 1:
        # A store in memory: a process that is alone needs no port.
        dist.init_process_group(
            backend(), store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
        )
    else:
        store = meet(stop or StopSignal(), timeout_seconds=timeout_seconds, environ=environ)
        if watch is not None:
            pace = Pace(silent=parallel.silent_seconds)
            watch.start(store, rank, store_host=store_host(environ), pace=pace)
        dist.init_process_group(
            backend(), store=store, rank=rank, world_size=world_size, timeout=timeout
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        expert_model_parallel_size=parallel.expert,
        distributed_timeout_minutes=math.ceil(timeout_seconds / 60),
    )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    return _layout(parallel, rank, timeout)


def _layout(parallel: ParallelConfig, rank: int, timeout: timedelta) -> Layout:
    """Make the gloo groups and describe this rank's place. Collective over all ranks."""
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

    # `new_group` is collective over the world: every rank makes every group, in the same order,
    # also those to which it does not belong.
    world = dist.new_group(backend="gloo", timeout=timeout)
    control = dist.new_group(backend="gloo", timeout=timedelta(seconds=CONTROL_TIMEOUT_SECONDS))
    replica = None
    for data in range(parallel.data):
        ranks = [rank for rank, place in enumerate(places) if place[0] == data]
        group = dist.new_group(ranks, backend="gloo", timeout=timeout)
        if data == data_rank:
            replica = group
    leaders = dist.new_group(leader_ranks, backend="gloo", timeout=timeout)
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
