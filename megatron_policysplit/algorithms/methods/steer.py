"""STEER: tokens whose gradient step would change the entropy much count less in the loss.

Source: arXiv 2510.10150; formulas are from the authors' code. With A_t GRPO's advantage, a token's
step changes the entropy, to first order, in proportion to

    Omega_t = A_t / pi_old(t) * pi(t) (1 - pi(t)) (log pi(t) + H_t)

The token's loss is multiplied by w_t, which carries no gradient:

    w_t = clip(exp(-k |Omega_t|), low, 1)   with `variant: exp`, where
                                            k = -ln low / max(max |Omega|, 0.02)
    w_t = linear in |Omega_t|               with `variant: linear`, from `high` where |Omega| is
                                            smallest down to `low` where it is largest
"""

from __future__ import annotations

import math
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

LEAST_RANGE = 0.02  # bound of max |Omega| from below, so that tiny changes are not blown up


@dataclass(frozen=True)
class Options:
    variant: str = key("exp", "How the weight falls with |Omega|.", choices=("exp", "linear"))
    low: float = key(0.8, "Weight of the token whose step changes the entropy most.", above=0.0)
    high: float = key(
        1.2,
        "Weight of the token whose step changes the entropy least, with variant=linear.",
        above=0.0,
    )


def entropy_change(batch: AdvantageBatch, advantages: Tensor) -> Tensor:
    """Omega_t of every token, [T] fp32."""
    probability = batch.logprobs.exp()
    return (
        advantages
        * (batch.logprobs - batch.old_logprobs).exp()  # pi / pi_old
        * (1 - probability)
        * (batch.logprobs + batch.entropy)
    )


def weights(change: Tensor, mask: Tensor, options: Options) -> Tensor:
    """w_t of every token, [T] fp32, from Omega_t, [T]; 1 outside the mask."""
    size = change.abs()
    if not mask.any():
        return torch.ones_like(size)
    largest, smallest = float(size[mask].max()), float(size[mask].min())
    if options.variant == "exp":
        rate = -math.log(options.low) / max(largest, LEAST_RANGE)
        scale = torch.exp(-rate * size).clamp(options.low, 1.0)
    else:
        share = (size - smallest) / max(largest - smallest, 1e-8)
        scale = options.high + (options.low - options.high) * share
    return scale.where(mask, 1.0)


@torch.no_grad()
def signals(batch: AdvantageBatch, options: Options, state: State) -> TokenSignals:
    advantages = batch.on_tokens(zscore(batch.rewards, batch.group))
    return TokenSignals(
        advantages, scale=weights(entropy_change(batch, advantages), batch.mask, options)
    )


METHOD = Method(
    signals, source="arXiv 2510.10150", options=Options, loss={"clip_high": 0.28, "dual_clip": 10.0}
)
