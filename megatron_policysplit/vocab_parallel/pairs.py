"""Which pairs of tokens are reduced with which chunk of a call, so that logits are made twice only
where they must be.

A pair belongs to the chunk of its later token, the near one. If the other one, the far one, is in
that chunk too, nothing is made for it; else its logits are made from its hidden state, at most a
chunk of them at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """Pairs of tokens whose KL is wanted, in a call of T tokens: positions `first` and `second`,
    [P] int64 on the CPU.

    A position may be in any number of pairs. Positions from T on are of hidden [W, H] at
    temperature [W]: tokens of earlier calls. At least one token of each pair is of this call.
    """

    first: Tensor
    second: Tensor
    hidden: Tensor | None = None
    temperature: Tensor | None = None


@dataclass(frozen=True)
class Block:
    """Pairs that are reduced together, by their number in the plan's order; p of them.

    near [p]: rows of the chunk. far [p]: rows of the chunk, or of the tokens at `positions` [F] of
    the call, if they are others.
    """

    pairs: slice
    near: Tensor
    far: Tensor
    positions: Tensor | None = None


@dataclass(frozen=True)
class PairPlan:
    """Pairs in the order in which they are reduced: by chunk, then those within it, then by the far
    token's position.

    near, far [P]: positions. order [P]: the numbers that these pairs have in `Pairs`. swapped [P]
    bool: whether near is the pair's second. All on the CPU. bounds: where each chunk's pairs begin,
    and where the last one's end.
    """

    near: Tensor
    far: Tensor
    order: Tensor
    swapped: Tensor
    bounds: list[int]
    tokens: int
    chunk: int

    @classmethod
    def of(cls, pairs: Pairs, tokens: int, chunk: int) -> Self:
        """For a call of so many tokens in chunks of `chunk`. Raises ValueError for a pair without a
        token of it.
        """
        first, second = pairs.first, pairs.second
        swapped = (first >= tokens) | ((second < tokens) & (second > first))
        near, far = torch.where(swapped, second, first), torch.where(swapped, first, second)
        positions = tokens + (0 if pairs.hidden is None else len(pairs.hidden))
        if len(near) and not (
            0 <= int(torch.minimum(near, far).min()) and int(near.max()) < tokens > 0
        ):
            raise ValueError(f"a pair has no token of the {tokens} of this call")
        if len(far) and int(far.max()) >= positions:
            raise ValueError(f"a pair has a token at {int(far.max())}, of {positions}")
        number = near // chunk
        elsewhere = (far >= tokens) | (far // chunk != number)
        order = ((2 * number + elsewhere) * positions + far).argsort(stable=True)
        bounds = torch.searchsorted(number[order], torch.arange(-(-tokens // chunk) + 1)).tolist()
        return cls(near[order], far[order], order, swapped[order], bounds, tokens, chunk)

    def __len__(self) -> int:
        return len(self.order)

    def blocks(self, span: slice) -> Iterator[Block]:
        """Of the chunk at `span`."""
        begin, end = self.bounds[span.start // self.chunk :][:2]
        near, far = self.near[begin:end] - span.start, self.far[begin:end]
        within = int(((far >= span.start) & (far < span.stop)).sum())
        if within:
            yield Block(slice(begin, begin + within), near[:within], far[:within] - span.start)
        if within == len(far):
            return
        positions, rows = far[within:].unique_consecutive(return_inverse=True)
        near, most = near[within:], min(self.chunk, self.tokens)
        for start in range(0, len(positions), most):
            left, right = torch.searchsorted(rows, torch.tensor([start, start + most])).tolist()
            which = slice(begin + within + left, begin + within + right)
            yield Block(
                which, near[left:right], rows[left:right] - start, positions[start : start + most]
            )
