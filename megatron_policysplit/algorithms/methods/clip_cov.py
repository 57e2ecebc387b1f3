"""Clip-Cov (arXiv 2505.22617): a few tokens whose log-prob and advantage rise together lose their
gradient.

With C_t = (A_t - mean A)(log pi_t - mean log pi) over all trained tokens, max(1, floor(ratio N)) of
the N tokens are drawn at random among those with low < C_t < high that PPO's clip leaves alone, and
their loss is multiplied by 0.
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
        2e-4, "Share of the trained tokens that is cut, at least one of them.", above=0.0
    )
    low: float = key(1.0, "Tokens with less covariance are no candidates.")
    high: float = key(5.0, "Nor are those with more.")


def covariance(batch: AdvantageBatch, advantages: Tensor) -> Tensor:
    """C [T] fp32 over the trained tokens; 0 outside the mask."""
    result = torch.zeros_like(advantages)
    kept, logprobs = advantages[batch.mask].double(), batch.logprobs[batch.mask].double()
    result[batch.mask] = ((kept - kept.mean()) * (logprobs - logprobs.mean())).float()
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
    (places,) = candidates.nonzero(as_tuple=True)
    wanted = max(1, int(options.ratio * int(batch.mask.sum())))
    drawn = places[torch.randperm(len(places), generator=batch.generator())[:wanted]]
    scale = torch.ones_like(advantages)
    scale[drawn] = 0.0
    return TokenSignals(advantages, scale=scale)


METHOD = Method(
    signals,
    source="arXiv 2505.22617",
    options=Options,
    loss={"clip_low": 1.0, "clip_high": 1.0},
    engine_logprobs=lambda options: True,
)
