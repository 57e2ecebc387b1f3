"""KL-Cov (arXiv 2505.22617): the tokens of largest covariance are held near the policy that sampled
them.

All tokens have the unclipped loss -A_t r_t; the floor(share N) of the N trained tokens with the
largest C_t (see `clip_cov`) get beta |log pi - log pi_old| on top, at least one of them. At a
batch's first optimizer step that term is 0 and has no gradient: the method differs from the
unclipped loss with train.optimizer_steps_per_batch > 1 only.
"""

from __future__ import annotations

import math
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
from megatron_policysplit.algorithms.methods.clip_cov import covariance
from megatron_policysplit.config import key


@dataclass(frozen=True)
class Options:
    share: float = key(
        2e-3,
        "Share of the trained tokens that is held; the paper's for 7B, 2e-4 for 32B.",
        above=0.0,
    )
    beta: float = key(1.0, "Weight of |log pi - log pi_old|.", minimum=0.0)


def signals(batch: AdvantageBatch, options: Options, state: State) -> TokenSignals:
    advantages = batch.on_tokens(zscore(batch.rewards, batch.group))
    tokens = int(batch.mask.sum())
    products = covariance(batch, advantages).where(batch.mask, -math.inf)
    drift = torch.zeros_like(advantages)
    drift[products.topk(min(tokens, max(1, int(options.share * tokens)))).indices] = options.beta
    return TokenSignals(advantages, drift_coef=drift)


METHOD = Method(
    signals,
    source="arXiv 2505.22617",
    options=Options,
    loss={"clip_low": math.inf, "clip_high": math.inf},
    live=all_rows,
)
