"""KL-Cov: the tokens of largest covariance are held near the policy that sampled them.

Source: arXiv 2505.22617. GRPO's advantages A_t, the ratio r_t = pi_t / pi_old,t without a clip, and
the covariance C_t of `clip_cov`:

    loss_t = -A_t r_t                                   for every trained token
             + beta |log pi_t - log pi_old,t|           for those with the largest C_t

The second term is for floor(share N) of the N trained tokens, at least one. At a batch's first
optimizer step it is 0 and has no gradient. The method therefore differs from the unclipped loss
only with train.optimizer_steps_per_batch > 1.
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
        "Share of the trained tokens that are held; the paper has 2e-3 for 7B and 2e-4 for 32B.",
        above=0.0,
    )
    beta: float = key(1.0, "Weight of |log pi - log pi_old|.", minimum=0.0)


def signals(batch: AdvantageBatch, options: Options, state: State) -> TokenSignals:
    advantages = batch.on_tokens(zscore(batch.rewards, batch.group))
    tokens = int(batch.mask.sum())
    # -inf keeps tokens outside the mask from being among the largest.
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
