"""AsymGRPO: a group's success rate weighs right and wrong answers, each with its own exponent.

Source: arXiv 2604.04894. With p the share of right answers in the group:

    A_i = ((1 - p) / p)^beta_pos    where the answer is right
    A_i = -(p / (1 - p))^beta_neg   where it is wrong

A group that is all right or all wrong has the advantage 0. With both exponents 0.5 this is GRPO
with the population's standard deviation and no epsilon. With both 0 it is +1 and -1.

The formula comes from two sets of notes on the paper, which agree, and not from its text. No
official code was found.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_policysplit.algorithms.advantages import (
    RIGHT,
    AdvantageBatch,
    Method,
    State,
    TokenSignals,
    group_sums,
    in_mixed_groups,
)
from megatron_policysplit.config import key


@dataclass(frozen=True)
class Options:
    beta_pos: float = key(
        0.9, "Exponent of right answers; larger amplifies rare successes.", minimum=0.0
    )
    beta_neg: float = key(
        0.4, "Exponent of wrong answers; larger concentrates blame on easy questions.", minimum=0.0
    )


def response_advantages(rewards: Tensor, group: Tensor, options: Options) -> Tensor:
    """A_i of every response, [R] fp32; 0 in a group that is all right or all wrong.

    rewards: [R] fp32, right above 0.5. group: [R] int64.
    """
    right = rewards > RIGHT
    rights, count = group_sums(right, group)
    odds = (count - rights) / rights  # of failure; inf or 0 where all are alike, masked below
    advantage = torch.where(right, odds**options.beta_pos, -(odds**-options.beta_neg))
    return advantage.where((rights > 0) & (rights < count), 0.0).float()


def signals(batch: AdvantageBatch, options: Options, state: State) -> TokenSignals:
    return TokenSignals(batch.on_tokens(response_advantages(batch.rewards, batch.group, options)))


METHOD = Method(
    signals,
    source="arXiv 2604.04894",
    options=Options,
    live=in_mixed_groups,
    engine_logprobs=lambda options: True,
)
