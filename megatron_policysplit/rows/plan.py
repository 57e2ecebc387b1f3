"""Which replica trains which rows, in which optimizer step and micro-batch.

Pure functions with the same result on every rank. The unit of placement is a rollout: its rows (one
per training mode) go to the same replica and optimizer step, and are adjacent when micro-batches
are cut. The exact KL between the modes then needs no communication between replicas and little
waiting. The assignment of rollouts to optimizer steps depends on the seed alone, never on the
layout.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_policysplit.rows.types import Row


@dataclass
class ReplicaMicroBatches:
    """Micro-batches of one replica in one optimizer step, each a list of row indices.

    Where replicas share experts, empty lists at the end make their numbers of micro-batches equal.
    """

    train: list[list[int]] = field(default_factory=list)  # scored and trained, cut alike both times
    train_only: list[list[int]] = field(default_factory=list)  # trained, but not scored
    # Rows that cannot change the weights: scored for statistics and metrics, and not trained.
    score_only: list[list[int]] = field(default_factory=list)
    # Rows scored only for the comparison with the engine, in micro-batches of their own, so that
    # the comparison changes nothing else.
    compared: list[list[int]] = field(default_factory=list)


@dataclass
class Plan:
    """Which rows every replica trains, by optimizer step. Made on leaders by `make_plan`."""

    steps: list[list[int]]  # [step]; the step's row indices, sorted
    micro_batches: list[list[ReplicaMicroBatches]]  # [step][replica]


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
    width_multiple: int = 1,
    seed: int,
) -> Plan:
    """Plan for `rows`, which are sorted by key.

    live: [R], whether the row can change the weights.
    scored: [R], whether the row is scored; None: every row is.
    compared: [R], whether an unscored row is compared with the engine; None: none is.
    replicas: number of data-parallel replicas.
    expert: number of consecutive replicas that share experts and so need equal numbers of
        micro-batches, because their ranks communicate in every one.
    max_tokens: upper bound of a micro-batch, padding included; a longer row is alone in one.
    width_multiple: rows are padded to a multiple of this.
    seed: of the assignment of rollouts to optimizer steps.
    """
    is_scored = [True] * len(rows) if scored is None else scored
    rollouts: dict[tuple, list[int]] = {}
    for index, row in enumerate(rows):
        rollouts.setdefault(row.rollout.key, []).append(index)
    rows_of_rollout = list(rollouts.values())
    order = list(range(len(rows_of_rollout)))
    random.Random(seed).shuffle(order)
    # Masks over all rows, in the order of the fields of `ReplicaMicroBatches`.
    masks = (
        [a and s for a, s in zip(live, is_scored, strict=True)],
        [a and not s for a, s in zip(live, is_scored, strict=True)],
        [s and not a for a, s in zip(live, is_scored, strict=True)],
        [False] * len(rows) if compared is None else compared,
    )

    steps, micro_batches = [], []
    for step in range(optimizer_steps):
        start, end = (len(order) * k // optimizer_steps for k in (step, step + 1))
        # Sorted again: the shuffle decides on the step alone, not on the order within it.
        groups = [rows_of_rollout[rollout] for rollout in sorted(order[start:end])]
        steps.append(sorted(index for group in groups for index in group))
        lists = [
            _micro_batches(groups, mask, rows, replicas, expert, max_tokens, width_multiple)
            for mask in masks
        ]
        micro_batches.append([ReplicaMicroBatches(*parts) for parts in zip(*lists, strict=True)])
    return Plan(steps, micro_batches)


def _micro_batches(
    groups: list[list[int]],
    mask: Sequence[bool],
    rows: Sequence[Row],
    replicas: int,
    expert: int,
    max_tokens: int,
    width_multiple: int,
) -> list[list[list[int]]]:
    """Each replica's micro-batches of the rows in `mask`; groups: the rows of each rollout."""
    masked = [[index for index in group if mask[index]] for group in groups]
    parts = _balance([group for group in masked if group], rows, replicas)
    by_replica = [_cut(part, rows, max_tokens, width_multiple) for part in parts]
    for first in range(0, replicas, expert):
        _even_out(by_replica[first : first + expert])
    return by_replica


def _balance(groups: list[list[int]], rows: Sequence[Row], replicas: int) -> list[list[list[int]]]:
    """Groups of row indices for every replica, with about equal numbers of tokens.

    Greedy: the costliest group first, each to the replica with the least load. Ties go to the lower
    index, so that every rank finds the same assignment.
    """
    cost = [sum(rows[i].length for i in group) for group in groups]
    load = [0] * replicas
    parts: list[list[list[int]]] = [[] for _ in range(replicas)]
    for g in sorted(range(len(groups)), key=lambda g: (-cost[g], g)):
        target = min(range(replicas), key=lambda d: (load[d], d))
        parts[target].append(groups[g])
        load[target] += cost[g]
    return parts


def padded_width(longest: int, multiple: int) -> int:
    """The tokens to which the rows of a micro-batch are padded; longest: of its longest row."""
    return -(-longest // multiple) * multiple


def _cut(
    groups: list[list[int]], rows: Sequence[Row], max_tokens: int, width_multiple: int
) -> list[list[int]]:
    """Micro-batches of the rows of `groups`, of at most `max_tokens` tokens with padding.

    Rows of similar length share a micro-batch, and the rows of a group are adjacent.
    """
    batches: list[list[int]] = []
    longest = 0  # tokens of the longest row of the open micro-batch
    for group in sorted(groups, key=lambda group: (max(rows[i].length for i in group), group)):
        for index in group:
            longest = max(longest, rows[index].length)
            width = padded_width(longest, width_multiple)
            if batches and (len(batches[-1]) + 1) * width <= max_tokens:
                batches[-1].append(index)
            else:
                batches.append([index])
                longest = rows[index].length
    return batches


def _even_out(parts: list[list[list[int]]]) -> None:
    """Append empty micro-batches, in place, until all `parts` have as many as the longest."""
    longest = max(len(part) for part in parts)
    for part in parts:
        part += [[] for _ in range(longest - len(part))]
