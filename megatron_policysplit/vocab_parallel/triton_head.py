"""A shard of the LM head by Triton kernels: hidden states in, floats per token or dL/dlogits out.

Importing this module imports triton; on machines without a GPU its interpreter (TRITON_INTERPRET=1)
runs the same kernels (`triton_kernels`). Operands are bf16, fp16 or fp32, products are accumulated
in fp32. The reductions hold no logits in memory: a program owns a block of tokens and a split of
the shard's columns, walks over the split tile by tile with a running maximum, and leaves its sums
for `combine`. A program is Triton's word for one instance of a kernel.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from megatron_policysplit.vocab_parallel.nucleus import NucleusSlopes
from megatron_policysplit.vocab_parallel.triton_kernels import (
    gradient_kernel,
    logits_kernel,
    nucleus_kernel,
    reduce_kernel,
    reduce_pair_kernel,
)
from megatron_policysplit.vocab_parallel.triton_launch import (
    INTERPRETED,
    ONE_PRODUCT,
    TWO_PRODUCTS,
    Kernel,
    launch,
)

_reduce = Kernel(reduce_kernel, ONE_PRODUCT)
_reduce_pair = Kernel(reduce_pair_kernel, TWO_PRODUCTS)
_nucleus = Kernel(nucleus_kernel, ONE_PRODUCT)
_logits = Kernel(logits_kernel, ONE_PRODUCT)
_gradient = Kernel(gradient_kernel, ONE_PRODUCT)

# Splits make about this many programs of 128 tokens: enough to fill a GPU evenly, few enough that
# what they leave behind for `combine` stays at a few MB however many tokens there are.
_PROGRAMS = 2048
# A tile may not reach into the next split.
_SPLIT_MULTIPLE = 32 if INTERPRETED else 256


def reduce_head(
    hidden: Tensor, weight: Tensor, local_targets: Tensor, temperature: Tensor, columns: int
) -> Tensor:
    """Reduce a shard's logits z = hidden @ weight[:columns].T to statistics per token, [4, T] fp32.

    The four rows: highest z, sum e, sum e * x, z at the target, where x = (z - highest) /
    temperature and e = exp(x), in natural units. Without columns the highest logit is minus
    infinity and the sums are 0. Communicates nothing. Raises ValueError for operands that do not
    fit each other.

    hidden: [T, H].
    weight: [padded columns, H] in hidden's dtype.
    local_targets: [T] int64, global ids less the shard's start; a target outside [0, columns) is
        another shard's, and its logit is 0 here.
    temperature: [T] > 0.
    """
    _check(hidden, weight, columns)
    tokens, temperature = len(hidden), temperature.float()
    if not tokens or not columns:
        return _empty(hidden, 4, 0)
    width, splits = _splits(tokens, columns)
    partials = hidden.new_empty(splits, 4, tokens, dtype=torch.float32)
    launch(
        _reduce,
        lambda meta: (triton.cdiv(tokens, meta["BLOCK_T"]) * splits,),
        hidden,
        (hidden, weight, local_targets.contiguous(), _log2_scale(temperature), partials),
        (tokens, columns, width, splits, *hidden.stride(), *weight.stride()),
    )
    return combine(partials, temperature)


def reduce_head_pair(
    hidden_a: Tensor,
    hidden_b: Tensor,
    weight: Tensor,
    temperature_a: Tensor,
    temperature_b: Tensor,
    columns: int,
) -> Tensor:
    """Reduce a shard's logits of two policies at the same tokens, for their KL: [6, T] fp32.

    The six rows: highest z_a, sum e_a, sum e_a * (x_a - x_b), highest z_b, sum e_b,
    sum e_b * (x_b - x_a); each x is shifted by its own policy's highest logit of the shard as in
    `reduce_head`. hidden_* [T, H]; temperature_* [T] > 0. Equal hidden states and temperatures give
    cross sums of exactly 0. Communicates nothing. Raises ValueError for operands that do not fit
    each other.
    """
    _check(hidden_a, weight, columns)
    if hidden_b.shape != hidden_a.shape or hidden_b.dtype != hidden_a.dtype:
        raise ValueError(
            f"hidden states of a pair differ: {_describe(hidden_a)} and {_describe(hidden_b)}"
        )
    tokens = len(hidden_a)
    temperature_a, temperature_b = temperature_a.float(), temperature_b.float()
    if not tokens or not columns:
        return _empty(hidden_a, 6, 0, 3)
    width, splits = _splits(tokens, columns)
    partials = hidden_a.new_empty(splits, 6, tokens, dtype=torch.float32)
    launch(
        _reduce_pair,
        lambda meta: (triton.cdiv(tokens, meta["BLOCK_T"]) * splits,),
        hidden_a,
        (
            hidden_a,
            hidden_b,
            weight,
            _log2_scale(temperature_a),
            _log2_scale(temperature_b),
            partials,
        ),
        (tokens, columns, width, splits, *hidden_a.stride(), *hidden_b.stride(), *weight.stride()),
        # A fused multiply-add rounds only one of the products in x_a - x_b, and equal logits would
        # not cancel.
        enable_fp_fusion=False,
    )
    return combine_pair(partials, temperature_a, temperature_b)


def head_gradient(
    hidden: Tensor,
    weight: Tensor,
    local_targets: Tensor,
    temperature: Tensor,
    columns: int,
    top: Tensor,
    log_total: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    nucleus: NucleusSlopes | None = None,
) -> Tensor:
    """Compute dL/dz of a shard's logits, [T, padded columns] in hidden's dtype; 0 in padding.

    The logits are computed again tile by tile. With log p = (z - top) / temperature - log_total:

        dL/dz = ((1 at an owned target - p) * grad_logprobs
                 - p * (log p + entropy) * grad_entropy) / temperature

    With a nucleus columns at or above its threshold also get, with its own log_total and entropy
    and log q = (z - top) / temperature - log_total:

        - q * (log q + entropy) * by_entropy / temperature

    The first five arguments are those of `reduce_head`; those below are of the whole vocabulary.

    top: [T], highest logit.
    log_total: [T], log of sum exp((z - top) / temperature).
    entropy: [T], nats.
    grad_logprobs: [T], dL/dlogp of the target.
    grad_entropy: [T], dL/dentropy; None where the entropy is not in the loss.
    nucleus: None where the entropy of the nucleus is not in the loss.
    """
    _check(hidden, weight, columns)
    tokens, padded = len(hidden), len(weight)
    gradient = hidden.new_empty(tokens, padded)
    if not gradient.numel():
        return gradient
    if not columns:
        return gradient.zero_()
    grad_logprobs = grad_logprobs.float().contiguous()
    grad_entropy = (
        torch.zeros_like(grad_logprobs)
        if grad_entropy is None
        else grad_entropy.float().contiguous()
    )
    rows = (1.0 / temperature.float(), top.float(), log_total.float(), entropy.float())
    launch(
        _gradient,
        lambda meta: (triton.cdiv(tokens, meta["BLOCK_T"]) * triton.cdiv(padded, meta["BLOCK_V"]),),
        hidden,
        (
            hidden,
            weight,
            local_targets.contiguous(),
            *(row.contiguous() for row in rows),
            grad_logprobs,
            grad_entropy,
            *_nucleus_rows(nucleus, grad_logprobs),
        ),
        (gradient, tokens, columns, padded, *hidden.stride(), *weight.stride()),
        NUCLEUS=nucleus is not None,
    )
    return gradient


def _nucleus_rows(nucleus: NucleusSlopes | None, unread: Tensor) -> tuple[Tensor, ...]:
    """Threshold, log_total, entropy and slope, [T] each, for the kernel of the gradient.

    unread: stands in for all of them where there is no nucleus.
    """
    if nucleus is None:
        return (unread,) * 4
    merged = nucleus.merged
    # An empty nucleus has no gradient. The kernel may still see a column in it, if its logit is
    # rounded otherwise than where the nucleus was summed, and must then not divide by 0.
    empty = merged.log_total == -torch.inf
    log_total, slope = (
        values.masked_fill(empty, 0.0) for values in (merged.log_total, nucleus.by_entropy)
    )
    rows = (nucleus.threshold, log_total, merged.entropy, slope)
    return tuple(row.float().contiguous() for row in rows)


def head_logits(hidden: Tensor, weight: Tensor, columns: int) -> Tensor:
    """Compute a shard's logits in fp32, [T, padded columns]; padding is left uninitialized.

    hidden [T, H]; weight [padded columns, H] in hidden's dtype. Communicates nothing. Raises
    ValueError for operands that do not fit each other.
    """
    _check(hidden, weight, columns)
    tokens, padded = len(hidden), len(weight)
    logits = hidden.new_empty(tokens, padded, dtype=torch.float32)
    if tokens and columns:
        launch(
            _logits,
            lambda meta: (
                triton.cdiv(tokens, meta["BLOCK_T"]) * triton.cdiv(columns, meta["BLOCK_V"]),
            ),
            hidden,
            (hidden, weight, logits),
            (tokens, columns, padded, *hidden.stride(), *weight.stride()),
        )
    return logits


def reduce_head_nucleus(
    hidden: Tensor,
    weight: Tensor,
    highest: Tensor,
    threshold: Tensor,
    temperature: Tensor,
    columns: int,
) -> Tensor:
    """Reduce a shard's logits at or above thresholds to sum e and sum e * x, [2, T] fp32.

    x and e are those of `reduce_head`, whose first row is `highest` [T]. threshold [T];
    temperature [T] > 0. Without columns the sums are 0. Communicates nothing. Raises ValueError for
    operands that do not fit each other.
    """
    _check(hidden, weight, columns)
    tokens = len(hidden)
    if not tokens or not columns:
        return _empty(hidden, 2)
    width, splits = _splits(tokens, columns)
    partials = hidden.new_empty(splits, 2, tokens, dtype=torch.float32)
    rows = (_log2_scale(temperature.float()), highest.contiguous(), threshold.float().contiguous())
    launch(
        _nucleus,
        lambda meta: (triton.cdiv(tokens, meta["BLOCK_T"]) * splits,),
        hidden,
        (hidden, weight, *rows, partials),
        (tokens, columns, width, splits, *hidden.stride(), *weight.stride()),
    )
    return partials.sum(0)


def combine(partials: Tensor, temperature: Tensor) -> Tensor:
    """Merge the statistics of parts of the columns, [parts, 4, T], into those of all: [4, T].

    Each part is as `reduce_head` returns it. Exact up to rounding for any partition; a part without
    columns (highest minus infinity) changes nothing.
    """
    highest, total, moment, at_target = partials.unbind(1)
    top, step = _steps(highest, temperature)
    scale = step.exp()
    sums = (scale * total).sum(0), (scale * (moment + step * total)).sum(0)
    return torch.stack([top, *sums, at_target.sum(0)])


def combine_pair(partials: Tensor, temperature_a: Tensor, temperature_b: Tensor) -> Tensor:
    """Merge parts as `combine` does, of `reduce_head_pair`: [parts, 6, T] to [6, T].

    When the shifts of a part change to those of the whole row, x_a - x_b gains step_a - step_b, and
    its sum weighted by e_a gains that times sum e_a.
    """
    highest_a, total_a, cross_a, highest_b, total_b, cross_b = partials.unbind(1)
    top_a, step_a = _steps(highest_a, temperature_a)
    top_b, step_b = _steps(highest_b, temperature_b)
    scale_a, scale_b, apart = step_a.exp(), step_b.exp(), step_a - step_b
    sums_a = [(scale_a * total_a).sum(0), (scale_a * (cross_a + apart * total_a)).sum(0)]
    sums_b = [(scale_b * total_b).sum(0), (scale_b * (cross_b - apart * total_b)).sum(0)]
    return torch.stack([top_a, *sums_a, top_b, *sums_b])


def _steps(highest: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """The row's maximum [T] from those of its parts [parts, T], and the steps of their x, <= 0.

    A part's step [parts, T] is what its x gains when it is shifted by the row's maximum.
    """
    top = highest.max(0).values
    # A part without columns has sums of 0, which an infinite step would turn into NaN.
    return top, ((highest - top) / temperature).where(highest != -torch.inf, 0.0)


def _check(hidden: Tensor, weight: Tensor, columns: int) -> None:
    """Raise ValueError if the operands do not fit each other."""
    if hidden.dtype != weight.dtype or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden states {_describe(hidden)} do not fit an LM head {_describe(weight)}"
        )
    if not 0 <= columns <= len(weight):
        raise ValueError(
            f"columns={columns} of an LM head {_describe(weight)}; use 0 to {len(weight)}"
        )


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _empty(hidden: Tensor, rows: int, *maxima: int) -> Tensor:
    """Statistics of a shard without columns or tokens: sums of 0, highest logits of minus infinity.

    maxima: the rows that hold highest logits.
    """
    out = hidden.new_zeros(rows, len(hidden), dtype=torch.float32)
    out[list(maxima)] = -torch.inf
    return out


def _log2_scale(temperature: Tensor) -> Tensor:
    """log2(e) / temperature: z times this is in units of log 2."""
    return (math.log2(math.e) / temperature).contiguous()


def _splits(tokens: int, columns: int) -> tuple[int, int]:
    """Columns of a split, a multiple of every tile's, and the number of splits. None is empty."""
    target = max(1, _PROGRAMS // triton.cdiv(tokens, 128))
    width = triton.cdiv(triton.cdiv(columns, target), _SPLIT_MULTIPLE) * _SPLIT_MULTIPLE
    # Rounding the width up may leave fewer splits than were aimed at.
    return width, triton.cdiv(columns, width)
