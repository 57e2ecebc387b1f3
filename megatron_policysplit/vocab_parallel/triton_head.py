"""Triton kernels of the LM head's shard pass: hidden states in, a few floats per token or
dL/dlogits out.

Importing this module imports triton; on machines without a GPU its interpreter (TRITON_INTERPRET=1)
runs the same kernels. Operands are bf16, fp16 or fp32, products are accumulated in fp32. The
reductions hold no logits in memory: a program owns a block of tokens and a split of the shard's
columns, walks over the split tile by tile with a running maximum, and leaves its sums for
`combine`. Within a kernel x is in units of log 2, so that exp costs one instruction.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_INTERPRETED = triton.knobs.runtime.interpret

# Splits make about this many programs of 128 tokens: enough to fill a GPU evenly, few enough that
# what they leave behind for `combine` stays at a few MB however many tokens there are.
_PROGRAMS = 2048
# A tile may not reach into the next split.
_SPLIT_MULTIPLE = 32 if _INTERPRETED else 256
# Programs that run at the same time share these many blocks of hidden states and read the same
# tiles of the weight, both from the L2 cache.
_GROUP = tl.constexpr(16)
# log2 of a probability that is 0 in fp32; finite, so that 0 * x stays 0 in columns that do not
# count.
_NEVER = tl.constexpr(-1000.0)
_LN2 = tl.constexpr(math.log(2.0))


def reduce_head(
    hidden: Tensor, weight: Tensor, local_targets: Tensor, temperature: Tensor, columns: int
) -> Tensor:
    """A shard's statistics of the logits z = hidden @ weight[:columns].T: [4, T] fp32.

    Rows: highest z, sum e, sum e * x, z at the target, with x = (z - highest) / temperature and e =
    exp(x), natural units. hidden [T, H]; weight [padded columns, H] in hidden's dtype;
    local_targets [T] int64, global ids less the shard's start (outside [0, columns) the target is
    another shard's and its row holds 0); temperature [T] > 0. Without columns the highest logit is
    minus infinity and the sums are 0. Communicates nothing.
    """
    _check(hidden, weight, columns)
    tokens, temperature = len(hidden), temperature.float()
    if not tokens or not columns:
        return _empty(hidden, 4, 0)
    width, splits = _splits(tokens, columns)
    partials = hidden.new_empty(splits, 4, tokens, dtype=torch.float32)
    _launch(
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
    """A shard's statistics of two policies at the same tokens, for the KL between them: [6, T]
    fp32.

    Rows: highest a, sum e_a, sum e_a * (x_a - x_b), highest b, sum e_b, sum e_b * (x_b - x_a), with
    each x shifted by its own policy's highest logit of the shard as in `reduce_head`. hidden_* [T,
    H]; temperature_* [T] > 0. Equal hidden states and temperatures give cross sums of exactly 0.
    Communicates nothing.
    """
    _check(hidden_a, weight, columns)
    if hidden_b.shape != hidden_a.shape or hidden_b.dtype != hidden_a.dtype:
        raise ValueError(
            f"hidden states of a pair differ: {_describe(hidden_a)} and {_describe(hidden_b)}"
        )
    tokens, temperature_a, temperature_b = (
        len(hidden_a),
        temperature_a.float(),
        temperature_b.float(),
    )
    if not tokens or not columns:
        return _empty(hidden_a, 6, 0, 3)
    width, splits = _splits(tokens, columns)
    partials = hidden_a.new_empty(splits, 6, tokens, dtype=torch.float32)
    _launch(
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
) -> Tensor:
    """dL/dz of this shard's logits, recomputed tile by tile: [T, padded columns] in hidden's dtype,
    0 in padding.

    With log p = (z - top) / temperature - log_total: dL/dz = ((1 at an owned target - p) *
    grad_logprobs - p * (log p + entropy) * grad_entropy) / temperature. The first five arguments as
    in `reduce_head`; top, log_total (of sum exp((z - top) / temperature)) and entropy [T] are those
    of the whole vocabulary, in nats; grad_* [T], None where the entropy is not in the loss.
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
    _launch(
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
        ),
        (gradient, tokens, columns, padded, *hidden.stride(), *weight.stride()),
    )
    return gradient


