"""Entropy-Adv: a token's advantage is raised with its entropy, by at most |A| / kappa.

Source: arXiv 2506.14758. With A_t GRPO's advantage:

    A~_t = A_t + min(alpha H_t, |A_t| / kappa)

H_t is the exact entropy of the policy, without a gradient. The bonus strengthens right answers and
weakens the blame of wrong ones. The paper finds that entropy *falls* with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_policysplit.algorithms.advantages import (
    AdvantageBatch,
    Method,
    State,
    TokenSignals,
    zscore,
)
from megatron_policysplit.config import key


@dataclass(frozen=True)
class Options:
    alpha: float = key(0.4, "Advantage per nat of entropy.", minimum=0.0)
    kappa: float = key(
        2.0,
        "The bonus is at most |advantage| / kappa; with kappa above 1 it cannot change a sign.",
        above=0.0,
    )


@torch.no_grad()
def signals(batch: AdvantageBatch, options: Options, state: State) -> TokenSignals:
    advantages = batch.on_tokens(zscore(batch.rewards, batch.group))
    bonus = torch.minimum(options.alpha * batch.entropy, advantages.abs() / options.kappa)
    return TokenSignals(advantages + bonus * batch.mask)


METHOD = Method(
    signals,
    source="arXiv 2506.14758",
    options=Options,
    loss={"clip_high": 0.28, "loss_aggregation": "token_mean"},
)
