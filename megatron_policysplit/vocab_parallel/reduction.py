"""The algebra: logits of a shard to a few floats per token, their merge, and the logits' gradient.

For one token let z be its logits, t its temperature and m = max z over the columns of a shard. With
x = (z - m) / t and e = exp(x) a shard gives m, sum e, sum e x and z at the target. The same
quantities of the whole row, all columns of all shards, follow from them: each shard's sums are
brought to the m of the row and added. With s = log sum e of the row:

    log p(target) = (z_target - m) / t - s        entropy = s - E[x]
    KL(a || b) = E_a[x_a - x_b] - (s_a - s_b)     exactly 0 for equal logits

Subtracting m before dividing by t loses no digits, however far all logits are from 0. Every
function works on a tile of rows at a time (`VocabularyShard.tiles`), so that its temporary tensors
stay small: on a CPU in its cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from megatron_policysplit.vocab_parallel.shard import VocabularyShard


class PerToken:
    """Base of dataclasses whose fields are tensors [T], or None for an absent one."""

    def __getitem__(self, rows: slice) -> Self:
        """The same object of some of the tokens; every field is indexed."""
        return type(self)(
            *(None if value is None else value[rows] for value in vars(self).values())
        )


@dataclass(frozen=True)
class Tokens(PerToken):
    """What the statistics of T tokens depend on beside their logits."""

    targets: Tensor  # [T] int64, global ids
    temperature: Tensor  # [T] in the dtype of the statistics


@dataclass(frozen=True)
class Slopes(PerToken):
    """Derivatives of the loss by the statistics of every token."""

    by_logprob: Tensor  # [T]: d loss / d logprobs
    by_entropy: Tensor | None  # [T]: d loss / d entropy; None where the loss has no entropy


@dataclass(frozen=True)
class Exponentials:
    """The exponentials that `reduce_logits` leaves in place of the logits if asked."""

    values: Tensor  # [T, padded columns]: e
    highest: Tensor  # [T]: m of the shard


@dataclass(frozen=True)
class Merged(PerToken):
    """Statistics over the whole vocabulary, [T] each, in nats; `merge` makes them.

    log p of any column is (z - top) / temperature - log_total.
    """

    top: Tensor  # m of the row: the highest logit
    log_total: Tensor  # s: log sum e of the row
    logprobs: Tensor  # of the targets
    entropy: Tensor


@dataclass(frozen=True)
class MergedPair(PerToken):
    """KL between two policies a and b at the same tokens, [T] each, and what its gradients need.

    log p of policy a is (z_a - top_a) / temperature_a - log_total_a; that of b likewise.
    """

    kl_ab: Tensor  # KL(a || b), nats
    kl_ba: Tensor  # KL(b || a), nats
    top_a: Tensor
    log_total_a: Tensor
    top_b: Tensor
    log_total_b: Tensor


def statistics_dtype(logits: Tensor) -> torch.dtype:
    """The dtype of all statistics: fp32, or fp64 for tensors in fp64."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def reduce_logits(
    logits: Tensor, tokens: Tokens, shard: VocabularyShard, *, leave_exponentials: bool = False
) -> Tensor:
    """Reduce logits [T, padded columns] to m, sum e, sum e x and z at the target: [4, T].

    z at the target is 0 where another rank has the target. leave_exponentials: overwrite the true
    columns of `logits`, which must be of 32 or 64 bits, with e; `exponentials_gradient` uses them.
    """
    parts = logits.new_empty(4, len(logits), dtype=statistics_dtype(logits))
    temperature = tokens.temperature
    local, owned = _local(tokens.targets, shard)
    # Dividing by 1 would change no bit but cost a pass over the logits.
    scaled = bool((temperature != 1).any())
    for rows in shard.tiles(*logits.shape):
        z = true_columns(logits[rows], shard)
        at_target = (
            z.gather(1, local[rows, None])[:, 0] if shard.columns else parts.new_zeros(len(z))
        )
        parts[3, rows] = at_target.where(owned[rows], 0.0)
        highest, x = _shift(z, temperature[rows] if scaled else None)
        # `z` is a view of `logits` here: for 32 and 64 bits `true_columns` does not copy.
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
    """Reduce the logits of P pairs of policies to six floats a pair: [6, P].

    The rows are m_a, sum e_a, sum e_a (x_a - x_b), m_b, sum e_b, sum e_b (x_b - x_a).

    a, b: logits [N, padded columns].
    temperature_a, temperature_b: [P].
    rows_a, rows_b: [P] int64, the row of the logits that each pair uses, so that only a tile of
        them is ever copied; None: pair i uses row i.
    """
    parts = a.new_empty(6, len(temperature_a), dtype=statistics_dtype(a))
    scaled_a, scaled_b = bool((temperature_a != 1).any()), bool((temperature_b != 1).any())
    for pairs in shard.tiles(len(temperature_a), a.shape[1]):
        t_a = temperature_a[pairs] if scaled_a else None
        t_b = temperature_b[pairs] if scaled_b else None
        highest_a, x_a = _shift(_rows(a, rows_a, pairs, shard), t_a)
        highest_b, x_b = _shift(_rows(b, rows_b, pairs, shard), t_b)
        e_a, e_b, gap = x_a.exp(), x_b.exp(), x_a.sub_(x_b)
        # Each sum of e before e is overwritten by e times the gap.
        parts[0, pairs], parts[1, pairs] = highest_a, e_a.sum(1)
        parts[2, pairs] = e_a.mul_(gap).sum(1)
        parts[3, pairs], parts[4, pairs] = highest_b, e_b.sum(1)
        parts[5, pairs] = -e_b.mul_(gap).sum(1)
    return parts


