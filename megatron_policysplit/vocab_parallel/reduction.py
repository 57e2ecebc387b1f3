"""The algebra: a shard of logits reduced to a few floats per token, shards merged, and the gradient
of the logits.

With z the logits of a token, t its temperature and m = max z over the columns of a shard, x = (z -
m) / t and e = exp(x). A shard gives m, sum e, sum e x and z at the target; so does, with other m,
the whole row, whose sums are the shards' sums brought to a common m. Then with s = log sum e of the
row:

    log p(target) = (z_target - m) / t - s        entropy = s - E[x]
    KL(a || b) = E_a[x_a - x_b] - (s_a - s_b)     which is exactly 0 for equal logits

Subtracting m before dividing by t costs no digits however far all logits are from 0. Everything
here works on rows a few at a time, so that what it needs beside its input and output stays in a
processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from megatron_policysplit.vocab_parallel.shard import VocabularyShard

TILE_ELEMENTS = 2**18


class PerToken:
    """A dataclass of tensors [T], or None for one that is not there; cut like a tensor."""

    def __getitem__(self, rows: slice) -> Self:
        return type(self)(
            *(None if value is None else value[rows] for value in vars(self).values())
        )


@dataclass(frozen=True)
class Tokens(PerToken):
    """What is asked of the logits of T tokens: targets (int64, global ids) and temperature, [T]."""

    targets: Tensor
    temperature: Tensor


@dataclass(frozen=True)
class Slopes(PerToken):
    """d loss / d logprobs and d loss / d entropy, [T] each; None for an entropy without gradient."""

    by_logprob: Tensor
    by_entropy: Tensor | None


@dataclass(frozen=True)
class Exponentials:
    """What `reduce_logits` leaves of logits if asked: e [T, padded columns], and m of the shard [T]
    in `highest`.
    """

    values: Tensor
    highest: Tensor


@dataclass(frozen=True)
class Merged(PerToken):
    """Of whole rows, [T] each: log_p of any column is (z - top) / temperature - log_total. Nats."""

    top: Tensor
    log_total: Tensor
    logprobs: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class MergedPair(PerToken):
    """Of two policies a and b at the same tokens, [T] each: KL(a || b) and KL(b || a), nats; and
    what their gradients need: log p of policy a is (z_a - top_a) / temperature_a - log_total_a.
    """

    kl_ab: Tensor
    kl_ba: Tensor
    top_a: Tensor
    log_total_a: Tensor
    top_b: Tensor
    log_total_b: Tensor


def statistics_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def reduce_logits(
    logits: Tensor, tokens: Tokens, shard: VocabularyShard, *, leave_exponentials: bool = False
) -> Tensor:
    """[4, T]: m, sum e, sum e x, z at the target (0 where another rank has it), of logits [T,
    padded columns].

    leave_exponentials: overwrite the true columns of `logits`, of 32 or 64 bits, with e; for
    `exponentials_gradient`.
    """
    parts = logits.new_empty(4, len(logits), dtype=statistics_dtype(logits))
    temperature = tokens.temperature
    local, owned = _local(tokens.targets, shard)
    scaled = bool((temperature != 1).any())
    for rows in tiles(logits):
        z = true_columns(logits[rows], shard)
        at_target = (
            z.gather(1, local[rows, None])[:, 0] if shard.columns else parts.new_zeros(len(z))
        )
        parts[3, rows] = at_target.where(owned[rows], 0.0)
        highest, x = _shift(z, temperature[rows] if scaled else None)
        e = torch.exp(x, out=z) if leave_exponentials else x.exp()
        parts[0, rows], parts[1, rows], parts[2, rows] = highest, e.sum(1), x.mul_(e).sum(1)
    return parts


def reduce_pair(
    a: Tensor,
    b: Tensor,
    temperature_a: Tensor,
    temperature_b: Tensor,
    shard: VocabularyShard,
    rows_a: Tensor | None = None,
    rows_b: Tensor | None = None,
) -> Tensor:
    """[6, P]: m_a, sum e_a, sum e_a (x_a - x_b), m_b, sum e_b, sum e_b (x_b - x_a), of pairs of
    policies.

    a, b: logits [N, padded columns]; temperature_* [P]. rows_* [P] int64: which row of the logits
    is each pair's, so that none is copied but a tile's; None: each in turn.
    """
    parts = a.new_empty(6, len(temperature_a), dtype=statistics_dtype(a))
    scaled_a, scaled_b = bool((temperature_a != 1).any()), bool((temperature_b != 1).any())
    for pairs in tiles(a, len(temperature_a)):
        highest_a, x_a = _shift(
            _rows(a, rows_a, pairs, shard), temperature_a[pairs] if scaled_a else None
        )
        highest_b, x_b = _shift(
            _rows(b, rows_b, pairs, shard), temperature_b[pairs] if scaled_b else None
        )
        e_a, e_b, d = x_a.exp(), x_b.exp(), x_a.sub_(x_b)
        parts[0, pairs], parts[1, pairs], parts[2, pairs] = (
            highest_a,
            e_a.sum(1),
            e_a.mul_(d).sum(1),
        )
        parts[3, pairs], parts[4, pairs], parts[5, pairs] = (
            highest_b,
            e_b.sum(1),
            -e_b.mul_(d).sum(1),
        )
    return parts


def merge(gathered: Tensor, temperature: Tensor) -> Merged:
    """From `reduce_logits` of every shard, [shards, 4, T]; temperature [T]. The same bits wherever
    it is done.
    """
    top, step = shard_steps(gathered[:, 0], temperature)
    log_total, mean = merge_shards(gathered[:, 1], gathered[:, 2], step, step)
    logprobs = (gathered[:, 3].sum(0) - top) / temperature - log_total
    return Merged(top, log_total, logprobs, log_total - mean)


def merge_pair(gathered: Tensor, temperature_a: Tensor, temperature_b: Tensor) -> MergedPair:
    """From `reduce_pair` of every shard, [shards, 6, T]. In fp64: the sums can be large, their
    difference small.
    """
    dtype, gathered = gathered.dtype, gathered.double()
    top_a, step_a = shard_steps(gathered[:, 0], temperature_a.double())
    top_b, step_b = shard_steps(gathered[:, 3], temperature_b.double())
    log_a, mean_a = merge_shards(gathered[:, 1], gathered[:, 2], step_a, step_a - step_b)
    log_b, mean_b = merge_shards(gathered[:, 4], gathered[:, 5], step_b, step_b - step_a)
    gap = log_a - log_b
    merged = (mean_a - gap, mean_b + gap, top_a, log_a, top_b, log_b)
    return MergedPair(*(value.to(dtype) for value in merged))


def logits_gradient(
    logits: Tensor,
    tokens: Tokens,
    merged: Merged,
    slopes: Slopes,
    shard: VocabularyShard,
    out: Tensor,
) -> Tensor:
    """d loss / d logits into `out` [T, padded columns], which may be `logits` itself. Padding
    columns get 0.

    dlogp/dz = (1[target] - p) / t; dH/dz = -p (log p + H) / t.
    """
    factors = _Factors.of((-merged.log_total).exp(), tokens, merged, slopes, shard)
    for rows in tiles(logits):
        z = true_columns(logits[rows], shard)
        e = (z - merged.top[rows, None]).div_(tokens.temperature[rows, None]).exp_()
        out[rows, : shard.columns] = _into_gradient(e, factors[rows])
    out[:, shard.columns :] = 0
    return out


def exponentials_gradient(
    exponentials: Exponentials,
    tokens: Tokens,
    merged: Merged,
    slopes: Slopes,
    shard: VocabularyShard,
) -> Tensor:
    """`logits_gradient` in place of the exponentials: what `reduce_logits` computed is not computed
    again.
    """
    e, below = exponentials.values, (exponentials.highest - merged.top) / tokens.temperature
    factors = _Factors.of((below - merged.log_total).exp(), tokens, merged, slopes, shard)
    for rows in tiles(e):
        _into_gradient(e[rows, : shard.columns], factors[rows])
    e[:, shard.columns :] = 0
    return e


@dataclass(frozen=True)
class _Factors(PerToken):
    """What turns e into the gradient of the logits, [T] each: p = e to_p; slopes by z, not by z /
    t; the target's column in the shard, if it has any, and what is added there.
    """

    to_p: Tensor
    entropy: Tensor
    by_logprob: Tensor
    by_entropy: Tensor | None
    column: Tensor
    at_column: Tensor

    @classmethod
    def of(
        cls, to_p: Tensor, tokens: Tokens, merged: Merged, slopes: Slopes, shard: VocabularyShard
    ) -> Self:
        column, owned = _local(tokens.targets, shard)
        by_logprob = slopes.by_logprob / tokens.temperature
        by_entropy = None if slopes.by_entropy is None else slopes.by_entropy / tokens.temperature
        return cls(
            to_p, merged.entropy, by_logprob, by_entropy, column, by_logprob.where(owned, 0.0)
        )


def _into_gradient(e: Tensor, factors: _Factors) -> Tensor:
    """e [T, v] overwritten with d loss / d z. Without entropy that is e times one number a token."""
    if factors.by_entropy is None:
        e.mul_((factors.to_p * -factors.by_logprob)[:, None])
    else:
        p = e.mul_(factors.to_p[:, None])
        log_p = p.clamp_min(torch.finfo(p.dtype).tiny).log_()  # where p is 0, p log p must be
        by_entropy = log_p.add_(factors.entropy[:, None]).mul_(factors.by_entropy[:, None])
        p.mul_(by_entropy.add_(factors.by_logprob[:, None]).neg_())
    if e.shape[1]:
        e.scatter_add_(1, factors.column[:, None], factors.at_column[:, None])
    return e


def pair_gradient(
    a: Tensor,
    b: Tensor,
    temperature_a: Tensor,
    temperature_b: Tensor,
    merged: MergedPair,
    by_kl_ab: Tensor,
    by_kl_ba: Tensor,
    shard: VocabularyShard,
    add_to_a: Tensor,
    add_to_b: Tensor,
) -> None:
    """Add d loss / d z_a and d loss / d z_b to two [T, padded columns]; by_kl_* [T]: d loss / d KL.

    With L = log p_a - log p_b: dKL(a||b)/dz_a = p_a (L - KL(a||b)) / t_a and dKL(a||b)/dz_b = (p_b
    - p_a) / t_b.
    """
    for rows in tiles(a):
        log_a = _log_p(
            a[rows], temperature_a[rows], merged.top_a[rows], merged.log_total_a[rows], shard
        )
        log_b = _log_p(
            b[rows], temperature_b[rows], merged.top_b[rows], merged.log_total_b[rows], shard
        )
        p_a, p_b, gap = log_a.exp(), log_b.exp(), log_a - log_b
        ab, ba = by_kl_ab[rows, None], by_kl_ba[rows, None]
        to_a = p_a * (gap - merged.kl_ab[rows, None]) * ab + (p_a - p_b) * ba
        to_b = p_b * (-gap - merged.kl_ba[rows, None]) * ba + (p_b - p_a) * ab
        add_to_a[rows, : shard.columns] += to_a / temperature_a[rows, None]
        add_to_b[rows, : shard.columns] += to_b / temperature_b[rows, None]


def tiles(logits: Tensor, rows: int | None = None) -> Iterator[slice]:
    """Rows as wide as those of `logits`, as many (None) or `rows`, a few at a time that make about
    TILE_ELEMENTS.
    """
    height, rows = (
        max(1, TILE_ELEMENTS // max(1, logits.shape[1])),
        len(logits) if rows is None else rows,
    )
    return (slice(start, min(start + height, rows)) for start in range(0, rows, height))


def _local(targets: Tensor, shard: VocabularyShard) -> tuple[Tensor, Tensor]:
    """Targets as columns of the shard, clamped into it, and whether they are in it; [T] each."""
    local = targets - shard.start
    return local.clamp(0, max(0, shard.columns - 1)), (local >= 0) & (local < shard.columns)


def true_columns(logits: Tensor, shard: VocabularyShard) -> Tensor:
    """Logits [T, padded columns] without the padding, in at least 32 bits."""
    return logits[:, : shard.columns].to(statistics_dtype(logits))


def _rows(logits: Tensor, rows: Tensor | None, tile: slice, shard: VocabularyShard) -> Tensor:
    """The true columns of a tile of `logits`, or of a tile of those at `rows`."""
    if rows is None:
        return true_columns(logits[tile], shard)
    return true_columns(logits[:, : shard.columns].index_select(0, rows[tile]), shard)


def _shift(z: Tensor, temperature: Tensor | None) -> tuple[Tensor, Tensor]:
    """m [T] and x [T, v], a new tensor; a temperature of None is 1. m is minus infinity if the
    shard is empty.
    """
    highest = z.max(1).values if z.shape[1] else z.new_full((len(z),), -torch.inf)
    x = z - highest[:, None]
    return highest, x if temperature is None else x.div_(temperature[:, None])


def _log_p(
    logits: Tensor, temperature: Tensor, top: Tensor, log_total: Tensor, shard: VocabularyShard
) -> Tensor:
    """log p of the shard's columns [T, v], a new tensor."""
    z = true_columns(logits, shard)
    return (z - top[:, None]).div_(temperature[:, None]).sub_(log_total[:, None])


def shard_steps(highest: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """From the shards' maxima [shards, T]: the row's, [T], and how far each lies below it, [shards,
    T] (<= 0).

    An empty shard is no step below; its sums are 0 anyway.
    """
    top = highest.max(0).values
    step = (highest - top) / temperature
    return top, step.where(highest != -torch.inf, 0.0)


def merge_shards(
    total: Tensor, moment: Tensor, step: Tensor, moment_step: Tensor
) -> tuple[Tensor, Tensor]:
    """Shards' [shards, T] to (log sum e, E[x]) over the whole row, [T] each.

    total: a shard's sum e; moment: its sum e x. step, moment_step: what the shifted logits and x
    gain when the shift is the row's.
    """
    scale = step.exp()
    total_all = (scale * total).sum(0)
    moment_all = (scale * (moment + moment_step * total)).sum(0)
    return total_all.log(), moment_all / total_all
