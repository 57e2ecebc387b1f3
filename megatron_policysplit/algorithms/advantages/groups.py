"""Statistics within groups, and advantages that follow from rewards alone.

`group` is [N] int64, the group number of each value, counted from 0. Sums are in fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-6  # added to a spread before dividing by it, as in verl


def group_sums(values: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and number of the `values` [N] of each value's group, two [N] fp64."""
    values = values.double()
    zeros = torch.zeros(_group_count(group), dtype=torch.float64)
    count = zeros.index_add(0, group, torch.ones_like(values))
    return zeros.index_add(0, group, values)[group], count[group]


def group_mean_std(values: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation of each value's group, from `values` [N]; two [N] fp64.

    A group of one has standard deviation 0.
    """
    total, count = group_sums(values, group)
    mean = total / count
    squares, _ = group_sums((values.double() - mean) ** 2, group)
    return mean, (squares / (count - 1).clamp(min=1)).sqrt()


def group_extremes(values: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Largest and smallest value of each value's group, from `values` [N]; two [N] of its dtype."""
    zeros = values.new_zeros(_group_count(group))
    highest = zeros.scatter_reduce(0, group, values, "amax", include_self=False)
    lowest = zeros.scatter_reduce(0, group, values, "amin", include_self=False)
    return highest[group], lowest[group]


def zscore(rewards: Tensor, group: Tensor) -> Tensor:
    """GRPO: (r_i - mean r) / (std r + 1e-6) within each group, unbiased std; [R] -> [R] fp32.

    A group whose rewards are all equal gets exactly 0.
    """
    mean, std = group_mean_std(rewards, group)
    scores = (rewards.double() - mean) / (std + EPSILON)
    # Rounding in the mean would otherwise leave a tiny advantage where all rewards are equal.
    return scores.where(_rewards_differ(rewards, group), 0.0).float()


def centered(rewards: Tensor, group: Tensor) -> Tensor:
    """Dr. GRPO: r_i - mean r within each group; [R] -> [R] fp32.

    A group whose rewards are all equal gets exactly 0.
    """
    total, count = group_sums(rewards, group)
    return (rewards.double() - total / count).where(_rewards_differ(rewards, group), 0.0).float()


def leave_one_out(rewards: Tensor, group: Tensor) -> Tensor:
    """RLOO: r_i minus the mean of the *other* rewards of its group; [R] -> [R] fp32.

    A group of one, which has no others, and a group whose rewards are all equal get exactly 0.
    """
    total, count = group_sums(rewards, group)
    mean_of_others = (total - rewards.double()) / (count - 1).clamp(min=1)
    advantages = rewards.double() - mean_of_others
    return advantages.where(_rewards_differ(rewards, group), 0.0).float()


def _rewards_differ(rewards: Tensor, group: Tensor) -> Tensor:
    """[N] bool: whether the rewards of each value's group are not all equal."""
    highest, lowest = group_extremes(rewards, group)
    return highest > lowest


def _group_count(group: Tensor) -> int:
    return int(group.max()) + 1 if len(group) else 0
