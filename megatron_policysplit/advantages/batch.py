"""What an advantage method sees: a batch of rows as flat tensors, on the CPU, over all replicas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_policysplit.rows import Mode, Row


@dataclass
class TokenStatistics:
    """Per response token of one row, fp32, nats: log-prob [T] and entropy [T] of the policy before the update.

    kl [T]: KL(this row's mode || the other mode) at the same token, where it was asked for.
    """

    logprobs: Tensor
    entropy: Tensor
    kl: Tensor | None = None


@dataclass
class AdvantageBatch:
    """R rows with T response tokens in all; row r's tokens are [offsets[r], offsets[r + 1]).

    rewards [R] fp32. group [R] int64: rows of one question under one training mode. high_entropy [R] bool:
    the training mode. partner [R] int64: the same response under the other mode, or -1.
    logprobs, entropy [T] fp32 nats under the row's own prompt, before the update. mask [T] bool: tokens
    that are trained.
    """

    rewards: Tensor
    group: Tensor
    high_entropy: Tensor
    partner: Tensor
    offsets: Tensor
    logprobs: Tensor
    entropy: Tensor
    mask: Tensor

    @property
    def row_of_token(self) -> Tensor:
        """[T] int64: the row each token belongs to."""
        lengths = self.offsets.diff()
        return torch.repeat_interleave(torch.arange(len(lengths)), lengths)

    def at_partner(self, values: Tensor) -> Tensor:
        """[T]: for each token, `values` at the same response token of the partner row.

        Raises ValueError if a row has no partner or the two rows differ in length.
        """
        if (self.partner < 0).any():
            raise ValueError("a row has no partner: this method needs every response under both prompts")
        lengths = self.offsets.diff()
        if not torch.equal(lengths, lengths[self.partner]):
            raise ValueError("a row and its partner differ in length: the response tokens were not shared exactly")
        row = self.row_of_token
        position = torch.arange(len(row)) - self.offsets[row]
        return values[self.offsets[self.partner[row]] + position]


def make_batch(rows: Sequence[Row], statistics: Sequence[TokenStatistics], masks: Sequence[Tensor]) -> AdvantageBatch:
    """Rows (in any order) and their statistics as one `AdvantageBatch`; masks[r] is bool [T_r]."""
    index = {row.key: i for i, row in enumerate(rows)}
    groups: dict[tuple, int] = {}
    lengths = torch.tensor([row.response_length for row in rows])
    return AdvantageBatch(
        rewards=torch.tensor([row.rollout.reward for row in rows], dtype=torch.float32),
        group=torch.tensor([groups.setdefault(row.key.group, len(groups)) for row in rows]),
        high_entropy=torch.tensor([row.mode is Mode.HIGH_ENTROPY for row in rows]),
        partner=torch.tensor([index.get(row.key.partner, -1) for row in rows]),
        offsets=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        logprobs=torch.cat([s.logprobs for s in statistics]),
        entropy=torch.cat([s.entropy for s in statistics]),
        mask=torch.cat(list(masks)),
    )


def group_mean_std(values: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation of `values` [N] within each group, spread back to [N].

    A group of one has standard deviation 0. Computed in fp64.
    """
    values = values.double()
    groups = int(group.max()) + 1 if len(group) else 0
    count = torch.zeros(groups, dtype=torch.float64).index_add_(0, group, torch.ones_like(values))
    mean = torch.zeros(groups, dtype=torch.float64).index_add_(0, group, values) / count
    squares = torch.zeros(groups, dtype=torch.float64).index_add_(0, group, (values - mean[group]) ** 2)
    std = (squares / (count - 1).clamp(min=1)).sqrt()
    return mean[group], std[group]


def group_extremes(values: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Largest and smallest of `values` [N] within each group, spread back to [N]."""
    empty = values.new_zeros(int(group.max()) + 1 if len(group) else 0)
    highest = empty.scatter_reduce(0, group, values, "amax", include_self=False)
    lowest = empty.scatter_reduce(0, group, values, "amin", include_self=False)
    return highest[group], lowest[group]
