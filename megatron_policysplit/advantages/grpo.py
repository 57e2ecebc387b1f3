"""GRPO: the reward's z-score within its group (arXiv 2402.03300), the same for every token of a response."""

from __future__ import annotations

from torch import Tensor

from megatron_policysplit.advantages.batch import AdvantageBatch, group_extremes, group_mean_std
from megatron_policysplit.config import AlgorithmConfig

EPSILON = 1e-6


def response_advantages(rewards: Tensor, group: Tensor) -> Tensor:
    """A_i = (r_i - mean r) / (std r + 1e-6) within each group, unbiased std; rewards [R], group [R] -> [R] fp32.

    A group whose rewards are all equal gets exactly 0.
    """
    mean, std = group_mean_std(rewards, group)
    highest, lowest = group_extremes(rewards, group)
    return ((rewards.double() - mean) / (std + EPSILON)).where(highest > lowest, 0.0).float()


def advantages(batch: AdvantageBatch, config: AlgorithmConfig) -> Tensor:
    """[T] fp32; 0 outside the mask."""
    per_row = response_advantages(batch.rewards, batch.group)
    return per_row[batch.row_of_token] * batch.mask
