"""The gradient of the LM head, summed over chunks in fp32 and given to whoever collects it."""

from __future__ import annotations

import torch
from torch import Tensor

SLICE_ROWS = 8192  # of the vocabulary, where a product has to be made before it can be added


class WeightGradient:
    """d loss / d weight [padded columns, H], in fp32 (fp64 for an fp64 weight) until it is
    delivered.
    """

    def __init__(self, weight: Tensor):
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self._weight = weight
        self._total = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        self._empty = True

    def add(self, grad_logits: Tensor, hidden: Tensor) -> None:
        """Add grad_logits [T, padded columns]^T @ hidden [T, H]."""
        beta, self._empty = 0 if self._empty else 1, False
        if grad_logits.dtype == self._total.dtype:
            torch.addmm(self._total, grad_logits.t(), hidden, beta=beta, out=self._total)
            return
        for start in range(0, len(self._total), SLICE_ROWS):
            rows = slice(start, start + SLICE_ROWS)
            product = grad_logits[:, rows].t() @ hidden
            if beta:
                self._total[rows] += product
            else:
                self._total[rows] = product

    def deliver(self, scale: Tensor | None = None) -> Tensor:
        """What autograd shall get for the weight, all of it times `scale`; once only.

        Where the parameter has Megatron's fp32 `main_grad` the gradient is added there, and
        autograd gets zeros, for the sake of the parameter's hooks. These may add them: that is
        right with tied embeddings too, whose other gradient comes by the same way.
        """
        total, self._total = self._total, None
        if self._empty:
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
