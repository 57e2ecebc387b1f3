"""A policy loss from hidden states in one pass: each chunk's logits become their own gradient.

The loss is a sum over tokens of a known function of the token's own log-prob and entropy. Its
weights hold the global denominators already, so whatever follows the loss can only multiply all
gradients by one common factor. Forward therefore computes the gradients of the hidden states and of
the weight while it has the logits; backward multiplies them by that factor and hands them on. This
takes three matrix products a token, where making the logits again in backward takes four. While a
chunk's floats are gathered from the other ranks, the next chunk's logits are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_policysplit.vocab_parallel.chunk_pass import ChunkPass, chunk_pass
from megatron_policysplit.vocab_parallel.nucleus import (
    MergedNucleus,
    NucleusSlopes,
    merge_nucleus,
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

# (span of the call's tokens, log-probs, entropy) -> the sum of their losses, a scalar with gradient
# in the last two. With thresholds of nuclei the nuclei's entropies are a fourth argument, with
# gradient too.
TokenLoss = Callable[..., Tensor]


class FusedLoss(NamedTuple):
    """What `fused_loss` returns."""

    loss: Tensor  # scalar, with gradient
    logprobs: Tensor  # [T], nats, without gradient
    entropy: Tensor  # [T], nats, without gradient


def fused_loss(
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    temperature: Tensor,
    token_loss: TokenLoss,
    thresholds: Tensor | None = None,
    at_once: bool = False,
) -> FusedLoss:
    """Sum `token_loss` over T tokens, computing log-probs and entropies a chunk at a time.

    The loss is differentiable in `hidden` and `head.weight`, once. Collectives over the
    tensor-parallel group: per chunk an all-gather of 4 floats a token (6 with thresholds),
    overlapped with the next chunk's matrix product; in backward one all-reduce of the gradient of
    `hidden`.

    hidden: [T, H].
    targets: [T] int64, global ids.
    temperature: [T].
    token_loss: token_loss(span, logprobs, entropy) is called once per chunk, in order, also where
        no gradient is needed; `span` says which of the T tokens the chunk has. It must not use
        statistics of other tokens.
    thresholds: [T] logits, the nuclei that `score` found; in torch up to two more chunks of logits
        are then held at times.
    at_once: the caller promises to call backward, with a factor of 1. The gradient of a weight of
        16 bits is then added to its `main_grad` during this call, if it has one, and backward
        raises RuntimeError for another factor.
    """
    needed = torch.is_grad_enabled() and (hidden.requires_grad or head.weight.requires_grad)
    return FusedLoss(
        *_FusedLoss.apply(
            hidden,
            head.weight,
            targets,
            temperature,
            head,
            token_loss,
            needed,
            thresholds,
            at_once,
        )
    )


@dataclass
class _Chunk:
    """A chunk whose floats are on their way to the other ranks."""

    span: slice
    # What the reduction left of its logits: the exponentials, with thresholds the logits
    # themselves, None by kernels. The product of the chunk after the next overwrites them.
    remains: Exponentials | Tensor | None
    gathering: Gathering


class _FusedLoss(torch.autograd.Function):
    """Forward communicates once a chunk (all-gather), backward once (all-reduce of [T, H])."""

    @staticmethod
    def forward(
        ctx, hidden, weight, targets, temperature, head, token_loss, needed, thresholds, at_once
    ):
        tokens = Tokens(targets, temperature.to(statistics_dtype(hidden)))
        passing = chunk_pass(head, len(hidden))
        grad_hidden, total = None, None
        if needed:
            grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
            total = WeightGradient(head, at_once)
        loss = tokens.temperature.new_zeros(())
        logprobs = torch.empty_like(tokens.temperature)
        entropy = torch.empty_like(tokens.temperature)
        keep_exponentials = needed and thresholds is None
        # One chunk ahead: the next chunk's matrix product runs while this one's floats travel.
        for chunk in _one_ahead(
            _reduce_chunks(passing, keep_exponentials, head, hidden, tokens, thresholds)
        ):
            span = chunk.span
            gathered, *nucleus_parts = chunk.gathering.wait()
            merged, nucleus = merge(gathered, tokens.temperature[span]), None
            if nucleus_parts:
                nucleus = merge_nucleus(gathered[:, 0], *nucleus_parts, tokens.temperature[span])
            logprobs[span], entropy[span] = merged.logprobs, merged.entropy
            part, slopes, by_nucleus = _loss_and_slopes(token_loss, span, merged, nucleus, needed)
            loss += part
            if needed:
                nucleus_slopes = None
                if by_nucleus is not None:
                    nucleus_slopes = NucleusSlopes(thresholds[span], nucleus, by_nucleus)
                grad = passing.gradient(
                    hidden[span], chunk.remains, tokens[span], merged, slopes, nucleus_slopes
                )
                torch.mm(grad, weight, out=grad_hidden[span])
                total.add(grad, hidden[span])
        ctx.head, ctx.grad_hidden, ctx.total = head, grad_hidden, total
        ctx.mark_non_differentiable(logprobs, entropy)
        return loss, logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, scale, *unused):
        # The gradients are multiplied in place below, so they can be handed on only once.
        if ctx.total is None:
            raise RuntimeError(
                "the gradients of a fused loss have been handed on already: call backward once"
            )
        grad_hidden, total = ctx.grad_hidden, ctx.total
        ctx.grad_hidden = ctx.total = None
        grad_hidden = ctx.head.sum_over_ranks(grad_hidden.mul_(scale))
        return grad_hidden, total.deliver(scale), None, None, None, None, None, None, None


def _reduce_chunks(
    passing: ChunkPass,
    keep_exponentials: bool,
    head: Head,
    hidden: Tensor,
    tokens: Tokens,
    thresholds: Tensor | None,
) -> Iterator[_Chunk]:
    """Reduce the chunks in order and begin to gather the floats of each."""
    # The gradient of a nucleus needs the logits themselves, not their exponentials.
    reduce = passing.reduce_for_gradient if keep_exponentials else passing.reduce
    for span in head.chunks(len(hidden)):
        parts, remains = reduce(hidden[span], tokens[span])
        floats = [parts]
        if thresholds is not None:
            nucleus = hidden[span], remains, parts[0], thresholds[span], tokens[span]
            floats.append(passing.reduce_nucleus(*nucleus))
        yield _Chunk(span, remains, Gathering(floats, head.shard))


def _one_ahead(chunks: Iterator[_Chunk]) -> Iterator[_Chunk]:
    """The same chunks, each handed out only after the next one's gathering has begun."""
    previous = None
    for chunk in chunks:
        if previous is not None:
            yield previous
        previous = chunk
    if previous is not None:
        yield previous


def _loss_and_slopes(
    token_loss: TokenLoss, span: slice, merged: Merged, nucleus: MergedNucleus | None, needed: bool
) -> tuple[Tensor, Slopes, Tensor | None]:
    """The chunk's loss, a scalar, and its derivatives by log-probs and entropies, and by nuclei's.

    The derivatives by the two kinds of entropy are None where the loss does not depend on them.
    """
    values = [merged.logprobs, merged.entropy] + ([] if nucleus is None else [nucleus.entropy])
    values = [value.detach().requires_grad_(needed) for value in values]
    with torch.enable_grad():
        loss = token_loss(span, *values)
    # A loss may be a constant that depends on none of its arguments.
    if not needed or not loss.requires_grad:
        return loss.detach(), Slopes(torch.zeros_like(merged.logprobs), None), None
    by_logprob, by_entropy, *by_nucleus = torch.autograd.grad(loss, values, allow_unused=True)
    if by_logprob is None:
        by_logprob = torch.zeros_like(merged.logprobs)
    return loss.detach(), Slopes(by_logprob, by_entropy), by_nucleus[0] if by_nucleus else None
