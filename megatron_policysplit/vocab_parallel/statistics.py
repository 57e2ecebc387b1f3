"""Log-prob, entropy and KL from logits that are sharded over tensor-parallel ranks.

One pass over the shard and one all-gather of a few floats per token. Every rank merges them in rank
order, so all ranks get the same bits. Padded vocabulary columns are left out before anything is
reduced. Where logits would take too much memory, `head` has the same from hidden states.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_policysplit.vocab_parallel.reduction import (
    Merged,
    MergedPair,
    PerToken,
    Slopes,
    Tokens,
    logits_gradient,
    merge,
    merge_pair,
    pair_gradient,
    reduce_logits,
    reduce_pair,
    statistics_dtype,
)
from megatron_policysplit.vocab_parallel.shard import Gathering, VocabularyShard


class PairStatistics(NamedTuple):
    """Statistics of two policies a and b at the same tokens, [T] each, in nats."""

    logprobs_a: Tensor
    entropy_a: Tensor
    logprobs_b: Tensor
    entropy_b: Tensor
    kl_ab: Tensor  # KL(a || b)
    kl_ba: Tensor  # KL(b || a)


def token_statistics(
    logits: Tensor, targets: Tensor, temperature: Tensor, shard: VocabularyShard
) -> tuple[Tensor, Tensor]:
    """Compute the log-prob of the target and the entropy of every token, in nats: ([T], [T]).

    logits [T, padded columns] of this rank's shard; targets [T] int64 global ids; temperature [T] >
    0. The outputs are fp32 (fp64 for fp64 logits) and differentiable in the logits. Forward: one
    all-gather of 4 floats per token and rank. Backward: no collective.
    """
    return _TokenStatistics.apply(logits, targets, temperature, shard)


def pair_statistics(
    logits_a: Tensor,
    logits_b: Tensor,
    targets: Tensor,
    temperature_a: Tensor,
    temperature_b: Tensor,
    shard: VocabularyShard,
) -> PairStatistics:
    """Compute log-prob and entropy under two policies and the exact KL both ways, [T] each, nats.

    logits_* [T, padded columns] of this rank's shard; targets [T]; temperature_* [T]. The KL is
    over the whole vocabulary. All outputs are differentiable in both logits. Forward: one
    all-gather of 14 floats per token and rank. Backward: no collective. Equal logits at equal
    temperatures give a KL of exactly 0.
    """
    return PairStatistics(
        *_PairStatistics.apply(logits_a, logits_b, targets, temperature_a, temperature_b, shard)
    )


class _TokenStatistics(torch.autograd.Function):
    """Forward communicates once over the tensor-parallel group (all-gather); backward is local."""

    @staticmethod
    def forward(ctx, logits, targets, temperature, shard):
        tokens = Tokens(targets, temperature.to(statistics_dtype(logits)))
        (gathered,) = Gathering([reduce_logits(logits, tokens, shard)], shard).wait()
        merged = merge(gathered, tokens.temperature)
        ctx.shard = shard
        ctx.save_for_backward(logits, *_tensors(tokens), *_tensors(merged))
        return merged.logprobs, merged.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, by_logprob, by_entropy):
        logits, targets, temperature, *merged = ctx.saved_tensors
        tokens, slopes = Tokens(targets, temperature), Slopes(by_logprob, by_entropy)
        # Into a new tensor: the logits belong to the caller, who may use them again.
        out = logits_gradient(
            logits, tokens, Merged(*merged), slopes, ctx.shard, torch.empty_like(logits)
        )
        return out, None, None, None


class _PairStatistics(torch.autograd.Function):
    """Forward communicates once over the tensor-parallel group (all-gather); backward is local."""

    @staticmethod
    def forward(ctx, a, b, targets, temperature_a, temperature_b, shard):
        temperature_a, temperature_b = (
            t.to(statistics_dtype(a)) for t in (temperature_a, temperature_b)
        )
        parts = [
            reduce_logits(a, Tokens(targets, temperature_a), shard),
            reduce_logits(b, Tokens(targets, temperature_b), shard),
            reduce_pair(a, b, temperature_a, temperature_b, shard),
        ]
        gathered_a, gathered_b, gathered_pair = Gathering(parts, shard).wait()
        merged_a, merged_b = merge(gathered_a, temperature_a), merge(gathered_b, temperature_b)
        pair = merge_pair(gathered_pair, temperature_a, temperature_b)
        ctx.shard = shard
        saved = (*_tensors(merged_a), *_tensors(merged_b), *_tensors(pair))
        ctx.save_for_backward(a, b, targets, temperature_a, temperature_b, *saved)
        statistics = (merged_a.logprobs, merged_a.entropy, merged_b.logprobs, merged_b.entropy)
        return (*statistics, pair.kl_ab, pair.kl_ba)

    @staticmethod
    @once_differentiable
    def backward(ctx, by_logprob_a, by_entropy_a, by_logprob_b, by_entropy_b, by_kl_ab, by_kl_ba):
        a, b, targets, t_a, t_b, *saved = ctx.saved_tensors
        merged_a, merged_b, pair = Merged(*saved[:4]), Merged(*saved[4:8]), MergedPair(*saved[8:])
        slopes_a, slopes_b = Slopes(by_logprob_a, by_entropy_a), Slopes(by_logprob_b, by_entropy_b)
        to_a = logits_gradient(
            a, Tokens(targets, t_a), merged_a, slopes_a, ctx.shard, torch.empty_like(a)
        )
        to_b = logits_gradient(
            b, Tokens(targets, t_b), merged_b, slopes_b, ctx.shard, torch.empty_like(b)
        )
        pair_gradient(a, b, t_a, t_b, pair, by_kl_ab, by_kl_ba, ctx.shard, to_a, to_b)
        return to_a, to_b, None, None, None, None


def _tensors(values: PerToken) -> tuple[Tensor, ...]:
    """The fields in their order; autograd saves tensors, not dataclasses."""
    return tuple(vars(values).values())
