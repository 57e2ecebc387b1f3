"""The gradient of the LM head, summed over chunks in fp32 and given to whoever collects it."""

from __future__ import annotations

import torch
from torch import Tensor

# Rows of the vocabulary whose product is made at a time where it cannot be added in one operation.
SLICE_ROWS = 8192


class WeightGradient:
    """d loss / d weight [padded columns, H], summed over chunks and delivered once.

    It is kept in fp32 (fp64 for an fp64 weight) until then.
    """

    def __init__(self, weight: Tensor):
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self._weight = weight
        self._total = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        self._empty = True

    def add(self, grad_logits: Tensor, hidden: Tensor) -> None:
        """Add grad_logits [T, padded columns]^T @ hidden [T, H]."""
        # The first product overwrites, so that the total need not be filled with zeros.
        beta, self._empty = 0 if self._empty else 1, False
        if grad_logits.dtype == self._total.dtype:
            torch.addmm(self._total, grad_logits.t(), hidden, beta=beta, out=self._total)
            return
        # A product of 16 bits cannot go straight into a total of 32; slices keep it small.
        for start in range(0, len(self._total), SLICE_ROWS):
            rows = slice(start, start + SLICE_ROWS)
            product = grad_logits[:, rows].t() @ hidden
            if beta:
                self._total[rows] += product
            else:
                self._total[rows] = product

    def deliver(self, scale: Tensor | None = None) -> Tensor:
        """Return what autograd gets as the weight's gradient, all of it times `scale`; once only.

        Where the parameter has Megatron's fp32 `main_grad` the gradient is added there, and
        autograd gets zeros, so that the parameter's hooks still run. A hook may add these zeros to
        `main_grad`, which changes nothing. With tied embeddings the gradient of the embedding
        reaches `main_grad` by the same hook and is not lost.
        """
        total, self._total = self._total, None
        if self._empty:  # no tokens
            total.zero_()
        main_grad = getattr(self._weight, "main_grad", None)
        if main_grad is None:
            return (total if scale is None else total.mul_(scale)).to(self._weight.dtype)
        if scale is None:
            main_grad.add_(total)
        else:
            main_grad.addcmul_(total, scale.to(total.dtype))
        return (
            total.zero_() if total.dtype == self._weight.dtype else torch.zeros_like(self._weight)
        )