def combine(partials: Tensor, temperature: Tensor) -> Tensor:
    """Statistics of parts of a row's columns, [parts, 4, T] as `reduce_head` returns them, to those
    of all: [4, T].

    Exact up to rounding for any partition; a part without columns (highest minus infinity) changes
    nothing.
    """
    highest, total, moment, at_target = partials.unbind(1)
    top, step = _steps(highest, temperature)
    scale = step.exp()
    sums = (scale * total).sum(0), (scale * (moment + step * total)).sum(0)
    return torch.stack([top, *sums, at_target.sum(0)])


def combine_pair(partials: Tensor, temperature_a: Tensor, temperature_b: Tensor) -> Tensor:
    """`combine` for what `reduce_head_pair` returns: [parts, 6, T] to [6, T].

    When the shifts of a part change to the row's, x_a - x_b gains step_a - step_b, and its sum
    weighted by e_a gains that times sum e_a.
    """
    highest_a, total_a, cross_a, highest_b, total_b, cross_b = partials.unbind(1)
    top_a, step_a = _steps(highest_a, temperature_a)
    top_b, step_b = _steps(highest_b, temperature_b)
    scale_a, scale_b, apart = step_a.exp(), step_b.exp(), step_a - step_b
    sums_a = [(scale_a * total_a).sum(0), (scale_a * (cross_a + apart * total_a)).sum(0)]
    sums_b = [(scale_b * total_b).sum(0), (scale_b * (cross_b - apart * total_b)).sum(0)]
    return torch.stack([top_a, *sums_a, top_b, *sums_b])


