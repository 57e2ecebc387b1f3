"""EDGE-GRPO's entropy-driven advantage (arXiv 2507.21848): responses of low entropy get the larger
advantage.

    A^_i = A_i / H^_i,  H^_i = the response's mean entropy / the mean of those of its group

UNVERIFIED: the paper's normaliser was not found; dividing by the group's mean is our reading. The
paper's other half, guided error correction, is not here.
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
    least: float = key(1e-3, "Normalised entropies below this count as this.", above=0.0)


def normalized_entropy(batch: AdvantageBatch) -> Tensor:
    """H^ [R]: mean entropy of each response over that of its group's responses; 1 where the group
    has none.
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
