"""The gradient of the LM head, summed over chunks in fp32 and given to whoever collects it."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_policysplit.vocab_parallel.shard import Head

# Rows of the vocabulary whose product is made at a time where it cannot be added in one operation.
SLICE_ROWS = 8192


class WeightGradient:
    """d loss / d weight [padded columns, H], summed over chunks and delivered once.

    Where Megatron's DDP has given a weight of 16 bits its fp32 `main_grad`, `add` adds straight
    into that if `at_once`: no buffer of the weight's size exists beside it. Otherwise the sum is
    kept in a buffer of fp32 (fp64 for an fp64 weight) until `deliver`. A weight of 32 bits always
    has the buffer: its micro-batches are then added to `main_grad` as wholes, and the sum's last
    bits do not depend on how they were cut into chunks.

    at_once: the factor of `deliver` is known to be 1, and `deliver` is sure to be called.
    """

    def __init__(self, head: Head, at_once: bool):
        weight = head.weight
        main_grad = getattr(weight, "main_grad", None)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self._weight, self._mixed_products = weight, head.mixed_products
        self._is_delivered = at_once and main_grad is not None and weight.dtype.itemsize == 2
        if self._is_delivered:
            self._total, self._empty = main_grad, False
        else:
            self._total = torch.empty(weight.shape, dtype=dtype, device=weight.device)
            self._empty = True

    def add(self, grad_logits: Tensor, hidden: Tensor) -> None:
        """Add grad_logits [T, padded columns]^T @ hidden [T, H]."""
        # The first product overwrites, so that the total need not be filled with zeros.
        beta, self._empty = 0 if self._empty else 1, False
        add_product(self._total, grad_logits.t(), hidden, beta, self._mixed_products)

    def deliver(self, scale: Tensor | None = None) -> Tensor | None:
        """Return what autograd gets as the weight's gradient, all of it times `scale`; once only.

        None where the parameter has a `main_grad`: the gradient has been added there. Autograd then
        runs the parameter's hooks as always. With tied embeddings the gradient of the embedding is
        all that reaches the hook of Megatron's DDP, which adds it to `main_grad` too. This needs
        `grad_added_to_main_grad` to stay False: the hook would drop the embedding's gradient.

        Raises RuntimeError for a scale other than 1 of a gradient that was added at once.
        """
        total, self._total = self._total, None
        if self._is_delivered:
            if scale is not None and float(scale) != 1:
                raise RuntimeError(
                    f"the gradient of the LM head is in main_grad already, and backward wants it "
                    f"times {float(scale)}: call fused_loss without `at_once`"
                )
            return None
        if self._empty:  # no tokens
            total.zero_()
        main_grad = getattr(self._weight, "main_grad", None)
        if main_grad is None:
            return (total if scale is None else total.mul_(scale)).to(self._weight.dtype)
        if scale is None:
            main_grad.add_(total)
        else:
            main_grad.addcmul_(total, scale.to(total.dtype))
        return None


def add_product(total: Tensor, a: Tensor, b: Tensor, beta: int, mixed_products: bool) -> None:
    """total [N, M] = beta * total + a [N, K] @ b [K, M]; no product is rounded to 16 bits.

    total: fp32 or fp64, and as precise as the operands. With a beta of 0 it may be uninitialized.
    mixed_products: see `Head`.
    """
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif mixed_products:
        torch.addmm(total, a, b, beta=beta, out_dtype=total.dtype, out=total)
    else:  # widened operands; slices keep their copies small
        wide = b.to(total.dtype)
        for part, rows in zip(total.split(SLICE_ROWS), a.split(SLICE_ROWS), strict=True):
            torch.addmm(part, rows.to(total.dtype), wide, beta=beta, out=part)
