"""EDGE-GRPO's entropy-driven advantage: responses of low entropy get the larger advantage.

Source: arXiv 2507.21848. With A_i GRPO's advantage:

    A^_i = A_i / H^_i
    H^_i = mean entropy of the response / mean of the mean entropies of its group's responses

UNVERIFIED: the paper's normaliser was not found; dividing by the group's mean is our reading. The
paper's other half, guided error correction, is not implemented.
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
    group_sums,
    zscore,
)
from megatron_policysplit.config import key


@dataclass(frozen=True)
class Options:
    least: float = key(
        1e-3, "Lower bound of the normalised entropy that divides the advantage.", above=0.0
    )


def normalized_entropy(batch: AdvantageBatch) -> Tensor:
    """H^_i of every response, [R] fp32; 1 in a group without entropy.

    Means are over trained tokens; a response without any is not in its group's mean.
    """
    row = batch.row_of_token[batch.mask]
    total = batch.rewards.new_zeros(len(batch.rewards)).index_add(0, row, batch.entropy[batch.mask])
    tokens = total.new_zeros(len(total)).index_add(0, row, total.new_ones(len(row)))
    mean = total / tokens.clamp(min=1)
    over_group, _ = group_sums(mean, batch.group)
    responses, _ = group_sums(tokens > 0, batch.group)
    average = over_group / responses.clamp(min=1)
    return (mean / average).where(average > 0, 1.0).float()


@torch.no_grad()
def signals(batch: AdvantageBatch, options: Options, state: State) -> TokenSignals:
    shaped = zscore(batch.rewards, batch.group) / normalized_entropy(batch).clamp(min=options.least)
    return TokenSignals(batch.on_tokens(shaped))


METHOD = Method(signals, source="arXiv 2507.21848 (normaliser unverified)", options=Options)
