"""The Triton kernels of the LM head: they reduce a shard's logits, write them, or their gradient.

`triton_head` launches them. T is the number of tokens, H of features; a block has BLOCK_T tokens,
BLOCK_V columns and BLOCK_H features. UPCAST and FEW are set in `triton_launch.launch`. Within a
kernel x = (z - highest) / temperature is in units of log 2, so that exp costs one instruction
(exp2): `scale` is log2(e) / temperature, and sums of e * x are multiplied by log 2 when they are
stored.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

# Programs that run at the same time share these many blocks of hidden states and read the same
# tiles of the weight, both from the L2 cache.
_GROUP = tl.constexpr(16)
# log2 of a probability that is 0 in fp32; finite, so that 0 * x stays 0 in columns that do not
# count.
_NEVER = tl.constexpr(-1000.0)
_LN2 = tl.constexpr(math.log(2.0))


@triton.jit
def _place(program, token_blocks, splits):
    """Block of tokens and split of a program.

    Numbered by blocks first, within groups of _GROUP blocks, so that neighbouring programs share
    hidden states and weight in the L2 cache.
    """
    group = program // (_GROUP * splits)
    first = group * _GROUP
    size = tl.minimum(token_blocks - first, _GROUP)
    within = program - first * splits
    return first + within % size, within // size


@triton.jit
def _pointers(pointer, rows, stride_row, stride_h, BLOCK_H: tl.constexpr):
    """Pointers [rows, BLOCK_H] to the first BLOCK_H features of rows of a matrix."""
    return (
        pointer
        + rows.to(tl.int64)[:, None] * stride_row
        + tl.arange(0, BLOCK_H)[None, :] * stride_h
    )


@triton.jit
def _operand(pointers, start, H: tl.constexpr, BLOCK_H: tl.constexpr, UPCAST: tl.constexpr):
    """A block [rows, BLOCK_H] of hidden states or weight; zeros beyond H."""
    # H is a compile-time constant: where it divides evenly no mask is compiled at all.
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
    """The targets' columns in this shard as int32, -1 for targets of other shards."""
    target = tl.load(targets_ptr + rows)
    return tl.where((target >= 0) & (target < columns), target, -1).to(tl.int32)


