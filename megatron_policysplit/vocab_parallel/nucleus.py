"""The entropy of a token's nucleus, over a sharded vocabulary, with gradient.

The nucleus is the smallest set of the most likely columns that holds a given mass of the
probability (columns of equal logits go together). Which columns these are is found exactly, from
the largest logits of each shard, and kept as a threshold: a logit that lies between the nucleus and
the rest. With the threshold as a constant the entropy of the distribution renormalised over the
nucleus N is one more reduction: with e and x as in `reduction`, S = sum e and U = sum e x over N,

    H_N = log S - U / S        dH_N/dz_i = -q_i (log q_i + H_N) / t for i in N, else 0, with q = e /
    S
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_policysplit.vocab_parallel.reduction import (
    Merged,
    PerToken,
    Slopes,
    Tokens,
    logits_gradient,
    merge_shards,
    shard_steps,
    statistics_dtype,
    tiles,
    true_columns,
)
from megatron_policysplit.vocab_parallel.shard import Gathering, VocabularyShard

# Logits a token that each shard offers at first, and GROWTH times as many where that is too few.
CANDIDATES = 64
GROWTH = 16


@dataclass(frozen=True)
class Nucleus(PerToken):
    """threshold [T]: columns with logits at or above it are the nucleus, all for minus infinity.
    entropy [T]: nats.
    """

    threshold: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class MergedNucleus(PerToken):
    """Of whole rows, [T] each: log q of a column of the nucleus is (z - top) / temperature -
    log_total.
    """

    top: Tensor
    log_total: Tensor
    entropy: Tensor


def find_nucleus(
    logits: Tensor, parts: Tensor, temperature: Tensor, shard: VocabularyShard, mass: float
) -> Nucleus:
    """Of logits [T, padded columns], of which `parts` is `reduction.reduce_logits`; alike on all
    ranks.

    Collectives: an all-gather of CANDIDATES + 2 floats a token, and more of them for tokens whose
    nucleus is larger.
    """
    z = true_columns(logits, shard)
    threshold, entropy = parts.new_empty(len(z)), parts.new_empty(len(z))
    open_rows, count = torch.arange(len(z), device=z.device), CANDIDATES
    while len(open_rows):
        count = min(
            count, logits.shape[1] + 1
        )  # one more than any shard has: then what is missing is minus infinity
        offered = torch.cat([parts[:2, open_rows], _largest(z[open_rows], count)])
        (gathered,) = Gathering([offered], shard).wait()
        found, certain = _among(gathered, temperature[open_rows], mass)
        threshold[open_rows[certain]] = found.threshold[certain]
        entropy[open_rows[certain]] = found.entropy[certain]
        open_rows, count = open_rows[~certain], count * GROWTH
    return Nucleus(threshold, entropy)


def _largest(z: Tensor, count: int) -> Tensor:
    """[count, T]: the largest logits of z [T, columns], falling; minus infinity where there are no
    more.
    """
    there = min(count, z.shape[1])
    largest = z.new_full((count, len(z)), -torch.inf)
    largest[:there] = z.topk(there).values.t()
    return largest


def _among(gathered: Tensor, temperature: Tensor, mass: float) -> tuple[Nucleus, Tensor]:
    """From m, sum e and the largest logits of every shard, [shards, 2 + count, T]: the nucleus, and
    [T] bool, whether it is certain: whether no logit that was not offered can lie above the largest
    one outside of it.
    """
    top, step = shard_steps(gathered[:, 0], temperature)
    total = (step.double().exp() * gathered[:, 1].double()).sum(0)
    z = (
        gathered[:, 2:]
        .permute(2, 0, 1)
        .reshape(len(temperature), -1)
        .sort(1, descending=True)
        .values
    )
    there = z > -torch.inf
    x = ((z - top[:, None]).double() / temperature[:, None].double()).where(there, 0.0)
    e = x.exp() * there
    reached = (e.cumsum(1) >= mass * total[:, None]) | ~there
    smallest = z.gather(1, reached.int().argmax(1, keepdim=True))
    outside = z.where(z < smallest, -torch.inf).max(1).values
    certain = reached.any(1) & (outside >= gathered[:, -1].max(0).values)
    middle = (
        smallest[:, 0] + outside
    ) / 2  # between the two, rounding in another pass cannot change the set
    threshold = middle.where((middle > outside) | (outside == -torch.inf), smallest[:, 0])
    e = e * (z >= threshold[:, None])
    inside = e.sum(1)
    entropy = inside.log() - (e * x).sum(1) / inside
    return Nucleus(threshold, entropy.to(gathered.dtype)), certain


def reduce_nucleus(
    logits: Tensor, highest: Tensor, threshold: Tensor, temperature: Tensor, shard: VocabularyShard
) -> Tensor:
    """[2, T]: sum e and sum e x over the nucleus, of logits [T, padded columns]; highest [T]: m of
    the shard.
    """
    parts = logits.new_empty(2, len(logits), dtype=statistics_dtype(logits))
    for rows in tiles(logits):
        z = true_columns(logits[rows], shard)
        x = (z - highest[rows, None]) / temperature[rows, None]
        e = x.exp() * (z >= threshold[rows, None])
        parts[0, rows], parts[1, rows] = e.sum(1), (e * x).sum(1)
    return parts


def merge_nucleus(highest: Tensor, gathered: Tensor, temperature: Tensor) -> MergedNucleus:
    """From every shard's m [shards, T] and `reduce_nucleus` [shards, 2, T]. A nucleus that logits
    have left since its threshold was found is empty: its entropy is 0, and so is the gradient.
    """
    top, step = shard_steps(highest, temperature)
    log_total, mean = merge_shards(gathered[:, 0], gathered[:, 1], step, step)
    return MergedNucleus(top, log_total, (log_total - mean).where(log_total > -torch.inf, 0.0))


def gradient_with_nucleus(
    logits: Tensor,
    tokens: Tokens,
    merged: Merged,
    slopes: Slopes,
    threshold: Tensor,
    nucleus: MergedNucleus,
    by_nucleus: Tensor | None,
    shard: VocabularyShard,
) -> Tensor:
    """`reduction.logits_gradient`, a new tensor, and what the entropy of the nucleus adds;
    by_nucleus [T]: the derivative of the loss by it, None for none.
    """
    out = logits_gradient(logits, tokens, merged, slopes, shard, out=torch.empty_like(logits))
    if by_nucleus is None:
        return out
    slope = by_nucleus / tokens.temperature
    for rows in tiles(logits):
        z = true_columns(logits[rows], shard)
        log_q = (z - nucleus.top[rows, None]) / tokens.temperature[rows, None] - nucleus.log_total[
            rows, None
        ]
        added = log_q.exp() * (log_q + nucleus.entropy[rows, None]) * slope[rows, None]
        out[rows, : shard.columns] -= added.where(z >= threshold[rows, None], 0.0)
    return out
