"""From rewards and statistics to what each row is trained with: masks, advantages, importance weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_policysplit.advantages import Method, TokenStatistics, make_batch
from megatron_policysplit.advantages.grpo import response_advantages
from megatron_policysplit.config import Config
from megatron_policysplit.losses import importance_weights
from megatron_policysplit.rows import Row


@dataclass
class TrainSignal:
    """What training a row needs beside its tokens, [T] fp32 each over its response tokens."""

    old_logprobs: Tensor
    advantages: Tensor
    importance: Tensor
    mask: Tensor
    reference_logprobs: Tensor | None = None


def trained_mask(row: Row, overlong: str) -> Tensor:
    """Bool [T]: response tokens that are trained; none of a cut response if train.overlong=mask."""
    if overlong == "mask" and row.rollout.finish_reason == "length":
        return torch.zeros(row.response_length, dtype=torch.bool)
    return torch.tensor(row.rollout.loss_mask, dtype=torch.bool)


def live_rows(rows: Sequence[Row], method: Method, config: Config) -> list[bool]:
    """Which rows can change the weights; the others are scored but not trained.

    A row without trained tokens never can. A row whose correctness advantage is zero cannot either, if the
    method says so and the loss has no term beside the advantage.
    """
    trained = [bool(trained_mask(row, config.train.overlong).any()) for row in rows]
    algorithm = config.algorithm
    if not rows or algorithm.kl_coef > 0 or algorithm.entropy_coef > 0 or not method.zero_reward_advantage_is_zero:
        return trained
    groups: dict[tuple, int] = {}
    group = torch.tensor([groups.setdefault(row.key.group, len(groups)) for row in rows])
    advantage = response_advantages(torch.tensor([row.rollout.reward for row in rows]), group)
    return [keeps and value != 0 for keeps, value in zip(trained, advantage.tolist(), strict=True)]


def train_signals(
    rows: Sequence[Row],
    old: Sequence[TokenStatistics],
    method: Method,
    config: Config,
    reference: Sequence[Tensor] | None = None,
) -> list[TrainSignal]:
    """One TrainSignal per row, from the whole batch: no group statistic depends on where a row is trained."""
    if not rows:
        return []
    masks = [trained_mask(row, config.train.overlong) for row in rows]
    batch = make_batch(rows, old, masks)
    advantages = method.advantages(batch, config.algorithm).split(batch.offsets.diff().tolist())
    importance = {
        row.rollout.key: importance_weights(
            statistics.logprobs, torch.tensor(row.rollout.engine_logprobs), mask, config.algorithm
        )
        for row, statistics, mask in zip(rows, old, masks, strict=True)
        if row.on_policy
    }
    return [
        TrainSignal(
            old_logprobs=old[index].logprobs,
            advantages=advantages[index],
            importance=importance[row.rollout.key],
            mask=masks[index],
            reference_logprobs=None if reference is None else reference[index],
        )
        for index, row in enumerate(rows)
    ]


def importance_metrics(rows: Sequence[Row], signals: Sequence[TrainSignal]) -> dict[str, float]:
    """Of the importance weights actor/engine over trained response tokens, each counted once: mean, least, largest."""
    weights = [signal.importance[signal.mask] for row, signal in zip(rows, signals, strict=True) if row.on_policy]
    together = torch.cat(weights) if weights else torch.empty(0)
    if not len(together):
        return {}
    return {
        "importance/mean": float(together.mean()),
        "importance/min": float(together.min()),
        "importance/max": float(together.max()),
    }
