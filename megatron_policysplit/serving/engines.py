"""The engines of a run as one rank has them, and what the ranks tell each other about them.

They do so before weights are given, so that all ranks give them to the same engines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from megatron_policysplit.distributed.layout import Layout
from megatron_policysplit.serving.identity import Identity
from megatron_policysplit.serving.members import Member, Placement, State
from megatron_policysplit.serving.router import Router
from megatron_policysplit.serving.servers import Server


@dataclass(frozen=True)
class EngineSet:
    """The engines of a run as one rank has them, before anything is started."""

    placements: Sequence[Placement]  # of all engines, the same on every rank
    members: Sequence[Member]  # the engines that this rank owns
    servers: Mapping[int, Server]  # by engine, those of them that the run starts itself
    router: Router | None  # on the chief, where there are several engines
    identity: Identity | None  # what an engine must be to serve this run; None without members


@dataclass(frozen=True)
class EngineStatus:
    """What a rank tells the others about an engine it owns."""

    index: int
    address: str
    state: State


def gather_statuses(layout: Layout, members: Sequence[Member]) -> list[EngineStatus]:
    """Return the status of every engine of the run (one all-gather of an object over the world)."""
    statuses = [EngineStatus(member.index, member.address, member.state) for member in members]
    return [status for part in _all_gather(layout, statuses) for status in part]


def gather_engines(layout: Layout, engines: set[int]) -> set[int]:
    """Return the union of all ranks' engines (one all-gather of an object over the world)."""
    return {index for part in _all_gather(layout, engines) for index in part}


def addresses_in_service(
    statuses: Sequence[EngineStatus],
    members: Sequence[Member],
    engines: set[int],
    failed: Mapping[int, str],
) -> set[str]:
    """Return the addresses of the engines that serve, after a sync.

    statuses: of all engines, before the sync.
    members: the engines of this rank, of which it knows how they stand now.
    engines: those that the sync gave weights to.
    failed: by engine, why it did not take them.
    """
    states = {status.index: status.state for status in statuses}
    for index in engines:
        states[index] = State.QUARANTINED if index in failed else State.SERVING
    states |= {member.index: member.state for member in members}
    return {status.address for status in statuses if states[status.index] is State.SERVING}


def _all_gather(layout: Layout, value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size(layout.world)
    dist.all_gather_object(values, value, group=layout.world)
    return values
