"""Which replica trains which rows, in which optimizer step and micro-batch. Pure, and alike on
every rank.

The unit of placement is a rollout: its rows (one per training mode) go to the same replica and
optimizer step, and stand next to each other when micro-batches are cut, so that the exact KL
between the modes needs no communication between replicas and little waiting. The assignment of
rollouts to optimizer steps depends on the seed alone, never on the layout.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_policysplit.rows.types import Row


@dataclass
class ReplicaMicroBatches:
    """Micro-batches (lists of row indices) of one replica in one optimizer step.

    train: rows that are scored and trained, in the same micro-batches both times. train_only:
    trained, not scored.
    score_only: rows that cannot change the weights; scored for metrics, then skipped. compared:
    scored besides, for the comparison with the engine alone, in micro-batches of their own, so that
    nothing else depends on it. Lists without a row stand at the end where replicas that share
    experts have more.
    """

    train: list[list[int]] = field(default_factory=list)
    train_only: list[list[int]] = field(default_factory=list)
    score_only: list[list[int]] = field(default_factory=list)
    compared: list[list[int]] = field(default_factory=list)


@dataclass
class Plan:
    """steps[k] holds the row indices of optimizer step k; micro_batches[k][d] what replica d does
    of it.
    """

    steps: list[list[int]]
    micro_batches: list[list[ReplicaMicroBatches]]


def make_plan(
    rows: Sequence[Row],
    live: Sequence[bool],
    *,
    scored: Sequence[bool] | None = None,
    compared: Sequence[bool] | None = None,
    replicas: int,
    expert: int = 1,
    optimizer_steps: int,
    max_tokens: int,
    seed: int,
) -> Plan:
    """Plan for `rows` (sorted by key). live[r]: whether row r can change the weights. scored[r]:
    whether it is scored; None: every row is. compared[r]: whether a row that is not scored is
    compared with the engine; None: none is.

    A micro-batch holds at most `max_tokens` tokens, padding included (a single longer row is alone
    in one).
    expert: so many replicas in a row share experts, and get equal numbers of micro-batches.
    """
    here = [True] * len(rows) if scored is None else scored
    rollouts: dict[tuple, list[int]] = {}
    for index, row in enumerate(rows):
        rollouts.setdefault(row.rollout.key, []).append(index)
    members = list(rollouts.values())
    order = list(range(len(members)))
    random.Random(seed).shuffle(order)

    steps, micro_batches = [], []
    for step in range(optimizer_steps):
        chosen = order[
            len(order) * step // optimizer_steps : len(order) * (step + 1) // optimizer_steps
        ]
        groups = [members[i] for i in sorted(chosen)]
        steps.append(sorted(index for group in groups for index in group))
        per_replica = [ReplicaMicroBatches() for _ in range(replicas)]
        chosen_rows = {
            "train": [alive and there for alive, there in zip(live, here, strict=True)],
            "train_only": [alive and not there for alive, there in zip(live, here, strict=True)],
            "score_only": [there and not alive for alive, there in zip(live, here, strict=True)],
            "compared": [False] * len(rows) if compared is None else compared,
        }
        for name, wanted in chosen_rows.items():
            kept = [
                kept for group in groups if (kept := [index for index in group if wanted[index]])
            ]
            for replica, part in zip(per_replica, _balance(kept, rows, replicas), strict=True):
                setattr(replica, name, _cut(part, rows, max_tokens))
            for first in range(0, replicas, expert):
                _even_out(
                    [getattr(replica, name) for replica in per_replica[first : first + expert]]
                )
        micro_batches.append(per_replica)
    return Plan(steps, micro_batches)


def _balance(groups: list[list[int]], rows: Sequence[Row], replicas: int) -> list[list[list[int]]]:
    """Rollouts to replicas: the costliest first, always to the least loaded replica."""
    cost = [sum(rows[i].length for i in group) for group in groups]
    load = [0] * replicas
    parts: list[list[list[int]]] = [[] for _ in range(replicas)]
    for g in sorted(range(len(groups)), key=lambda g: (-cost[g], g)):
        target = min(range(replicas), key=lambda d: (load[d], d))
        parts[target].append(groups[g])
        load[target] += cost[g]
    return parts


def _cut(groups: list[list[int]], rows: Sequence[Row], max_tokens: int) -> list[list[int]]:
    """Rows of similar length together, partners adjacent, until padding would exceed `max_tokens`."""
    batches: list[list[int]] = []
    longest = 0
    for group in sorted(groups, key=lambda group: (max(rows[i].length for i in group), group)):
        for index in group:
            longest = max(longest, rows[index].length)
            if batches and (len(batches[-1]) + 1) * longest <= max_tokens:
                batches[-1].append(index)
            else:
                batches.append([index])
                longest = rows[index].length
    return batches


def _even_out(parts: list[list[list[int]]]) -> None:
    """Give all parts as many micro-batches as the one that has most."""
    most = max(len(part) for part in parts)
    for part in parts:
        part += [[] for _ in range(most - len(part))]
