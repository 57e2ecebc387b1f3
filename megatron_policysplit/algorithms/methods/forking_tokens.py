"""Forking tokens, the 80/20 rule (arXiv 2506.01939): only the tokens of highest entropy carry the
policy gradient.

A token's term counts if its entropy is at least the (1 - share)-quantile of the entropies of all
trained tokens of the batch. The loss is still divided by all tokens. The paper trains on top of
DAPO; here the mask is on top of GRPO with DAPO's clip and token mean.
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
    share: float = key(0.2, "Share of the trained tokens that is kept.", above=0.0)


def threshold(entropy: Tensor, share: float) -> float:
    """The entropy that a `share` of the tokens [N] reaches: the ceil(share N)-th largest; of no
    tokens, infinity.
    """
    if not len(entropy):
        return float("inf")
    kept = max(1, min(len(entropy), -int(-share * len(entropy) // 1)))
    return float(entropy.kthvalue(len(entropy) - kept + 1).values)


def signals(batch: AdvantageBatch, options: Options, state: State) -> TokenSignals:
    advantages = batch.on_tokens(zscore(batch.rewards, batch.group))
    kept = batch.entropy >= threshold(batch.entropy[batch.mask], options.share)
    return TokenSignals(advantages, scale=kept.to(torch.float32))


METHOD = Method(signals, source="arXiv 2506.01939", options=Options, loss={"clip_high": 0.28})
