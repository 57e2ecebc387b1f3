"""A policy loss from hidden states in one pass: the chunk that makes the logits makes their
gradient too.

The loss is a sum over tokens of a known function of a token's own log-prob and entropy; its weights
hold the global denominators, so nothing that comes later can change a token's gradient but a common
factor. Forward therefore computes both gradients; backward multiplies them by that factor and hands
them on. While a chunk's floats are gathered from the other ranks, the next chunk's logits are made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_policysplit.vocab_parallel.chunk_pass import chunk_pass
from megatron_policysplit.vocab_parallel.head import needs_logits
from megatron_policysplit.vocab_parallel.nucleus import (
    MergedNucleus,
    gradient_with_nucleus,
    merge_nucleus,
    reduce_nucleus,
)
from megatron_policysplit.vocab_parallel.reduction import (
    Exponentials,
    Merged,
    Slopes,
    Tokens,
    merge,
    statistics_dtype,
)
from megatron_policysplit.vocab_parallel.shard import Gathering, Head
from megatron_policysplit.vocab_parallel.weight_gradient import WeightGradient

# (tokens of the call, log-probs, entropy) -> the sum of their losses, a scalar with gradient in the
# last two; with thresholds of nuclei these have entropies, which are a fourth argument, with
# gradient too.
TokenLoss = Callable[..., Tensor]


class FusedLoss(NamedTuple):
    """loss: scalar with gradient. logprobs, entropy [T]: nats, without."""

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor


def fused_loss(
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    temperature: Tensor,
    token_loss: TokenLoss,
    thresholds: Tensor | None = None,
) -> FusedLoss:
    """The sum of `token_loss` over hidden states [T, H] at targets [T] (int64, global ids) and
    temperature [T].

    token_loss(span, logprobs, entropy) gets the chunks in order, `span` of the T tokens each, and
    must not look beyond its arguments' tokens; it is called once per chunk, also where no gradient
    is wanted. The loss is differentiable in `hidden` and `head.weight`, once. Collectives: an
    all-gather of 4 floats a token per chunk, overlapped with the next chunk's matrix product; in
    backward one all-reduce of the gradient of `hidden`.

    thresholds [T], logits: those of `score`'s nuclei. The all-gather is then of 6 floats, and two
    more chunks of logits are held at times. Raises ValueError for these with a head of Triton
    kernels.
    """
    if thresholds is not None:
        needs_logits(head)
    needed = torch.is_grad_enabled() and (hidden.requires_grad or head.weight.requires_grad)
    return FusedLoss(
        *_FusedLoss.apply(
            hidden, head.weight, targets, temperature, head, token_loss, needed, thresholds
        )
    )


@dataclass
class _Chunk:
    """A chunk whose floats are on their way. kept: with thresholds its logits, which no later chunk
    but one uses.
    """

    span: slice
    kept: Exponentials | Tensor | None
    gathering: Gathering


class _FusedLoss(torch.autograd.Function):
    """Forward communicates once a chunk (all-gather), backward once (all-reduce of [T, H])."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, head, token_loss, needed, thresholds):
        tokens = Tokens(targets, temperature.to(statistics_dtype(hidden)))
        passing = chunk_pass(head, len(hidden))
        grad_hidden = (
            torch.empty_like(hidden, memory_format=torch.contiguous_format) if needed else None
        )
        total = WeightGradient(weight) if needed else None
        loss = tokens.temperature.new_zeros(())
        logprobs, entropy = (
            torch.empty_like(tokens.temperature),
            torch.empty_like(tokens.temperature),
        )
        reduce = passing.reduce_for_gradient if needed and thresholds is None else passing.reduce
        for chunk in _ahead(_reduced(reduce, head, hidden, tokens, thresholds)):
            span = chunk.span
            gathered, *inside = chunk.gathering.wait()
            merged = merge(gathered, tokens.temperature[span])
            nucleus = (
                merge_nucleus(gathered[:, 0], *inside, tokens.temperature[span]) if inside else None
            )
            logprobs[span], entropy[span] = merged.logprobs, merged.entropy
            part, slopes, by_nucleus = _slopes(token_loss, span, merged, nucleus, needed)
            loss += part
            if needed:
                if nucleus is None:
                    grad = passing.gradient(hidden[span], chunk.kept, tokens[span], merged, slopes)
                else:
                    of_nucleus = (thresholds[span], nucleus, by_nucleus)
                    grad = gradient_with_nucleus(
                        chunk.kept, tokens[span], merged, slopes, *of_nucleus, head.shard
                    )
                    grad = grad.to(hidden.dtype)
                torch.mm(grad, weight, out=grad_hidden[span])
                total.add(grad, hidden[span])
        ctx.head, ctx.grad_hidden, ctx.total = head, grad_hidden, total
        ctx.mark_non_differentiable(logprobs, entropy)
        return loss, logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, scale, *unused):
        if ctx.total is None:
            raise RuntimeError(
                "the gradients of a fused loss have been handed on already: call backward once"
            )
        grad_hidden, total = ctx.grad_hidden, ctx.total
        ctx.grad_hidden = ctx.total = None
        grad_hidden = ctx.head.sum_over_ranks(grad_hidden.mul_(scale))
        return grad_hidden, total.deliver(scale), None, None, None, None, None, None


def _reduced(
    reduce, head: Head, hidden: Tensor, tokens: Tokens, thresholds: Tensor | None
) -> Iterator[_Chunk]:
    for span in head.chunks(len(hidden)):
        parts, kept = reduce(hidden[span], tokens[span])
        floats = [parts]
        if thresholds is not None:
            floats.append(
                reduce_nucleus(
                    kept, parts[0], thresholds[span], tokens.temperature[span], head.shard
                )
            )
        yield _Chunk(span, kept, Gathering(floats, head.shard))


def _ahead(chunks: Iterator[_Chunk]) -> Iterator[_Chunk]:
    """The same chunks, each handed out only when the next one has been begun."""
    before = None
    for chunk in chunks:
        if before is not None:
            yield before
        before = chunk
    if before is not None:
        yield before


def _slopes(
    token_loss: TokenLoss, span: slice, merged: Merged, nucleus: MergedNucleus | None, needed: bool
) -> tuple[Tensor, Slopes, Tensor | None]:
    """The chunk's loss, a scalar, and its derivatives by the log-probs and, if it has any, by the
    entropies and by the nuclei's.
    """
    values = [merged.logprobs, merged.entropy] + ([] if nucleus is None else [nucleus.entropy])
    values = [value.detach().requires_grad_(needed) for value in values]
    with torch.enable_grad():
        loss = token_loss(span, *values)
    if not needed or not loss.requires_grad:
        return loss.detach(), Slopes(torch.zeros_like(merged.logprobs), None), None
    by_logprob, by_entropy, *by_nucleus = torch.autograd.grad(loss, values, allow_unused=True)
    if by_logprob is None:
        by_logprob = torch.zeros_like(merged.logprobs)
    return loss.detach(), Slopes(by_logprob, by_entropy), by_nucleus[0] if by_nucleus else None
