"""Clip-Cov: a few random tokens whose log-prob and advantage rise together lose their gradient.

Source: arXiv 2505.22617. GRPO's advantages A_t, and for every trained token t the covariance

    C_t = (A_t - mean A) (log pi_t - mean log pi)    means over all N trained tokens

max(1, floor(ratio N)) tokens are drawn at random among those with low < C_t < high that PPO's clip
leaves alone. Their loss is multiplied by 0; denominators stay the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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
    ratio: float = key(
        2e-4, "Share of the trained tokens that lose their gradient, at least one token.", above=0.0
    )
    low: float = key(1.0, "Tokens with a smaller covariance are no candidates.")
    high: float = key(5.0, "Tokens with a larger covariance are no candidates.")


def covariance(batch: AdvantageBatch, advantages: Tensor) -> Tensor:
    """C_t of every token, [T] fp32, with means over the trained tokens; 0 outside the mask."""
    result = torch.zeros_like(advantages)
    trained, logprobs = advantages[batch.mask].double(), batch.logprobs[batch.mask].double()
    result[batch.mask] = ((trained - trained.mean()) * (logprobs - logprobs.mean())).float()
    return result


def signals(batch: AdvantageBatch, options: Options, state: State) -> TokenSignals:
    advantages = batch.on_tokens(zscore(batch.rewards, batch.group))
    products = covariance(batch, advantages)
    candidates = (
        batch.mask
        & (products > options.low)
        & (products < options.high)
        & ~batch.clipped(advantages)
    )
    (positions,) = candidates.nonzero(as_tuple=True)
    count = max(1, int(options.ratio * int(batch.mask.sum())))
    # The batch's generator has the same seed on every rank, so that all drop the same tokens.
    order = torch.randperm(len(positions), generator=batch.generator())
    scale = torch.ones_like(advantages)
    scale[positions[order[:count]]] = 0.0
    return TokenSignals(advantages, scale=scale)


METHOD = Method(
    signals,
    source="arXiv 2505.22617",
    options=Options,
    loss={"clip_low": 1.0, "clip_high": 1.0},
    engine_logprobs=lambda options: True,
)