def merge(gathered: Tensor, temperature: Tensor) -> Merged:
    """Merge `reduce_logits` of every shard, [shards, 4, T]; temperature [T].

    A sum of floats depends on its order. The shards come in rank order on every rank, so all ranks
    get the same bits.
    """
    top, step = shard_steps(gathered[:, 0], temperature)
    log_total, mean = merge_shards(gathered[:, 1], gathered[:, 2], step, step)
    logprobs = (gathered[:, 3].sum(0) - top) / temperature - log_total
    return Merged(top, log_total, logprobs, log_total - mean)


def merge_pair(gathered: Tensor, temperature_a: Tensor, temperature_b: Tensor) -> MergedPair:
    """Merge `reduce_pair` of every shard, [shards, 6, T]; temperature_* [T].

    Computed in fp64: a KL is a small difference of sums that can be large.
    """
    dtype, gathered = gathered.dtype, gathered.double()
    top_a, step_a = shard_steps(gathered[:, 0], temperature_a.double())
    top_b, step_b = shard_steps(gathered[:, 3], temperature_b.double())
    log_a, mean_a = merge_shards(gathered[:, 1], gathered[:, 2], step_a, step_a - step_b)
    log_b, mean_b = merge_shards(gathered[:, 4], gathered[:, 5], step_b, step_b - step_a)
    # KL(a || b) = mean_a - gap; KL(b || a) = mean_b + gap.
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
    """Write d loss / d logits into `out` [T, padded columns], which may be `logits`; return it.

    dlogp/dz = (1[target] - p) / t; dH/dz = -p (log p + H) / t. Padding columns get 0.
    """
    factors = _Factors.of((-merged.log_total).exp(), tokens, merged, slopes, shard)
    for rows in shard.tiles(*logits.shape):
        z = true_columns(logits[rows], shard)
        # Here e is shifted by the m of the row, so p = e exp(-log_total).
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
    """Overwrite the exponentials with d loss / d logits, as `logits_gradient` gives it.

    Returns [T, padded columns]. No exponential is computed a second time.
    """
    e = exponentials.values
    # These e are shifted by the m of the shard; the step brings p to the m of the row.
    step = (exponentials.highest - merged.top) / tokens.temperature
    factors = _Factors.of((step - merged.log_total).exp(), tokens, merged, slopes, shard)
    for rows in shard.tiles(*e.shape):
        _into_gradient(e[rows, : shard.columns], factors[rows])
    e[:, shard.columns :] = 0
    return e


