"""Builds the SGLang engines of a run (rollout.engine=sglang) and opens the fleet of them."""

from __future__ import annotations

import os
import sys
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
from megatron_policysplit.serving.fleet import EngineSet, Fleet
from megatron_policysplit.serving.identity import Identity
from megatron_policysplit.serving.members import Member, Placement
from megatron_policysplit.serving.placement import place_engines
from megatron_policysplit.serving.router import Router
from megatron_policysplit.serving.servers import Server, server_spec


def place(config: Config, layout: Layout) -> list[Placement]:
    """Where the engines stand; the same on every rank."""
    rollout = config.rollout
    local = os.environ.get("LOCAL_WORLD_SIZE")
    # The run starts servers, or a router in front of several given ones.
    starts_something = not rollout.addresses or len(rollout.addresses) > 1
    several_nodes = bool(local) and int(local) < dist.get_world_size()
    if starts_something and several_nodes and is_loopback(rollout.server.host):
        raise ConfigError(
            f"rollout.server.host={rollout.server.host} cannot be reached from the other nodes of "
            "this run; set it to 0.0.0.0, and rollout.api_key_variable"
        )
    return place_engines(
        dist.get_world_size(),
        layout.chief,
        count=len(rollout.addresses) or rollout.server.count,
        tensor=rollout.server.tensor,
        colocated=rollout.colocated,
        local_world_size=int(local) if local else None,
    )


def build_engines(config: Config, layout: Layout) -> EngineSet:
    """The engines as this rank has them, with their ports held and nothing started yet.

    Raises ConfigError, or EngineError for a port that is taken, on this rank alone.
    """
    rollout, placements = config.rollout, place(config, layout)
    key = api_key(rollout)
    apart = not rollout.addresses and not rollout.colocated
    if apart and not rollout.server.devices and layout.is_chief:
        config = _on_other_gpus(config, len(placements))
    members, servers = [], {}
    for placement in placements:
        if placement.owner != layout.rank:
            continue
        if rollout.addresses:
            address = rollout.addresses[placement.index]
        else:
            gpus = [_local_rank(rank) for rank in placement.ranks] if rollout.colocated else []
            server = Server(server_spec(config, placement.index, local_gpus=gpus))
            server.hold_ports(1)
            servers[placement.index], address = server, server.address
        client = SglangClient(address, key, timeout_seconds=config.weight_sync.timeout_seconds)
        members.append(Member(placement, client, rollout.server.tensor))
    router = None
    if layout.is_chief and len(placements) > 1:
        router = _router(config, key, len(placements))
        router.hold_ports(1)
    identity = None
    if members:
        longest = config.data.max_prompt_tokens + rollout.max_response_tokens
        tokenizer = load_tokenizer(config.model.path)
        identity = Identity.of(read_hf_config(config.model.path), tokenizer, longest)
    return EngineSet(placements, members, servers, router, identity)


def _router(config: Config, key: str | None, engines: int) -> Router:
    """The router in front of several engines; its port, if it has a fixed one, follows theirs."""
    server = config.rollout.server
    return Router(
        server.python or sys.executable,
        server.host,
        server.port + engines if server.port else 0,
        key,
        Path(config.run.dir) / "logs" / "sglang_router.log",
        request_seconds=config.rollout.request_seconds,
    )


def _on_other_gpus(config: Config, count: int) -> Config:
    """The configuration with the GPUs after the actor's as the servers'.

    Raises ConfigError if there are too few.
    """
    gpus = gpu_count()
    if gpus == 0:
        return config
    actors = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    needed = count * config.rollout.server.tensor
    if gpus < actors + needed:
        raise ConfigError(
            f"{count} servers of rollout.server.tensor={config.rollout.server.tensor} need "
            f"{needed} GPUs beside the {actors} of the actor, but this machine has {gpus}; set "
            "rollout.colocated=true, rollout.addresses, or rollout.server.devices"
        )
    config = deepcopy(config)
    config.rollout.server.devices = list(range(actors, actors + needed))
    return config


def open_fleet(fleet: Fleet, layout: Layout, control: Control, resources: ExitStack) -> str:
    """Start all servers and wait for them; the address that requests go to (over all ranks).

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
