"""A trainer's side of a weight sync, without the rest of a run: to be called in every rank of a test's world."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_policysplit.config import Config


def sync_config(path: Path, run_dir: Path, transport: str, addresses: Sequence[str], **layout: int) -> Config:
    """Small buckets, so that there are several, and short time limits."""
    config = Config()
    config.run.dir = str(run_dir)
    config.model.path, config.model.dtype = str(path), "float32"
    config.rollout.engine, config.rollout.addresses = "sglang", list(addresses)
    config.weight_sync.transport, config.weight_sync.bucket_mib = transport, 1
    config.weight_sync.timeout_seconds = 30.0
    for name, size in layout.items():
        setattr(config.parallel, name, size)
    return config


@contextmanager
def syncing(config: Config, sizes: Sequence[int] = (), **options) -> Iterator[tuple]:
    """(sync, members of this rank by index, actor, layout). sizes: tensor-parallel sizes of the engines, 1 if none."""
    from checkpoints_conv import read_hf_config
    from megatron_policysplit.actor import parallel
    from megatron_policysplit.actor.actor import Actor
    from megatron_policysplit.distributed.control import Control
    from megatron_policysplit.distributed.stop_signal import StopSignal
    from megatron_policysplit.rollout.sglang_http import SglangClient
    from megatron_policysplit.serving.members import Member, Placement, State
    from megatron_policysplit.weight_sync import WeightSync, sync_settings

    addresses = config.rollout.addresses
    sizes = sizes or [1] * len(addresses)
    layout = parallel.initialize(config.parallel, seed=0, timeout_seconds=120)
    control = Control(layout.control, StopSignal())
    placements, first = [], 0
    for index, size in enumerate(sizes):
        ranks = tuple(range(first, first + size)) if config.rollout.colocated else (layout.chief,)
        placements.append(Placement(index, ranks[0], ranks))
        first += size
    limit = config.weight_sync.timeout_seconds
    members = [
        Member(place, SglangClient(address, timeout_seconds=limit), size, state=State.WAITING)
        for place, address, size in zip(placements, addresses, sizes, strict=True)
        if place.owner == layout.rank
    ]
    if config.rollout.colocated:
        config.rollout.addresses = []  # colocated servers are the run's own
    actor = Actor(config, read_hf_config(config.model.path), layout)
    sync = WeightSync(sync_settings(config), layout, control, actor, placements, members, **options)
    try:
        yield sync, {member.index: member for member in members}, actor, layout
    finally:
        sync.close()
        for member in members:
            control.run(member.client.close())
        control.close()
        parallel.shutdown()
