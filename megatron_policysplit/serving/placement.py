"""Where a run's own engines stand: which rank owns each, and on which GPUs it runs."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

from megatron_policysplit.errors import ConfigError
from megatron_policysplit.serving.members import Placement


def place_engines(
    world_size: int,
    chief: int,
    *,
    count: int | None,
    tensor: int,
    colocated: bool,
    local_world_size: int | None = None,
) -> list[Placement]:
    """The engines in order; the same on every rank.

    Apart: `count` engines (None is one), all owned by the chief. Colocated: they tile the actor's
    ranks, engine e on ranks [e * tensor, (e + 1) * tensor), the first of which owns it; so their
    number follows, and `count` is None or that number. local_world_size: ranks on each node,
    numbered node by node; None where all are on one. Raises ConfigError if engines do not tile the
    ranks, or one would stand on two nodes.
    """
    if not colocated:
        return [
            Placement(engine, chief, (chief,)) for engine in range(1 if count is None else count)
        ]
    of_node = world_size if local_world_size is None else min(local_world_size, world_size)
    fitting = _divisors(gcd(world_size, of_node))
    if world_size % tensor:
        raise ConfigError(
            f"rollout.server.tensor={tensor} does not divide the {world_size} ranks "
            "(parallel.tensor x "
            "parallel.pipeline x parallel.data) on whose GPUs the servers stand with "
            "rollout.colocated=true; "
            f"use {fitting}, or change the layout"
        )
    if of_node % tensor:
        raise ConfigError(
            f"rollout.server.tensor={tensor} would put a server on two nodes, which have {of_node} "
            "ranks each; "
            f"with rollout.colocated=true use {fitting}"
        )
    engines = world_size // tensor
    if count is not None and count != engines:
        raise ConfigError(
            f"rollout.server.count={count} does not fit rollout.colocated=true: servers of "
            "rollout.server.tensor="
            f"{tensor} on the {world_size} GPUs of parallel.tensor x parallel.pipeline x "
            f"parallel.data are {engines}; "
            f"set rollout.server.count={engines} or null"
        )
    tiles = [tuple(range(first, first + tensor)) for first in range(0, world_size, tensor)]
    return [Placement(engine, ranks[0], ranks) for engine, ranks in enumerate(tiles)]


def devices(
    placement: Placement,
    configured: Sequence[int],
    local_ranks: Sequence[int],
    *,
    tensor: int,
    colocated: bool,
) -> list[int]:
    """GPU numbers of an engine's server, in the order of its tensor-parallel ranks.

    They count the GPUs that the run sees, as `cuda:N` does. configured: rollout.server.devices, the
    GPUs of all servers in order; empty takes the first that are visible. local_ranks: by global
    rank, its number on its node, which is the GPU it trains on; colocated servers stand there.
    Raises ConfigError for GPUs that are not the actor's, or too few.
    """
    if colocated:
        own = [local_ranks[rank] for rank in placement.ranks]
        if configured:
            raise ConfigError(
                f"rollout.server.devices={list(configured)} is set, but with "
                "rollout.colocated=true server "
                f"{placement.index} stands on the actor's GPUs {own}; set rollout.server.devices=[]"
            )
        return own
    first = placement.index * tensor
    if not configured:
        return list(range(first, first + tensor))
    if len(configured) < first + tensor:
        raise ConfigError(
            f"rollout.server.devices={list(configured)} holds no {tensor} GPUs for server "
            f"{placement.index} "
            f"(rollout.server.tensor={tensor} each); name {first + tensor} or more, or none"
        )
    return list(configured[first : first + tensor])


def _divisors(number: int) -> str:
    *some, last = [str(divisor) for divisor in range(1, number + 1) if number % divisor == 0]
    return f"{', '.join(some)} or {last}" if some else last
