"""Plain entropy bonus: GRPO with every token's entropy, times a constant, subtracted from the loss.

    loss_t = L_GRPO,t - coef H_t

H_t is the entropy over the whole vocabulary, in nats and differentiable. Source: verl's
actor.entropy_coeff. The default of `coef` is what Policy Split's authors tuned it to (arXiv
2604.11510).
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
    coef: float = key(
        0.003,
        "Weight of the entropy in the loss; 0.003 is what Policy Split's authors tuned it to.",
        minimum=0.0,
    )


def signals(batch: AdvantageBatch, options: Options, state: State) -> TokenSignals:
    advantages = batch.on_tokens(zscore(batch.rewards, batch.group))
    return TokenSignals(advantages, entropy_coef=torch.full_like(advantages, options.coef))


METHOD = Method(
    signals,
    source="verl's actor.entropy_coeff; the setting of arXiv 2604.11510",
    options=Options,
    live=all_rows,
    engine_logprobs=lambda options: True,
)
