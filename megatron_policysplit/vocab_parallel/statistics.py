"""Log-prob, entropy and KL of a vocabulary that is sharded over tensor-parallel ranks.

Each rank reduces its shard of the logits to a few floats per token. One all-gather of those floats,
merged in rank order, gives every rank the same bits. Padded vocabulary columns are left out before
anything is reduced. The sampling temperature divides logits of which the maximum has been subtracted,
so a common shift of a token's logits costs no digits.
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
        z, temperature = _true_columns(logits, shard), temperature.to(_dtype(logits))
        highest, shifted = _shift(z, temperature)
        e = shifted.exp()
        local = targets - shard.start
        owned = (local >= 0) & (local < shard.columns)
        at_target = z.new_zeros(len(z))
        if shard.columns:
            picked = z.gather(1, local.clamp(0, shard.columns - 1)[:, None])[:, 0]
            at_target = picked.where(owned, 0.0)

        gathered = _all_gather(torch.stack([highest, e.sum(1), (e * shifted).sum(1), at_target]), shard.group)
        highest, total, moment = gathered[:, 0], gathered[:, 1], gathered[:, 2]
        top, step = _steps(highest, temperature)
        log_total, mean_shifted = _merge(total, moment, step, step)
        logprobs = (gathered[:, 3].sum(0) - top) / temperature - log_total
        entropy = log_total - mean_shifted
        ctx.shard = shard
        ctx.save_for_backward(logits, temperature, local, owned, top, log_total, entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy):
        logits, temperature, local, owned, top, log_total, entropy = ctx.saved_tensors
        columns = ctx.shard.columns
        log_p = (_true_columns(logits, ctx.shard) - top[:, None]) / temperature[:, None] - log_total[:, None]
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
    token and rank. With z shifted to a maximum of 0 in each policy and d = z_a - z_b, KL(a || b) = E_a[d] -
    (lse_a - lse_b), so equal logits give exactly 0.
    """
    dtype = _dtype(logits_a)
    temperature_a, temperature_b = temperature_a.to(dtype), temperature_b.to(dtype)
    highest_a, a = _shift(_true_columns(logits_a, shard), temperature_a)
    highest_b, b = _shift(_true_columns(logits_b, shard), temperature_b)
    e_a, e_b, d = a.exp(), b.exp(), a - b
    local = torch.stack([highest_a, e_a.sum(1), (e_a * d).sum(1), highest_b, e_b.sum(1), (e_b * -d).sum(1)])
    gathered = _all_gather(local, shard.group).double()
    _, step_a = _steps(gathered[:, 0], temperature_a.double())
    _, step_b = _steps(gathered[:, 3], temperature_b.double())
    log_a, mean_a = _merge(gathered[:, 1], gathered[:, 2], step_a, step_a - step_b)
    log_b, mean_b = _merge(gathered[:, 4], gathered[:, 5], step_b, step_b - step_a)
    gap = log_a - log_b
    return (mean_a - gap).to(dtype), (mean_b + gap).to(dtype)


def _dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _true_columns(logits: Tensor, shard: VocabularyShard) -> Tensor:
    return logits[:, : shard.columns].to(_dtype(logits))


def _shift(z: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum of each row and (z - maximum) / temperature: [T], [T, v]. Minus infinity if the shard is empty."""
    highest = z.max(1).values if z.shape[1] else z.new_full((len(z),), -torch.inf)
    return highest, (z - highest[:, None]) / temperature[:, None]


def _all_gather(local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[k, T] -> [ranks, k, T] in rank order."""
    if group is None or dist.get_world_size(group) == 1:
        return local[None]
    pieces = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(pieces, local.contiguous(), group=group)
    return torch.stack(pieces)


def _steps(highest: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """From the shards' maxima [ranks, T]: the row's, [T], and how far each lies below it, [ranks, T] (<= 0).

    An empty shard is no step below; its sums are 0 anyway.
    """
    top = highest.max(0).values
    step = (highest - top) / temperature
    return top, step.where(highest != -torch.inf, 0.0)


def _merge(total: Tensor, moment: Tensor, step: Tensor, moment_step: Tensor) -> tuple[Tensor, Tensor]:
    """Shards' [ranks, T] to (log sum e, E[x]) over the whole row, [T] each.

    total: a shard's sum e with e = exp of logits shifted by its own maximum; moment: its sum e * x with x
    shifted likewise. step, moment_step: what the shifted logits and x gain when the shift is the row's.
    """
    scale = step.exp()
    total_all = (scale * total).sum(0)
    moment_all = (scale * (moment + moment_step * total)).sum(0)
    return total_all.log(), moment_all / total_all
