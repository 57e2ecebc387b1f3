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
    """Place a run's engines: the result is in their order, and the same on every rank.

    Apart: `count` engines (None is one), all owned by the chief. Colocated: they tile the actor's
    ranks, engine e on ranks [e * tensor, (e + 1) * tensor), the first of which owns it; so their
    number follows, and `count` is None or that number.

    world_size: number of actor ranks.
    chief: global rank of the chief.
    tensor: tensor-parallel size of an engine.
    local_world_size: ranks on each node, numbered node by node; None where all are on one.

    Raises ConfigError if engines do not tile the ranks, or one would stand on two nodes.
    """
    if not colocated:
        return [
            Placement(engine, chief, (chief,)) for engine in range(1 if count is None else count)
        ]
    node_ranks = world_size if local_world_size is None else min(local_world_size, world_size)
    valid_sizes = _divisors(gcd(world_size, node_ranks))
    if world_size % tensor:
        raise ConfigError(
            f"rollout.server.tensor={tensor} does not divide the {world_size} ranks "
            "(parallel.tensor x parallel.pipeline x parallel.data) on whose GPUs the servers stand "
            f"with rollout.colocated=true; use {valid_sizes}, or change the layout"
        )
    if node_ranks % tensor:
        raise ConfigError(
            f"rollout.server.tensor={tensor} would put a server on two nodes, which have "
            f"{node_ranks} ranks each; with rollout.colocated=true use {valid_sizes}"
        )
    engines = world_size // tensor
    if count is not None and count != engines:
        raise ConfigError(
            f"rollout.server.count={count} does not fit rollout.colocated=true: servers of "
            f"rollout.server.tensor={tensor} on the {world_size} GPUs of parallel.tensor x "
            f"parallel.pipeline x parallel.data are {engines}; set "
            f"rollout.server.count={engines} or null"
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
    """Return the GPU numbers of an engine's server, in the order of its tensor-parallel ranks.

    They count the GPUs that the run sees, as `cuda:N` does.

    configured: rollout.server.devices, the GPUs of all servers in order; empty takes the first that
        are visible.
    local_ranks: by global rank, its number on its node, which is the GPU it trains on; colocated
        servers stand there.
    tensor: tensor-parallel size of the server.

    Raises ConfigError for GPUs that are not the actor's, or too few.
    """
    if colocated:
        actor_gpus = [local_ranks[rank] for rank in placement.ranks]
        if configured:
            raise ConfigError(
                f"rollout.server.devices={list(configured)} is set, but with "
                f"rollout.colocated=true server {placement.index} stands on the actor's GPUs "
                f"{actor_gpus}; set rollout.server.devices=[]"
            )
        return actor_gpus
    first = placement.index * tensor
    if not configured:
        return list(range(first, first + tensor))
    if len(configured) < first + tensor:
        raise ConfigError(
            f"rollout.server.devices={list(configured)} holds no {tensor} GPUs for server "
            f"{placement.index} (rollout.server.tensor={tensor} each); name {first + tensor} or "
            "more, or none"
        )
    return list(configured[first : first + tensor])


def _divisors(number: int) -> str:
    """All divisors as words: 1, 2 or 4."""
    *smaller, largest = [str(d) for d in range(1, number + 1) if number % d == 0]
    return f"{', '.join(smaller)} or {largest}" if smaller else largest
