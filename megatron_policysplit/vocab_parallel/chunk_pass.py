"""One chunk of tokens through a shard of the LM head: reduced to floats, or to the gradient of its
logits.

Two implementations: torch, which holds the chunk's logits, and Triton kernels on a GPU, which hold
none.
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

SLICE_ROWS = 8192  # of a weight of 16 bits, widened at a time


@dataclass(frozen=True)
class States(PerToken):
    """One of two policies at P tokens: hidden states [N, H], temperature [P], and rows [P] int64,
    which of the hidden states is each token's; None: each in turn. logits [N, padded columns], if
    they are there.
    """

    hidden: Tensor
    temperature: Tensor
    rows: Tensor | None = None
    logits: Tensor | None = None


class ChunkPass(Protocol):
    """hidden [C, H] of a chunk. What a reduction gives beside the floats may be given to the
    others, as long as no further chunk but the next has been reduced.
    """

    def reduce(self, hidden: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        """`reduction.reduce_logits` of the chunk, [4, C], and the chunk's logits [C, padded
        columns] if there are.
        """

    def reduce_for_gradient(
        self, hidden: Tensor, tokens: Tokens
    ) -> tuple[Tensor, Exponentials | None]:
        """The same floats, bit for bit, and what `gradient` can use."""

    def reduce_pair(self, a: States, b: States) -> Tensor:
        """`reduction.reduce_pair` of two policies, [6, P]. Logits that are there stay there."""

    def gradient(
        self,
        hidden: Tensor,
        kept: Exponentials | None,
        tokens: Tokens,
        merged: Merged,
        slopes: Slopes,
    ) -> Tensor:
        """d loss / d logits [C, padded columns] in the dtype of `hidden`; may overwrite `kept`."""


def chunk_pass(head: Head, tokens: int) -> ChunkPass:
    """How the chunks of a call with so many tokens are computed."""
    return TritonPass(head) if head.triton else TorchPass(head, tokens)


def shard_logits(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """hidden [C, H] @ weight [padded columns, H]^T into `out` [C, padded columns], fp32 (fp64 for
    fp64 operands).

    Operands of 16 bits are widened, the weight a slice at a time, so that logits are not rounded to
    16 bits: KL between policies that are close would drown in that.
    """
    if weight.dtype == out.dtype:
        return torch.mm(hidden, weight.t(), out=out)
    wide = hidden.to(out.dtype)
    for start in range(0, len(weight), SLICE_ROWS):
        rows = slice(start, start + SLICE_ROWS)
        out[:, rows] = wide @ weight[rows].to(out.dtype).t()
    return out


class TorchPass:
    """Matrix products of torch into buffers that take turns: the logits of this chunk and of the
    one before.
    """

    def __init__(self, head: Head, tokens: int):
        self._weight, self._shard, self._chunk = (
            head.weight.detach(),
            head.shard,
            min(head.chunk, tokens),
        )
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
            # So that the buffer of `logits_a` is not the next to be overwritten.
            self._buffers.reverse()
        return parts

    def gradient(
        self,
        hidden: Tensor,
        kept: Exponentials | None,
        tokens: Tokens,
        merged: Merged,
        slopes: Slopes,
    ) -> Tensor:
        if kept is not None:
            return exponentials_gradient(kept, tokens, merged, slopes, self._shard).to(hidden.dtype)
        logits = self._logits(hidden)
        return logits_gradient(logits, tokens, merged, slopes, self._shard, out=logits).to(
            hidden.dtype
        )

    def _logits(self, hidden: Tensor) -> Tensor:
        """[C, padded columns] in the buffer that was not used last."""
        if len(self._buffers) < 2:
            dtype = statistics_dtype(self._weight)
            self._buffers.append(
                self._weight.new_empty(self._chunk, len(self._weight), dtype=dtype)
            )
        else:
            self._buffers.reverse()
        return shard_logits(hidden, self._weight, self._buffers[-1][: len(hidden)])


class TritonPass:
    """Kernels that go over the vocabulary in tiles; only `gradient` writes something of the logits'
    size.
    """

    def __init__(self, head: Head):
        from megatron_policysplit.vocab_parallel import triton_head

        self._kernels, self._weight, self._shard = triton_head, head.weight.detach(), head.shard

    def reduce(self, hidden: Tensor, tokens: Tokens) -> tuple[Tensor, None]:
        local, columns = tokens.targets - self._shard.start, self._shard.columns
        return self._kernels.reduce_head(
            hidden, self._weight, local, tokens.temperature, columns
        ), None

    reduce_for_gradient = reduce

    def reduce_pair(self, a: States, b: States) -> Tensor:
        hidden = [of.hidden if of.rows is None else of.hidden[of.rows] for of in (a, b)]
        temperatures = a.temperature, b.temperature
        return self._kernels.reduce_head_pair(
            *hidden, self._weight, *temperatures, self._shard.columns
        )

    def gradient(
        self,
        hidden: Tensor,
        kept: Exponentials | None,
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