def _steps(highest: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """Maxima [parts, T] to the row's, [T], and how far each part's x moves when shifted by it,
    [parts, T] <= 0.
    """
    top = highest.max(0).values
    return top, ((highest - top) / temperature).where(highest != -torch.inf, 0.0)


def _check(hidden: Tensor, weight: Tensor, columns: int) -> None:
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
    """What a shard without columns or tokens leaves: sums of 0, and minus infinity in the rows of
    highest logits.
    """
    out = hidden.new_zeros(rows, len(hidden), dtype=torch.float32)
    out[list(maxima)] = -torch.inf
    return out


def _log2_scale(temperature: Tensor) -> Tensor:
    return (math.log2(math.e) / temperature).contiguous()


def _splits(tokens: int, columns: int) -> tuple[int, int]:
    """Columns of a split, a multiple of every tile's, and the number of splits. None is empty."""
    wanted = max(1, _PROGRAMS // triton.cdiv(tokens, 128))
    width = triton.cdiv(triton.cdiv(columns, wanted), _SPLIT_MULTIPLE) * _SPLIT_MULTIPLE
    return width, triton.cdiv(columns, width)


def _launch(
    kernel: _Kernel, grid, hidden: Tensor, tensors: tuple, numbers: tuple, **options: bool
) -> None:
    tokens, features = hidden.shape
    constants = {
        "H": features,
        "UPCAST": _INTERPRETED and hidden.dtype == torch.bfloat16,
        "FEW": tokens <= 256,
    }
    if _INTERPRETED:
        run, constants = kernel.plain, constants | {"BLOCK_T": 16, "BLOCK_V": 32, "BLOCK_H": 32}
    elif hidden.dtype == torch.float32:
        # No tensor cores: wide tiles would only spill registers.
        blocks = {"BLOCK_T": 64, "BLOCK_V": 64, "BLOCK_H": 32, "num_warps": 8, "num_stages": 2}
        run, constants = kernel.plain, constants | blocks
    else:
        run = kernel.tuned
    run[grid](*tensors, *numbers, **constants, **options)


class _Kernel:
    """A jitted function as it is, for given blocks, and with blocks found by timing.

    The choice is kept on disk: another one would change the last bits of a resumed run.
    """

    def __init__(self, plain, blocks: list[tuple[int, int, int, int, int]]):
        configs = [
            triton.Config(
                {"BLOCK_T": t, "BLOCK_V": v, "BLOCK_H": h}, num_warps=warps, num_stages=stages
            )
            for t, v, h, warps, stages in blocks
        ]
        self.plain = plain
        self.tuned = triton.autotune(configs, key=["H", "FEW"], cache_results=True)(plain)


@triton.jit
def _place(program, token_blocks, splits):
    """Block of tokens and split of a program: blocks first within groups of blocks, so that
    neighbours share both.
    """
    group = program // (_GROUP * splits)
    first = group * _GROUP
    size = tl.minimum(token_blocks - first, _GROUP)
    within = program - first * splits
    return first + within % size, within // size


@triton.jit
def _pointers(pointer, rows, stride_row, stride_h, BLOCK_H: tl.constexpr):
    return (
        pointer
        + rows.to(tl.int64)[:, None] * stride_row
        + tl.arange(0, BLOCK_H)[None, :] * stride_h
    )


@triton.jit
def _operand(pointers, start, H: tl.constexpr, BLOCK_H: tl.constexpr, UPCAST: tl.constexpr):
    """A block [rows, BLOCK_H] of hidden states or weight; zeros beyond H."""
    if H % BLOCK_H == 0:
        block = tl.load(pointers)
    else:
        block = tl.load(pointers, mask=(tl.arange(0, BLOCK_H) < H - start)[None, :], other=0.0)
    if UPCAST:
        # The interpreter keeps bf16 as bit patterns, which its matrix product would take for
        # integers.
        block = block.to(tl.float32)
    return block


@triton.jit
def _owned(targets_ptr, rows, columns):
    """The targets' columns as int32, -1 where another shard's."""
    target = tl.load(targets_ptr + rows)
    return tl.where((target >= 0) & (target < columns), target, -1).to(tl.int32)


@triton.jit
def _logits(
    h, w, stride_hh, stride_wh, H: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """A tile [BLOCK_T, BLOCK_V] of logits from pointers to the first blocks of its hidden states
    and weight.
    """
    z = tl.zeros((BLOCK_T, BLOCK_V), dtype=tl.float32)
    for start in range(0, H, BLOCK_H):
        hidden = _operand(h, start, H, BLOCK_H, UPCAST)
        weight = _operand(w, start, H, BLOCK_H, UPCAST)
        z = tl.dot(hidden, tl.trans(weight), z, input_precision="ieee")
        h += BLOCK_H * stride_hh
        w += BLOCK_H * stride_wh
    return z


@triton.jit
def _shift(z, highest, scale, counts):
    """The running maximum after tile z, how far x moves with it, and the tile's x, in units of log
    2.
    """
    new = tl.maximum(highest, tl.max(tl.where(counts, z, float("-inf")), 1))
    step = tl.where(highest == float("-inf"), 0.0, (highest - new) * scale)
    return new, step, tl.where(counts, (z - new[:, None]) * scale[:, None], _NEVER)


@triton.jit(do_not_specialize=["T"])
def _reduce_kernel(
    hidden_ptr, weight_ptr, targets_ptr, scale_ptr, out_ptr, T, columns, width, splits,
    stride_ht, stride_hh, stride_wv, stride_wh, H: tl.constexpr, UPCAST: tl.constexpr, FEW: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    block, split = _place(tl.program_id(0), tl.cdiv(T, BLOCK_T), splits)
    rows = block * BLOCK_T + tl.arange(0, BLOCK_T)
    # Rows past the end compute the last token once more: loads without a mask are faster.
    safe_rows = tl.minimum(rows, T - 1)
    scale = tl.load(scale_ptr + safe_rows)
    target = _owned(targets_ptr, safe_rows, columns)
    h = _pointers(hidden_ptr, safe_rows, stride_ht, stride_hh, BLOCK_H)
    highest = tl.full((BLOCK_T,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_T,), dtype=tl.float32)
    moment = tl.zeros((BLOCK_T,), dtype=tl.float32)
    at_target = tl.zeros((BLOCK_T,), dtype=tl.float32)
    end = tl.minimum((split + 1) * width, columns)
    for start in range(split * width, end, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        w = _pointers(weight_ptr, tl.minimum(column, end - 1), stride_wv, stride_wh, BLOCK_H)
        z = _logits(h, w, stride_hh, stride_wh, H, UPCAST, BLOCK_T, BLOCK_V, BLOCK_H)
        at_target += tl.sum(tl.where(column[None, :] == target[:, None], z, 0.0), 1)
        highest, step, x = _shift(z, highest, scale, (column < end)[None, :])
        e = tl.exp2(x)
        decay = tl.exp2(step)
        moment = decay * (moment + step * total) + tl.sum(e * x, 1)
        total = decay * total + tl.sum(e, 1)
    out = out_ptr + split.to(tl.int64) * 4 * T + rows
    tl.store(out, highest, mask=rows < T)
    tl.store(out + T, total, mask=rows < T)
    tl.store(out + 2 * T, moment * _LN2, mask=rows < T)
    tl.store(out + 3 * T, at_target, mask=rows < T)


@triton.jit(do_not_specialize=["T"])
def _reduce_pair_kernel(
    hidden_a_ptr, hidden_b_ptr, weight_ptr, scale_a_ptr, scale_b_ptr, out_ptr, T, columns, width, splits,
    stride_at, stride_ah, stride_bt, stride_bh, stride_wv, stride_wh,
    H: tl.constexpr, UPCAST: tl.constexpr, FEW: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    block, split = _place(tl.program_id(0), tl.cdiv(T, BLOCK_T), splits)
    rows = block * BLOCK_T + tl.arange(0, BLOCK_T)
    safe_rows = tl.minimum(rows, T - 1)
    scale_a = tl.load(scale_a_ptr + safe_rows)
    scale_b = tl.load(scale_b_ptr + safe_rows)
    highest_a = tl.full((BLOCK_T,), float("-inf"), dtype=tl.float32)
    highest_b = tl.full((BLOCK_T,), float("-inf"), dtype=tl.float32)
    total_a = tl.zeros((BLOCK_T,), dtype=tl.float32)
    total_b = tl.zeros((BLOCK_T,), dtype=tl.float32)
    cross_a = tl.zeros((BLOCK_T,), dtype=tl.float32)
    cross_b = tl.zeros((BLOCK_T,), dtype=tl.float32)
    end = tl.minimum((split + 1) * width, columns)
    for start in range(split * width, end, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        counts = (column < end)[None, :]
        a = _pointers(hidden_a_ptr, safe_rows, stride_at, stride_ah, BLOCK_H)
        b = _pointers(hidden_b_ptr, safe_rows, stride_bt, stride_bh, BLOCK_H)
        w = _pointers(weight_ptr, tl.minimum(column, end - 1), stride_wv, stride_wh, BLOCK_H)
        z_a = tl.zeros((BLOCK_T, BLOCK_V), dtype=tl.float32)
        z_b = tl.zeros((BLOCK_T, BLOCK_V), dtype=tl.float32)
        for k in range(0, H, BLOCK_H):
            weight = tl.trans(_operand(w, k, H, BLOCK_H, UPCAST))
            z_a = tl.dot(_operand(a, k, H, BLOCK_H, UPCAST), weight, z_a, input_precision="ieee")
            z_b = tl.dot(_operand(b, k, H, BLOCK_H, UPCAST), weight, z_b, input_precision="ieee")
            a += BLOCK_H * stride_ah
            b += BLOCK_H * stride_bh
            w += BLOCK_H * stride_wh
        highest_a, step_a, x_a = _shift(z_a, highest_a, scale_a, counts)
        highest_b, step_b, x_b = _shift(z_b, highest_b, scale_b, counts)
        e_a = tl.exp2(x_a)
        e_b = tl.exp2(x_b)
        apart = step_a - step_b
        cross_a = tl.exp2(step_a) * (cross_a + apart * total_a) + tl.sum(e_a * (x_a - x_b), 1)
        cross_b = tl.exp2(step_b) * (cross_b - apart * total_b) + tl.sum(e_b * (x_b - x_a), 1)
        total_a = tl.exp2(step_a) * total_a + tl.sum(e_a, 1)
        total_b = tl.exp2(step_b) * total_b + tl.sum(e_b, 1)
    out = out_ptr + split.to(tl.int64) * 6 * T + rows
    tl.store(out, highest_a, mask=rows < T)
    tl.store(out + T, total_a, mask=rows < T)
    tl.store(out + 2 * T, cross_a * _LN2, mask=rows < T)
    tl.store(out + 3 * T, highest_b, mask=rows < T)
    tl.store(out + 4 * T, total_b, mask=rows < T)
    tl.store(out + 5 * T, cross_b * _LN2, mask=rows < T)


@triton.jit(do_not_specialize=["T"])
def _gradient_kernel(
    hidden_ptr, weight_ptr, targets_ptr, inverse_ptr, top_ptr, log_total_ptr, entropy_ptr, grad_logprobs_ptr,
    grad_entropy_ptr, out_ptr, T, columns, padded, stride_ht, stride_hh, stride_wv, stride_wh,
    H: tl.constexpr, UPCAST: tl.constexpr, FEW: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    block, tile = _place(tl.program_id(0), tl.cdiv(T, BLOCK_T), tl.cdiv(padded, BLOCK_V))
    rows = block * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    safe_rows = tl.minimum(rows, T - 1)
    h = _pointers(hidden_ptr, safe_rows, stride_ht, stride_hh, BLOCK_H)
    w = _pointers(weight_ptr, tl.minimum(column, columns - 1), stride_wv, stride_wh, BLOCK_H)
    z = _logits(h, w, stride_hh, stride_wh, H, UPCAST, BLOCK_T, BLOCK_V, BLOCK_H)
    inverse = tl.load(inverse_ptr + safe_rows)
    top = tl.load(top_ptr + safe_rows)
    log_total = tl.load(log_total_ptr + safe_rows)
    entropy = tl.load(entropy_ptr + safe_rows)
    on_logprob = tl.load(grad_logprobs_ptr + safe_rows) * inverse
    on_entropy = tl.load(grad_entropy_ptr + safe_rows) * inverse
    target = _owned(targets_ptr, safe_rows, columns)
    log_p = (z - top[:, None]) * inverse[:, None] - log_total[:, None]
    pull = on_logprob[:, None] + (log_p + entropy[:, None]) * on_entropy[:, None]
    g = (
        tl.where(column[None, :] == target[:, None], on_logprob[:, None], 0.0)
        - tl.exp(log_p) * pull
    )
    g = tl.where((column < columns)[None, :], g, 0.0)
    out = out_ptr + rows.to(tl.int64)[:, None] * padded + column[None, :]
    tl.store(
        out, g.to(out_ptr.dtype.element_ty), mask=(rows < T)[:, None] & (column < padded)[None, :]
    )


# Tokens, columns and features of a block, warps, stages.
_ONE_PRODUCT = [
    (128, 256, 64, 8, 3),
    (128, 256, 64, 8, 4),
    (128, 128, 64, 4, 3),
    (64, 128, 64, 4, 4),
]
_TWO_PRODUCTS = [
    (128, 128, 64, 8, 3),
    (128, 128, 64, 8, 4),
    (64, 256, 64, 8, 3),
    (64, 128, 64, 4, 4),
]
_reduce = _Kernel(_reduce_kernel, _ONE_PRODUCT)
_reduce_pair = _Kernel(_reduce_pair_kernel, _TWO_PRODUCTS)
_gradient = _Kernel(_gradient_kernel, _ONE_PRODUCT)
