"""The entropy of a token's nucleus, over a sharded vocabulary, with gradient.

The nucleus is the smallest set of the most likely columns that holds a given mass of the
probability (columns of equal logits go together). `find_nucleus` finds it exactly, from the largest
logits of each shard, and represents it by a threshold: a logit between the smallest one inside and
the largest one outside. With the threshold as a constant the entropy of the distribution
renormalised over the nucleus N is one more reduction. With e and x as in `reduction`, S = sum e and
U = sum e x over N, and q = e / S:

    H_N = log S - U / S        dH_N/dz_i = -q_i (log q_i + H_N) / t for i in N, else 0
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_policysplit.vocab_parallel.reduction import (
    PerToken,
    merge_shards,
    shard_steps,
    statistics_dtype,
    true_columns,
)
from megatron_policysplit.vocab_parallel.shard import Gathering, VocabularyShard

# Logits of a token that each shard offers in the first round; GROWTH times as many in the next one
# for the tokens whose nucleus is larger.
CANDIDATES = 64
GROWTH = 16


@dataclass(frozen=True)
class Nucleus(PerToken):
    """The nucleus of every token, from `find_nucleus`."""

    threshold: Tensor  # [T]: columns with logits at or above it; all columns for minus infinity
    entropy: Tensor  # [T]: nats, of the distribution renormalised over the nucleus


@dataclass(frozen=True)
class MergedNucleus(PerToken):
    """Statistics of the nucleus over the whole vocabulary, [T] each; `merge_nucleus` makes them.

    log q of a column of the nucleus is (z - top) / temperature - log_total, with `Merged.top`.
    """

    log_total: Tensor  # log S; minus infinity for an empty nucleus
    entropy: Tensor  # H_N, nats


@dataclass(frozen=True)
class NucleusSlopes(PerToken):
    """What the nucleus's entropy adds to the gradient of the logits depends on these, [T] each."""

    threshold: Tensor
    merged: MergedNucleus
    by_entropy: Tensor  # d loss / d H_N


def find_nucleus(
    logits: Tensor, parts: Tensor, temperature: Tensor, shard: VocabularyShard, mass: float
) -> Nucleus:
    """Find the smallest set of columns that holds `mass` of the probability of every token.

    The result has the same bits on all ranks. Collectives over the tensor-parallel group: one
    all-gather of CANDIDATES + 2 floats a token, then more for tokens whose nucleus is larger.

    logits: [T, padded columns] of this shard.
    parts: [4, T], `reduction.reduce_logits` of them.
    temperature: [T].
    """
    z = true_columns(logits, shard)
    threshold, entropy = parts.new_empty(len(z)), parts.new_empty(len(z))
    open_rows, count = torch.arange(len(z), device=z.device), CANDIDATES
    # All ranks see the same gathered floats, so they agree on the rows that stay open and take part
    # in the same number of collectives.
    while len(open_rows):
        # One more than any shard has columns: the last offer is then minus infinity, which says
        # that nothing was withheld, and every row becomes certain.
        count = min(count, logits.shape[1] + 1)
        offer = torch.cat([parts[:2, open_rows], _largest(z[open_rows], count)])
        (gathered,) = Gathering([offer], shard).wait()
        nucleus, certain = _nucleus_of_candidates(gathered, temperature[open_rows], mass)
        threshold[open_rows[certain]] = nucleus.threshold[certain]
        entropy[open_rows[certain]] = nucleus.entropy[certain]
        open_rows, count = open_rows[~certain], count * GROWTH
    return Nucleus(threshold, entropy)


def _largest(z: Tensor, count: int) -> Tensor:
    """The `count` largest logits of z [T, columns], falling: [count, T].

    Minus infinity where there are no more columns.
    """
    available = min(count, z.shape[1])
    largest = z.new_full((count, len(z)), -torch.inf)
    largest[:available] = z.topk(available).values.t()
    return largest


