"""Log-prob, entropy and KL of a vocabulary that is sharded over tensor-parallel ranks.

Each rank reduces its shard of the logits to a few floats per token. One all-gather of those floats,
merged in rank order, gives every rank the same bits. Padded vocabulary columns are left out before
anything is reduced, and the sampling temperature divides the logits first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabularyShard:
    """Columns [start, start + columns) of the vocabulary are this rank's; later columns of its logits are padding."""

    start: int
    columns: int
    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, vocab_size: int, padded_columns: int, rank: int, group: dist.ProcessGroup | None) -> "VocabularyShard":
        """The shard of `rank` when each rank holds `padded_columns` columns of the padded vocabulary."""
        start = rank * padded_columns
        return cls(start, max(0, min(padded_columns, vocab_size - start)), group)


def token_statistics(
    logits: Tensor, targets: Tensor, temperature: Tensor, shard: VocabularyShard
) -> tuple[Tensor, Tensor]:
    """Log-prob of the target and entropy, in nats, per token: ([T], [T]) fp32 (fp64 for fp64 logits).

    logits [T, padded columns] of this rank's shard; targets [T] int64 global ids; temperature [T] > 0.
    Both outputs are differentiable in the logits. Forward: one all-gather of 4 floats per token and rank.
    Backward: none.
    """
    return _TokenStatistics.apply(logits, targets, temperature, shard)


class _TokenStatistics(torch.autograd.Function):
    """Forward communicates once over the tensor-parallel group (all-gather); backward is local."""

    @staticmethod
    def forward(ctx, logits, targets, temperature, shard):
        scaled = _scaled(logits, temperature, shard)
        highest, total, moment = _reduce(scaled)
        local = targets - shard.start
        owned = (local >= 0) & (local < shard.columns)
        at_target = scaled.new_zeros(len(scaled))
        if shard.columns:
            picked = scaled.gather(1, local.clamp(0, shard.columns - 1)[:, None])[:, 0]
            at_target = picked.where(owned, 0.0)

        gathered = _all_gather(torch.stack([highest, total, moment, at_target]), shard.group)
        log_total, shift, mean_shifted = _merge(gathered[:, 0], gathered[:, 1], gathered[:, 2])
        logprobs = (gathered[:, 3].sum(0) - shift) - log_total
        entropy = log_total - mean_shifted
        ctx.shard = shard
        ctx.save_for_backward(logits, temperature, local, owned, shift, log_total, entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy):
        logits, temperature, local, owned, shift, log_total, entropy = ctx.saved_tensors
        columns = ctx.shard.columns
        log_p = _scaled(logits, temperature, ctx.shard) - shift[:, None] - log_total[:, None]
        p = log_p.exp()
        grad = -p * grad_logprobs[:, None] - p * (log_p + entropy[:, None]) * grad_entropy[:, None]
        if columns:
            grad.scatter_add_(1, local.clamp(0, columns - 1)[:, None], grad_logprobs.where(owned, 0.0)[:, None])
        full = torch.zeros_like(logits)
        full[:, :columns] = (grad / temperature[:, None]).to(logits.dtype)
        return full, None, None, None


@torch.no_grad()
def kl_divergence(
    logits_a: Tensor, logits_b: Tensor, temperature_a: Tensor, temperature_b: Tensor, shard: VocabularyShard
) -> tuple[Tensor, Tensor]:
    """Exact KL(a || b) and KL(b || a) over the whole vocabulary, nats, per token: ([T], [T]).

    logits_* [T, padded columns] of this rank's shard; temperature_* [T]. One all-gather of 6 floats per
    token and rank. With d = z_a - z_b, KL(a || b) = E_a[d] - (lse_a - lse_b), so equal logits give exactly 0.
    """
    a, b = _scaled(logits_a, temperature_a, shard), _scaled(logits_b, temperature_b, shard)
    difference = a - b
    highest_a, total_a, cross_a = _reduce(a, difference)
    highest_b, total_b, cross_b = _reduce(b, -difference)
    local = torch.stack([highest_a, total_a, cross_a, highest_b, total_b, cross_b])
    gathered = _all_gather(local, shard.group).double()
    log_a, shift_a, mean_a = _merge(gathered[:, 0], gathered[:, 1], gathered[:, 2], shifted=False)
    log_b, shift_b, mean_b = _merge(gathered[:, 3], gathered[:, 4], gathered[:, 5], shifted=False)
    gap = (log_a + shift_a) - (log_b + shift_b)
    return (mean_a - gap).to(a.dtype), (mean_b + gap).to(a.dtype)


def _scaled(logits: Tensor, temperature: Tensor, shard: VocabularyShard) -> Tensor:
    dtype = logits.dtype if logits.dtype == torch.float64 else torch.float32
    return logits[:, : shard.columns].to(dtype) / temperature[:, None].to(dtype)


def _reduce(z: Tensor, weighted: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """max z, sum e, and sum e * weighted with e = exp(z - max); weighted defaults to z - max. [T, v] -> 3 x [T]."""
    if z.shape[1] == 0:
        zero = z.new_zeros(len(z))
        return zero - torch.inf, zero, zero
    highest = z.max(1).values
    shifted = z - highest[:, None]
    e = shifted.exp()
    return highest, e.sum(1), (e * (shifted if weighted is None else weighted)).sum(1)


def _all_gather(local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[k, T] -> [ranks, k, T] in rank order."""
    if group is None or dist.get_world_size(group) == 1:
        return local[None]
    pieces = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(pieces, local.contiguous(), group=group)
    return torch.stack(pieces)


def _merge(highest: Tensor, total: Tensor, moment: Tensor, shifted: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Shards' [ranks, T] to (log sum e, max, E[weighted]) of the whole row, each [T].

    `shifted`: the moment was taken of z - (its shard's max), so it moves with the max.
    """
    top = highest.max(0).values
    step = (highest - top).where(total > 0, 0.0)
    scale = step.exp() * (total > 0)
    total_all = (scale * total).sum(0)
    moment_all = (scale * (moment + step * total if shifted else moment)).sum(0)
    return total_all.log(), top, moment_all / total_all
