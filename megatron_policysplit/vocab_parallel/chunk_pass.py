"""One chunk of tokens through a shard of the LM head: to floats per token, or to dL/dlogits.

Two implementations: `TorchPass` holds the chunk's logits, `TritonPass` runs kernels on a GPU that
hold none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from megatron_policysplit.vocab_parallel.reduction import (
    Exponentials,
    Merged,
    PerToken,
    Slopes,
    Tokens,
    exponentials_gradient,
    logits_gradient,
    reduce_logits,
    reduce_pair,
    statistics_dtype,
)

if TYPE_CHECKING:
    from megatron_policysplit.vocab_parallel.shard import Head

SLICE_ROWS = 8192  # rows of a weight of 16 bits that are widened to 32 bits at a time


@dataclass(frozen=True)
class States(PerToken):
    """One of two policies at P tokens that are reduced as pairs."""

    hidden: Tensor  # hidden states [N, H]
    temperature: Tensor  # [P]
    rows: Tensor | None = None  # [P] int64: the hidden state of each token; None: token i has i
    logits: Tensor | None = None  # [N, padded columns], where they have been made already


class ChunkPass(Protocol):
    """How a chunk of C tokens with hidden states [C, H] is computed; `chunk_pass` makes one.

    `reduce` and `reduce_for_gradient` return floats and possibly a tensor of the logits' size. That
    tensor is valid until the second reduction after it: there are two buffers, which take turns.
    """

    def reduce(self, hidden: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        """Return `reduction.reduce_logits` of the chunk, [4, C], and its logits if it has any.

        Logits: [C, padded columns]; None by kernels.
        """

    def reduce_for_gradient(
        self, hidden: Tensor, tokens: Tokens
    ) -> tuple[Tensor, Exponentials | None]:
        """Return the floats of `reduce`, bit for bit, and exponentials for `gradient` to use."""

    def reduce_pair(self, a: States, b: States) -> Tensor:
        """Return `reduction.reduce_pair` of two policies, [6, P].

        The buffer of the logits that were passed in is not overwritten.
        """

    def gradient(
        self,
        hidden: Tensor,
        exponentials: Exponentials | None,
        tokens: Tokens,
        merged: Merged,
        slopes: Slopes,
    ) -> Tensor:
        """Return d loss / d logits, [C, padded columns] in the dtype of `hidden`.

        exponentials: of `reduce_for_gradient`, which may be overwritten; None: the logits are made
        again.
        """


def chunk_pass(head: Head, tokens: int) -> ChunkPass:
    """Return the implementation for a call of the head with so many tokens."""
    return TritonPass(head) if head.triton else TorchPass(head, tokens)


def shard_logits(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """Write hidden [C, H] @ weight [padded columns, H]^T into `out` [C, padded columns]; return it.

    `out` is fp32 (fp64 for fp64 operands). Operands of 16 bits are widened, the weight a slice at a
    time, so that logits are not rounded to 16 bits: the KL between policies that are close would
    drown in the rounding.
    """
    if weight.dtype == out.dtype:
        return torch.mm(hidden, weight.t(), out=out)
    wide = hidden.to(out.dtype)
    for start in range(0, len(weight), SLICE_ROWS):
        rows = slice(start, start + SLICE_ROWS)
        out[:, rows] = wide @ weight[rows].to(out.dtype).t()
    return out


class TorchPass:
    """Matrix products of torch into two buffers that take turns.

    They hold the logits of this chunk and of the one before, which `fused_loss` still works on.
    """

    def __init__(self, head: Head, tokens: int):
        self._weight, self._shard = head.weight.detach(), head.shard
        self._chunk = min(head.chunk, tokens)
        self._buffers: list[Tensor] = []

    def reduce(self, hidden: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        logits = self._logits(hidden)
        return reduce_logits(logits, tokens, self._shard), logits

    def reduce_for_gradient(self, hidden: Tensor, tokens: Tokens) -> tuple[Tensor, Exponentials]:
        logits = self._logits(hidden)
        parts = reduce_logits(logits, tokens, self._shard, leave_exponentials=True)
        return parts, Exponentials(logits, parts[0])

    def reduce_pair(self, a: States, b: States) -> Tensor:
        logits_a = self._logits(a.hidden) if a.logits is None else a.logits
        logits_b = self._logits(b.hidden) if b.logits is None else b.logits
        parts = reduce_pair(
            logits_a, logits_b, a.temperature, b.temperature, self._shard, a.rows, b.rows
        )
        if b.logits is None:
            # The logits of b took the other buffer. Turn back, so that the next product overwrites
            # them again and not `logits_a`, which the chunk may need for further pairs.
            self._buffers.reverse()
        return parts

    def gradient(
        self,
        hidden: Tensor,
        exponentials: Exponentials | None,
        tokens: Tokens,
        merged: Merged,
        slopes: Slopes,
    ) -> Tensor:
        if exponentials is not None:
            gradient = exponentials_gradient(exponentials, tokens, merged, slopes, self._shard)
        else:
            logits = self._logits(hidden)
            gradient = logits_gradient(logits, tokens, merged, slopes, self._shard, out=logits)
        return gradient.to(hidden.dtype)

    def _logits(self, hidden: Tensor) -> Tensor:
        """The logits [C, padded columns], in the buffer that was not used last."""
        if len(self._buffers) < 2:
            dtype = statistics_dtype(self._weight)
            self._buffers.append(
                self._weight.new_empty(self._chunk, len(self._weight), dtype=dtype)
            )
        else:
            self._buffers.reverse()
        return shard_logits(hidden, self._weight, self._buffers[-1][: len(hidden)])


class TritonPass:
    """Kernels that walk over the vocabulary in tiles and hold no logits; see `triton_head`."""

    def __init__(self, head: Head):
        # Imported here: the package must import on machines without triton.
        from megatron_policysplit.vocab_parallel import triton_head

        self._kernels, self._weight, self._shard = triton_head, head.weight.detach(), head.shard

    def reduce(self, hidden: Tensor, tokens: Tokens) -> tuple[Tensor, None]:
        local, columns = tokens.targets - self._shard.start, self._shard.columns
        return self._kernels.reduce_head(
            hidden, self._weight, local, tokens.temperature, columns
        ), None

    # The kernels leave no exponentials; `gradient` computes them again.
    reduce_for_gradient = reduce

    def reduce_pair(self, a: States, b: States) -> Tensor:
        hidden = [
            states.hidden if states.rows is None else states.hidden[states.rows]
            for states in (a, b)
        ]
        temperatures = a.temperature, b.temperature
        return self._kernels.reduce_head_pair(
            *hidden, self._weight, *temperatures, self._shard.columns
        )

    def gradient(
        self,
        hidden: Tensor,
        exponentials: Exponentials | None,
        tokens: Tokens,
        merged: Merged,
        slopes: Slopes,
    ) -> Tensor:
        return self._kernels.head_gradient(
            hidden,
            self._weight,
            tokens.targets - self._shard.start,
            tokens.temperature,
            self._shard.columns,
            merged.top,
            merged.log_total,
            merged.entropy,
            slopes.by_logprob,
            slopes.by_entropy,
        )
