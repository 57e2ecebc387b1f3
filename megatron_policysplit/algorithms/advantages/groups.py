"""Statistics within groups, and what rewards alone say of a response: [N] values, [N] int64 groups,
fp64 inside.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-6


def group_sums(values: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of `values` [N] within each group, and the number of them, spread back to [N] fp64."""
    values = values.double()
    empty = torch.zeros(_groups(group), dtype=torch.float64)
    count = empty.index_add(0, group, torch.ones_like(values))
    return empty.index_add(0, group, values)[group], count[group]


def group_mean_std(values: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation of `values` [N] within each group, spread back to [N].

    A group of one has standard deviation 0. Computed in fp64.
    """
    total, count = group_sums(values, group)
    mean = total / count
    squares, _ = group_sums((values.double() - mean) ** 2, group)
    return mean, (squares / (count - 1).clamp(min=1)).sqrt()


def group_extremes(values: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Largest and smallest of `values` [N] within each group, spread back to [N]."""
    empty = values.new_zeros(_groups(group))
    highest = empty.scatter_reduce(0, group, values, "amax", include_self=False)
    lowest = empty.scatter_reduce(0, group, values, "amin", include_self=False)
    return highest[group], lowest[group]


def zscore(rewards: Tensor, group: Tensor) -> Tensor:
    """GRPO: (r_i - mean r) / (std r + 1e-6) within each group, unbiased std; [R] -> [R] fp32.

    A group whose rewards are all equal gets exactly 0.
    """
    mean, std = group_mean_std(rewards, group)
    return ((rewards.double() - mean) / (std + EPSILON)).where(_differ(rewards, group), 0.0).float()


def centered(rewards: Tensor, group: Tensor) -> Tensor:
    """Dr. GRPO: r_i - mean r within each group; [R] -> [R] fp32, exactly 0 where rewards are all
    equal.
    """
    total, count = group_sums(rewards, group)
    return (rewards.double() - total / count).where(_differ(rewards, group), 0.0).float()


def leave_one_out(rewards: Tensor, group: Tensor) -> Tensor:
    """RLOO: r_i minus the mean of the *other* rewards of its group; [R] -> [R] fp32.

    A group of one, which has no others, and a group whose rewards are all equal get exactly 0.
    """
    total, count = group_sums(rewards, group)
    others = (total - rewards.double()) / (count - 1).clamp(min=1)
    return (rewards.double() - others).where(_differ(rewards, group), 0.0).float()


def _differ(rewards: Tensor, group: Tensor) -> Tensor:
    highest, lowest = group_extremes(rewards, group)
    return highest > lowest


def _groups(group: Tensor) -> int:
    return int(group.max()) + 1 if len(group) else 0
