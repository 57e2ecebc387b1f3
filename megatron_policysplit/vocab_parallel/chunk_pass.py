"""One chunk of tokens through a shard of the LM head: to floats per token, or to dL/dlogits.

Two implementations: `TorchPass` holds the chunk's logits, `TritonPass` runs kernels on a GPU that
hold none, except for a tile of rows at a time where a nucleus is looked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from megatron_policysplit.vocab_parallel.nucleus import (
    Nucleus,
    NucleusSlopes,
    add_nucleus_gradient,
    find_nucleus,
    reduce_nucleus,
)
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

    def find_nucleus(
        self, hidden: Tensor, logits: Tensor | None, parts: Tensor, tokens: Tokens, mass: float
    ) -> Nucleus:
        """Return `nucleus.find_nucleus`, after `reduce` gave logits and parts.

        Its collectives are once per chunk, by kernels once per tile of its rows.
        """

    def reduce_nucleus(
        self,
        hidden: Tensor,
        logits: Tensor | None,
        highest: Tensor,
        threshold: Tensor,
        tokens: Tokens,
    ) -> Tensor:
        """Return `nucleus.reduce_nucleus` of the chunk, [2, C], after `reduce` gave its logits."""

    def reduce_pair(self, a: States, b: States) -> Tensor:
        """Return `reduction.reduce_pair` of two policies, [6, P].

        The buffer of the logits that were passed in is not overwritten.
        """

    def gradient(
        self,
        hidden: Tensor,
        remains: Exponentials | Tensor | None,
        tokens: Tokens,
        merged: Merged,
        slopes: Slopes,
        nucleus: NucleusSlopes | None = None,
    ) -> Tensor:
        """Return d loss / d logits, [C, padded columns] in the dtype of `hidden`.

        remains: exponentials of `reduce_for_gradient` or logits of `reduce`, which may be
            overwritten; None: the logits are made again.
        nucleus: for a loss with the nucleus's entropy; `remains` are then not exponentials.
        """


def chunk_pass(head: Head, tokens: int) -> ChunkPass:
    """Return the implementation for a call of the head with so many tokens."""
    return TritonPass(head) if head.triton else TorchPass(head, tokens)


def shard_logits(hidden: Tensor, weight: Tensor, out: Tensor, mixed_products: bool) -> Tensor:
    """Write hidden [C, H] @ weight [padded columns, H]^T into `out` [C, padded columns]; return it.

    `out` is fp32 (fp64 for fp64 operands). Logits are not rounded to 16 bits: the KL between
    policies that are close would drown in the rounding. Without `mixed_products` (see `Head`)
    operands of 16 bits are widened, the weight a slice at a time.
    """
    if weight.dtype == out.dtype:
        return torch.mm(hidden, weight.t(), out=out)
    if mixed_products:
        return torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
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
        self._chunk, self._mixed_products = min(head.chunk, tokens), head.mixed_products
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

    def find_nucleus(
        self, hidden: Tensor, logits: Tensor | None, parts: Tensor, tokens: Tokens, mass: float
    ) -> Nucleus:
        return find_nucleus(logits, parts, tokens.temperature, self._shard, mass)

    def reduce_nucleus(
        self,
        hidden: Tensor,
        logits: Tensor | None,
        highest: Tensor,
        threshold: Tensor,
        tokens: Tokens,
    ) -> Tensor:
        return reduce_nucleus(logits, highest, threshold, tokens.temperature, self._shard)

    def gradient(
        self,
        hidden: Tensor,
        remains: Exponentials | Tensor | None,
        tokens: Tokens,
        merged: Merged,
        slopes: Slopes,
        nucleus: NucleusSlopes | None = None,
    ) -> Tensor:
        if isinstance(remains, Exponentials):
            gradient = exponentials_gradient(remains, tokens, merged, slopes, self._shard)
            return gradient.to(hidden.dtype)
        logits = self._logits(hidden) if remains is None else remains
        # A nucleus needs the logits afterwards, so it costs a tensor of their size.
        out = logits if nucleus is None else torch.empty_like(logits)
        gradient = logits_gradient(logits, tokens, merged, slopes, self._shard, out=out)
        if nucleus is not None:
            top, temperature = merged.top, tokens.temperature
            add_nucleus_gradient(gradient, logits, temperature, top, nucleus, self._shard)
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
        out = self._buffers[-1][: len(hidden)]
        return shard_logits(hidden, self._weight, out, self._mixed_products)


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

    def find_nucleus(
        self, hidden: Tensor, logits: Tensor | None, parts: Tensor, tokens: Tokens, mass: float
    ) -> Nucleus:
        found = Nucleus(*torch.empty_like(parts[:2]))
        # All ranks have equally many padded columns, so their tiles are the same rows.
        for rows in self._shard.tiles(len(hidden), len(self._weight)):
            tile = self._kernels.head_logits(hidden[rows], self._weight, self._shard.columns)
            part = find_nucleus(tile, parts[:, rows], tokens.temperature[rows], self._shard, mass)
            found.threshold[rows], found.entropy[rows] = part.threshold, part.entropy
        return found

    def reduce_nucleus(
        self,
        hidden: Tensor,
        logits: Tensor | None,
        highest: Tensor,
        threshold: Tensor,
        tokens: Tokens,
    ) -> Tensor:
        return self._kernels.reduce_head_nucleus(
            hidden, self._weight, highest, threshold, tokens.temperature, self._shard.columns
        )

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
        remains: Exponentials | Tensor | None,
        tokens: Tokens,
        merged: Merged,
        slopes: Slopes,
        nucleus: NucleusSlopes | None = None,
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
            nucleus,
        )
