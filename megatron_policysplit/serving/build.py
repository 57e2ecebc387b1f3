"""Builds what serves rollouts: the engine of a leader and, with rollout.engine=sglang, the fleet
behind it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path

import torch.distributed as dist

from checkpoints_conv import read_hf_config
from megatron_policysplit.config import Config
from megatron_policysplit.config.engine_checks import is_loopback
from megatron_policysplit.config.secrets import api_key
from megatron_policysplit.data.tokenizer import load_tokenizer
from megatron_policysplit.distributed.control import Control
from megatron_policysplit.distributed.device import gpu_count
from megatron_policysplit.distributed.layout import Layout
from megatron_policysplit.errors import ConfigError
from megatron_policysplit.rollout.sglang_http import SglangClient
from megatron_policysplit.serving.fleet import Fleet
from megatron_policysplit.serving.identity import Identity
from megatron_policysplit.serving.members import Member, Placement
from megatron_policysplit.serving.placement import place_engines
from megatron_policysplit.serving.router import Router
from megatron_policysplit.serving.servers import Server, server_spec


def place(config: Config, layout: Layout) -> list[Placement]:
    """Where the engines stand; the same on every rank."""
    rollout = config.rollout
    local = os.environ.get("LOCAL_WORLD_SIZE")
    started = (
        not rollout.addresses or len(rollout.addresses) > 1
    )  # servers, or a router in front of given ones
    if (
        started
        and local
        and int(local) < dist.get_world_size()
        and is_loopback(rollout.server.host)
    ):
        raise ConfigError(
            f"rollout.server.host={rollout.server.host} cannot be reached from the other nodes of "
            "this run; set it to "
            "0.0.0.0, and rollout.api_key_variable"
        )
    return place_engines(
        dist.get_world_size(),
        layout.chief,
        count=len(rollout.addresses) or rollout.server.count,
        tensor=rollout.server.tensor,
        colocated=rollout.colocated,
        local_world_size=int(local) if local else None,
    )


def build_fleet(
    config: Config,
    layout: Layout,
    control: Control,
    placements: list[Placement],
    log: Callable[[str], None],
) -> Fleet:
    """The fleet of this rank, nothing started yet. Raises ConfigError or EngineError (a port that
    is taken).
    """
    rollout, key = config.rollout, api_key(config)
    if (
        not rollout.addresses
        and not rollout.colocated
        and not rollout.server.devices
        and layout.is_chief
    ):
        config = _on_other_gpus(config, len(placements))
    members, servers = [], {}
    for placement in placements:
        if placement.owner != layout.rank:
            continue
        if rollout.addresses:
            address = rollout.addresses[placement.index]
        else:
            gpus = [_local_rank(rank) for rank in placement.ranks] if rollout.colocated else []
            server = servers[placement.index] = Server(
                server_spec(config, placement.index, local_gpus=gpus)
            )
            server.hold_ports(1)
            address = server.address
        client = SglangClient(address, key, timeout_seconds=config.weight_sync.timeout_seconds)
        members.append(Member(placement, client, rollout.server.tensor))
    router = None
    if layout.is_chief and len(placements) > 1:
        server = rollout.server
        router = Router(
            server.python or sys.executable,
            server.host,
            server.port + len(placements) if server.port else 0,
            key,
            Path(config.run.dir) / "logs" / "sglang_router.log",
            request_seconds=rollout.request_seconds,
        )
        router.hold_ports(1)
    identity = None
    if members:
        longest = config.data.max_prompt_tokens + rollout.max_response_tokens
        identity = Identity.of(
            read_hf_config(config.model.path), load_tokenizer(config.model.path), longest
        )
    if not layout.is_chief:
        log = _to_stderr
    return Fleet(config, layout, control, members, servers, router, identity, log)


def _on_other_gpus(config: Config, count: int) -> Config:
    """The configuration with the GPUs after the actor's for the servers; ConfigError if there are
    too few.
    """
    gpus = gpu_count()
    if gpus == 0:
        return config
    actors = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    needed = count * config.rollout.server.tensor
    if gpus < actors + needed:
        raise ConfigError(
            f"{count} servers of rollout.server.tensor={config.rollout.server.tensor} need "
            f"{needed} GPUs beside the "
            f"{actors} of the actor, but this machine has {gpus}; set rollout.colocated=true, "
            "rollout.addresses, "
            "or rollout.server.devices"
        )
    config = deepcopy(config)
    config.rollout.server.devices = list(range(actors, actors + needed))
    return config


def open_fleet(fleet: Fleet, layout: Layout, control: Control, resources: ExitStack) -> str:
    """Start all servers and wait for them (collective over all ranks); the address that requests go
    to.

    Raises EngineError on every rank if a server cannot start or is not the one that is needed;
    StopRequested.
    """
    resources.callback(fleet.close)
    layout.barrier()
    control.attend(fleet.open() if fleet.members or fleet.router else None)
    front = fleet.router or next(iter(fleet.members), None)
    fronts: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(fronts, front and front.address, group=layout.world)
    # Without a router there is one engine, which another rank than the chief owns where it stands
    # on the first stage.
    return fronts[layout.chief] or next(address for address in fronts if address is not None)


def _local_rank(rank: int) -> int:
    """The number of a rank on its node; ranks are numbered node by node."""
    return rank % int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))


def _to_stderr(text: str) -> None:
    print(f"rank {dist.get_rank()}: {text}", file=sys.stderr, flush=True)
