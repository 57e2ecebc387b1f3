"""Forking tokens, the 80/20 rule: only the tokens of highest entropy carry the policy gradient.

Source: arXiv 2506.01939. GRPO's advantages; the loss of a token is multiplied by

    1   where H_t is at least the (1 - share)-quantile of the entropies of all trained tokens
    0   elsewhere

The loss is still divided by the number of all trained tokens. The paper trains on top of DAPO. Here
the mask is on top of GRPO with DAPO's clip and token mean.
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
    share: float = key(0.2, "Share of the trained tokens that carry the gradient.", above=0.0)


def threshold(entropy: Tensor, share: float) -> float:
    """The ceil(share N)-th largest of N entropies [N]: a `share` of the tokens reaches it.

    Infinity if there are no tokens.
    """
    if not len(entropy):
        return float("inf")
    count = max(1, min(len(entropy), -int(-share * len(entropy) // 1)))  # ceil, within [1, N]
    return float(entropy.kthvalue(len(entropy) - count + 1).values)  # kthvalue counts from below


def signals(batch: AdvantageBatch, options: Options, state: State) -> TokenSignals:
    advantages = batch.on_tokens(zscore(batch.rewards, batch.group))
    is_forking = batch.entropy >= threshold(batch.entropy[batch.mask], options.share)
    return TokenSignals(advantages, scale=is_forking.to(torch.float32))


METHOD = Method(signals, source="arXiv 2506.01939", options=Options, loss={"clip_high": 0.28})