def _nucleus_of_candidates(
    gathered: Tensor, temperature: Tensor, mass: float
) -> tuple[Nucleus, Tensor]:
    """The nucleus among the logits that the shards offered, and whether it is certain, [T] bool.

    It is certain if no logit that was withheld can lie above the largest candidate outside of it.
    gathered: [shards, 2 + count, T], of every shard m, sum e and its largest logits.
    """
    top, step = shard_steps(gathered[:, 0], temperature)
    # sum e over the whole vocabulary, not only over the candidates. In fp64, because near the mass
    # a small probability decides.
    total = (step.double().exp() * gathered[:, 1].double()).sum(0)
    z = gathered[:, 2:].permute(2, 0, 1).reshape(len(temperature), -1)
    z = z.sort(1, descending=True).values
    is_column = z > -torch.inf
    x = ((z - top[:, None]).double() / temperature[:, None].double()).where(is_column, 0.0)
    e = x.exp() * is_column
    # The first candidate at which the sum reaches the mass. Past the last column counts as reached:
    # rounding may leave the sum of all columns just below a mass of 1.
    reaches = (e.cumsum(1) >= mass * total[:, None]) | ~is_column
    smallest = z.gather(1, reaches.int().argmax(1, keepdim=True))
    outside = z.where(z < smallest, -torch.inf).max(1).values
    # A shard withholds only logits up to the last one that it offered.
    certain = reaches.any(1) & (outside >= gathered[:, -1].max(0).values)
    # Halfway between the two, so that rounding in a later pass cannot change the set; unless they
    # are neighbouring floats, whose middle is one of them.
    middle = (smallest[:, 0] + outside) / 2
    threshold = middle.where((middle > outside) | (outside == -torch.inf), smallest[:, 0])
    e = e * (z >= threshold[:, None])
    inside = e.sum(1)
    entropy = inside.log() - (e * x).sum(1) / inside
    return Nucleus(threshold, entropy.to(gathered.dtype)), certain


def reduce_nucleus(
    logits: Tensor, highest: Tensor, threshold: Tensor, temperature: Tensor, shard: VocabularyShard
) -> Tensor:
    """Reduce logits [T, padded columns] to S = sum e and U = sum e x over the nucleus: [2, T].

    highest [T]: m of the shard. threshold, temperature: [T].
    """
    parts = logits.new_empty(2, len(logits), dtype=statistics_dtype(logits))
    for rows in shard.tiles(*logits.shape):
        z = true_columns(logits[rows], shard)
        x = (z - highest[rows, None]) / temperature[rows, None]
        e = x.exp() * (z >= threshold[rows, None])
        parts[0, rows], parts[1, rows] = e.sum(1), (e * x).sum(1)
    return parts


def merge_nucleus(highest: Tensor, gathered: Tensor, temperature: Tensor) -> MergedNucleus:
    """Merge every shard's m [shards, T] and `reduce_nucleus` [shards, 2, T].

    The weights may have moved since the threshold was found. If no logit reaches it any more the
    nucleus is empty: its entropy is 0, and so is the gradient.
    """
    _, step = shard_steps(highest, temperature)
    log_total, mean = merge_shards(gathered[:, 0], gathered[:, 1], step, step)
    return MergedNucleus(log_total, (log_total - mean).where(log_total > -torch.inf, 0.0))


def add_nucleus_gradient(
    gradient: Tensor,
    logits: Tensor,
    temperature: Tensor,
    top: Tensor,
    slopes: NucleusSlopes,
    shard: VocabularyShard,
) -> None:
    """Add what the entropy of the nucleus gives to d loss / d logits [T, padded columns].

    temperature, top: [T]; top is `Merged.top`.
    """
    slope = slopes.by_entropy / temperature
    for rows in shard.tiles(*logits.shape):
        z, nucleus = true_columns(logits[rows], shard), slopes.merged[rows]
        log_q = (z - top[rows, None]) / temperature[rows, None] - nucleus.log_total[:, None]
        minus = log_q.exp() * (log_q + nucleus.entropy[:, None]) * slope[rows, None]
        # `where`, not a product: outside of the nucleus log_q and its exponential may be infinite.
        inside = z >= slopes.threshold[rows, None]
        gradient[rows, : shard.columns] -= minus.where(inside, 0.0)