@dataclass(frozen=True)
class _Factors(PerToken):
    """What turns e into the gradient of the logits, [T] each."""

    to_p: Tensor  # p = e to_p
    entropy: Tensor
    by_logprob: Tensor  # d loss / d logprobs, divided by the temperature
    by_entropy: Tensor | None  # d loss / d entropy, divided by the temperature
    column: Tensor  # the target's column, clamped into the shard
    at_column: Tensor  # what is added there; 0 where the target is another shard's

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
    """Overwrite e [T, v] with d loss / d z, and return it."""
    if factors.by_entropy is None:  # then it is e times one number a token, but at the target
        e.mul_((factors.to_p * -factors.by_logprob)[:, None])
    else:
        p = e.mul_(factors.to_p[:, None])
        # Where p is 0 its logarithm must be finite, so that p log p is 0 too.
        log_p = p.clamp_min(torch.finfo(p.dtype).tiny).log_()
        by_entropy = log_p.add_(factors.entropy[:, None]).mul_(factors.by_entropy[:, None])
        p.mul_(by_entropy.add_(factors.by_logprob[:, None]).neg_())
    if e.shape[1]:  # a shard of padding alone has no column to add to
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
    """Add d loss / d z_a to `add_to_a` and d loss / d z_b to `add_to_b`, [T, padded columns] each.

    by_kl_ab, by_kl_ba [T]: d loss / d KL. With L = log p_a - log p_b:

        dKL(a || b)/dz_a = p_a (L - KL(a || b)) / t_a        dKL(a || b)/dz_b = (p_b - p_a) / t_b
    """
    for rows in shard.tiles(*a.shape):
        t_a, t_b = temperature_a[rows], temperature_b[rows]
        log_a = _log_p(a[rows], t_a, merged.top_a[rows], merged.log_total_a[rows], shard)
        log_b = _log_p(b[rows], t_b, merged.top_b[rows], merged.log_total_b[rows], shard)
        p_a, p_b, gap = log_a.exp(), log_b.exp(), log_a - log_b
        ab, ba = by_kl_ab[rows, None], by_kl_ba[rows, None]
        to_a = p_a * (gap - merged.kl_ab[rows, None]) * ab + (p_a - p_b) * ba
        to_b = p_b * (-gap - merged.kl_ba[rows, None]) * ba + (p_b - p_a) * ab
        add_to_a[rows, : shard.columns] += to_a / t_a[:, None]
        add_to_b[rows, : shard.columns] += to_b / t_b[:, None]


def _local(targets: Tensor, shard: VocabularyShard) -> tuple[Tensor, Tensor]:
    """Targets as columns of the shard, clamped into it, and whether they lie in it; [T] each."""
    local = targets - shard.start
    return local.clamp(0, max(0, shard.columns - 1)), (local >= 0) & (local < shard.columns)


def true_columns(logits: Tensor, shard: VocabularyShard) -> Tensor:
    """Logits [T, padded columns] without the padding, in at least 32 bits; a view if they are."""
    return logits[:, : shard.columns].to(statistics_dtype(logits))


def _rows(logits: Tensor, rows: Tensor | None, tile: slice, shard: VocabularyShard) -> Tensor:
    """The true columns of a tile of `logits`; with `rows` of a tile of the logits at these rows."""
    if rows is None:
        return true_columns(logits[tile], shard)
    return true_columns(logits[:, : shard.columns].index_select(0, rows[tile]), shard)


def _shift(z: Tensor, temperature: Tensor | None) -> tuple[Tensor, Tensor]:
    """m [T] and x [T, v], a new tensor; a temperature of None is 1.

    m is minus infinity if the shard has no columns.
    """
    highest = z.max(1).values if z.shape[1] else z.new_full((len(z),), -torch.inf)
    x = z - highest[:, None]
    return highest, x if temperature is None else x.div_(temperature[:, None])


def _log_p(
    logits: Tensor, temperature: Tensor, top: Tensor, log_total: Tensor, shard: VocabularyShard
) -> Tensor:
    """log p of the shard's columns, [T, v] in a new tensor."""
    z = true_columns(logits, shard)
    return (z - top[:, None]).div_(temperature[:, None]).sub_(log_total[:, None])


def shard_steps(highest: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """The row's maximum [T] from the shards' [shards, T], and the steps of their x, <= 0.

    A shard's step [shards, T] is what its x gains when it is shifted by the row's maximum.
    """
    top = highest.max(0).values
    step = (highest - top) / temperature
    # A shard without columns has sums of 0, which an infinite step would turn into NaN.
    return top, step.where(highest != -torch.inf, 0.0)


def merge_shards(
    total: Tensor, moment: Tensor, step: Tensor, moment_step: Tensor
) -> tuple[Tensor, Tensor]:
    """Merge sums of shards to (log sum e, E[x]) over the whole row, [T] each.

    total: [shards, T], sum e of each shard.
    moment: [shards, T], its sum e x; for a pair of policies sum e_a (x_a - x_b).
    step: [shards, T], what the exponent of e gains when the shift is that of the row.
    moment_step: [shards, T], what x, or x_a - x_b, gains then.
    """
    scale = step.exp()
    total_all = (scale * total).sum(0)
    moment_all = (scale * (moment + moment_step * total)).sum(0)
    return total_all.log(), moment_all / total_all
