"""Adaptive entropy control: an entropy bonus whose coefficient rises while the entropy is too low.

Source: Skywork-OR1 (arXiv 2505.22312). GRPO's advantages, and at optimizer step k, with H the mean
entropy in nats over all trained tokens and c_0 = 0:

    loss    = L_GRPO - c_k H   where H <= target, L_GRPO alone otherwise
    c_{k+1} = c_k + delta      where H <= target, c_k - delta otherwise; within [0, coef_max]

The bonus is differentiable. The coefficient c is the method's state.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_policysplit.algorithms.advantages import (
    AdvantageBatch,
    Method,
    State,
    TokenSignals,
    all_rows,
    zscore,
)
from megatron_policysplit.config import key


@dataclass(frozen=True)
class Options:
    target: float = key(0.2, "Entropy in nats at and below which the bonus acts.", above=0.0)
    delta: float = key(0.005, "Change of the coefficient at an optimizer step.", above=0.0)
    coef_max: float = key(1.0, "Upper bound of the coefficient.", above=0.0)


def signals(batch: AdvantageBatch, options: Options, state: State) -> TokenSignals:
    advantages = batch.on_tokens(zscore(batch.rewards, batch.group))
    coef = state["coef"] if batch.mean_entropy() <= options.target else 0.0
    return TokenSignals(advantages, entropy_coef=torch.full_like(advantages, coef))


def next_state(state: State, batch: AdvantageBatch, options: Options) -> State:
    step = options.delta if batch.mean_entropy() <= options.target else -options.delta
    return {"coef": min(max(state["coef"] + step, 0.0), options.coef_max)}


METHOD = Method(
    signals,
    source="arXiv 2505.22312",
    options=Options,
    live=all_rows,
    begin=lambda options: {"coef": 0.0},
    next_state=next_state,
)