@triton.jit
def _logits(
    h, w, stride_hh, stride_wh, H: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """A tile [BLOCK_T, BLOCK_V] of logits, fp32.

    h, w: pointers to the first blocks of its hidden states and weight.
    """
    z = tl.zeros((BLOCK_T, BLOCK_V), dtype=tl.float32)
    for start in range(0, H, BLOCK_H):
        hidden = _operand(h, start, H, BLOCK_H, UPCAST)
        weight = _operand(w, start, H, BLOCK_H, UPCAST)
        # "ieee": operands of 32 bits are not rounded to TF32.
        z = tl.dot(hidden, tl.trans(weight), z, input_precision="ieee")
        h += BLOCK_H * stride_hh
        w += BLOCK_H * stride_wh
    return z


@triton.jit
def _shift(z, highest, scale, counts):
    """Online softmax: the running maximum after tile z, the step of x with it, and the tile's x.

    The step (<= 0) and x are in units of log 2; columns that do not count get _NEVER.
    """
    new = tl.maximum(highest, tl.max(tl.where(counts, z, float("-inf")), 1))
    # The first tile makes no step: minus infinity times a sum of 0 would be NaN.
    step = tl.where(highest == float("-inf"), 0.0, (highest - new) * scale)
    return new, step, tl.where(counts, (z - new[:, None]) * scale[:, None], _NEVER)


@triton.jit(do_not_specialize=["T"])
def reduce_kernel(
    hidden_ptr, weight_ptr, targets_ptr, scale_ptr, out_ptr, T, columns, width, splits,
    stride_ht, stride_hh, stride_wv, stride_wh,
    H: tl.constexpr, UPCAST: tl.constexpr, FEW: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Sums of a block of tokens over one split of the columns, into out [splits, 4, T] fp32.

    Rows: highest z, sum e, sum e * x, z at the target; as `triton_head.reduce_head` returns them.
    """
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
        # The moment first: it needs the sum of e as it was before this tile.
        moment = decay * (moment + step * total) + tl.sum(e * x, 1)
        total = decay * total + tl.sum(e, 1)
    out = out_ptr + split.to(tl.int64) * 4 * T + rows
    tl.store(out, highest, mask=rows < T)
    tl.store(out + T, total, mask=rows < T)
    tl.store(out + 2 * T, moment * _LN2, mask=rows < T)
    tl.store(out + 3 * T, at_target, mask=rows < T)


@triton.jit(do_not_specialize=["T"])
def reduce_pair_kernel(
    hidden_a_ptr, hidden_b_ptr, weight_ptr, scale_a_ptr, scale_b_ptr, out_ptr,
    T, columns, width, splits,
    stride_at, stride_ah, stride_bt, stride_bh, stride_wv, stride_wh,
    H: tl.constexpr, UPCAST: tl.constexpr, FEW: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Sums of two policies over one split of the columns, into out [splits, 6, T] fp32.

    Rows: highest z, sum e, cross sum of policy a, then of b; as `triton_head.reduce_head_pair`
    returns them.
    """
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
            # One tile of the weight serves both products.
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
def nucleus_kernel(
    hidden_ptr, weight_ptr, scale_ptr, highest_ptr, threshold_ptr, out_ptr,
    T, columns, width, splits,
    stride_ht, stride_hh, stride_wv, stride_wh,
    H: tl.constexpr, UPCAST: tl.constexpr, FEW: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Sums over the nuclei's columns in one split of the columns, into out [splits, 2, T] fp32.

    Rows: sum e, sum e * x over logits at or above the threshold; as
    `triton_head.reduce_head_nucleus` returns them. highest_ptr: the shard's highest logits.
    """
    block, split = _place(tl.program_id(0), tl.cdiv(T, BLOCK_T), splits)
    rows = block * BLOCK_T + tl.arange(0, BLOCK_T)
    safe_rows = tl.minimum(rows, T - 1)
    scale = tl.load(scale_ptr + safe_rows)
    highest = tl.load(highest_ptr + safe_rows)
    threshold = tl.load(threshold_ptr + safe_rows)
    h = _pointers(hidden_ptr, safe_rows, stride_ht, stride_hh, BLOCK_H)
    total = tl.zeros((BLOCK_T,), dtype=tl.float32)
    moment = tl.zeros((BLOCK_T,), dtype=tl.float32)
    end = tl.minimum((split + 1) * width, columns)
    for start in range(split * width, end, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        w = _pointers(weight_ptr, tl.minimum(column, end - 1), stride_wv, stride_wh, BLOCK_H)
        z = _logits(h, w, stride_hh, stride_wh, H, UPCAST, BLOCK_T, BLOCK_V, BLOCK_H)
        inside = (column < end)[None, :] & (z >= threshold[:, None])
        # Finite outside too, so that e * x is 0 there.
        x = tl.where(inside, (z - highest[:, None]) * scale[:, None], _NEVER)
        e = tl.exp2(x)
        total += tl.sum(e, 1)
        moment += tl.sum(e * x, 1)
    out = out_ptr + split.to(tl.int64) * 2 * T + rows
    tl.store(out, total, mask=rows < T)
    tl.store(out + T, moment * _LN2, mask=rows < T)


@triton.jit(do_not_specialize=["T"])
def logits_kernel(
    hidden_ptr, weight_ptr, out_ptr, T, columns, padded,
    stride_ht, stride_hh, stride_wv, stride_wh,
    H: tl.constexpr, UPCAST: tl.constexpr, FEW: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One tile of logits, into out [T, padded] fp32; padding is not written."""
    block, tile = _place(tl.program_id(0), tl.cdiv(T, BLOCK_T), tl.cdiv(columns, BLOCK_V))
    rows = block * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    h = _pointers(hidden_ptr, tl.minimum(rows, T - 1), stride_ht, stride_hh, BLOCK_H)
    w = _pointers(weight_ptr, tl.minimum(column, columns - 1), stride_wv, stride_wh, BLOCK_H)
    z = _logits(h, w, stride_hh, stride_wh, H, UPCAST, BLOCK_T, BLOCK_V, BLOCK_H)
    out = out_ptr + rows.to(tl.int64)[:, None] * padded + column[None, :]
    tl.store(out, z, mask=(rows < T)[:, None] & (column < columns)[None, :])


@triton.jit(do_not_specialize=["T"])
def gradient_kernel(
    hidden_ptr, weight_ptr, targets_ptr, inverse_ptr, top_ptr, log_total_ptr, entropy_ptr,
    grad_logprobs_ptr, grad_entropy_ptr,
    threshold_ptr, nucleus_log_total_ptr, nucleus_entropy_ptr, grad_nucleus_ptr,
    out_ptr, T, columns, padded,
    stride_ht, stride_hh, stride_wv, stride_wh,
    H: tl.constexpr, UPCAST: tl.constexpr, FEW: tl.constexpr, NUCLEUS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile of logits, into out [T, padded].

    `triton_head.head_gradient` has the formula. inverse_ptr: 1 / temperature; everything here is in
    natural units. NUCLEUS: whether the loss has the nucleus's entropy; else its pointers are not
    read.
    """
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
    if NUCLEUS:
        threshold = tl.load(threshold_ptr + safe_rows)
        nucleus_log_total = tl.load(nucleus_log_total_ptr + safe_rows)
        nucleus_entropy = tl.load(nucleus_entropy_ptr + safe_rows)
        on_nucleus = tl.load(grad_nucleus_ptr + safe_rows) * inverse
        log_q = (z - top[:, None]) * inverse[:, None] - nucleus_log_total[:, None]
        minus = tl.exp(log_q) * (log_q + nucleus_entropy[:, None]) * on_nucleus[:, None]
        g -= tl.where(z >= threshold[:, None], minus, 0.0)
    g = tl.where((column < columns)[None, :], g, 0.0)
    out = out_ptr + rows.to(tl.int64)[:, None] * padded + column[None, :]
    tl.store(
        out, g.to(out_ptr.dtype.element_ty), mask=(rows < T)[:, None] & (column < padded)[None, :]
    )
