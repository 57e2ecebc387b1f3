"""Plans which pairs of tokens are reduced with which chunk, so that few logits are made twice.

The later token of a pair is its near token, the earlier one its far token; a token of an earlier
call is always the far one. A pair belongs to the chunk of its near token. If the far token is in
that chunk too, its logits exist already; else they are made from its hidden state, at most a chunk
of them at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """P pairs of tokens whose KL is computed in a call of `head.score` with T tokens.

    A position may be in any number of pairs. Positions below T are tokens of the call, those from T
    on are tokens of earlier calls. At least one token of each pair is of this call.
    """

    first: Tensor  # [P] int64 on the CPU: positions
    second: Tensor  # [P] int64 on the CPU: positions
    hidden: Tensor | None = None  # [W, H] of the W tokens of earlier calls
    temperature: Tensor | None = None  # [W] of the same tokens


@dataclass(frozen=True)
class Block:
    """p pairs of one chunk that are reduced together."""

    pairs: slice  # their places in the plan's order
    near: Tensor  # [p]: rows of the chunk
    far: Tensor  # [p]: rows of the chunk or, with `positions`, of the tokens at these
    positions: Tensor | None = None  # [F]: positions of far tokens outside of the chunk


@dataclass(frozen=True)
class PairPlan:
    """The pairs of a call in the order in which they are reduced; tensors are on the CPU.

    Sorted by chunk; within a chunk the pairs that lie in it come first, then the others by the far
    token's position.
    """

    near: Tensor  # [P]: positions of the near tokens
    far: Tensor  # [P]: positions of the far tokens
    order: Tensor  # [P]: the pairs' indices in `Pairs`
    swapped: Tensor  # [P] bool: whether the near token is the pair's second
    bounds: list[int]  # where each chunk's pairs begin, and where the last chunk's end
    tokens: int  # of the call
    chunk: int  # tokens of a chunk

    @classmethod
    def of(cls, pairs: Pairs, tokens: int, chunk: int) -> Self:
        """Plan `pairs` for a call of `tokens` tokens in chunks of `chunk`.

        Raises ValueError for a pair without a token of this call and for an unknown position.
        """
        first, second = pairs.first, pairs.second
        swapped = (first >= tokens) | ((second < tokens) & (second > first))
        near, far = torch.where(swapped, second, first), torch.where(swapped, first, second)
        # Positions of both kinds of tokens, of this call and of earlier ones.
        positions = tokens + (0 if pairs.hidden is None else len(pairs.hidden))
        if len(near) and not (
            0 <= int(torch.minimum(near, far).min()) and int(near.max()) < tokens > 0
        ):
            raise ValueError(f"a pair has no token of the {tokens} of this call")
        if len(far) and int(far.max()) >= positions:
            raise ValueError(f"a pair has a token at {int(far.max())}, of {positions}")
        number = near // chunk
        is_outside = (far >= tokens) | (far // chunk != number)
        # One integer key for (chunk, far token outside of it, far token's position).
        order = ((2 * number + is_outside) * positions + far).argsort(stable=True)
        bounds = torch.searchsorted(number[order], torch.arange(-(-tokens // chunk) + 1)).tolist()
        return cls(near[order], far[order], order, swapped[order], bounds, tokens, chunk)

    def __len__(self) -> int:
        return len(self.order)

    def blocks(self, span: slice) -> Iterator[Block]:
        """The pairs of the chunk at `span`: those within it, then the others in several blocks."""
        begin, end = self.bounds[span.start // self.chunk :][:2]
        near, far = self.near[begin:end] - span.start, self.far[begin:end]
        within = int(((far >= span.start) & (far < span.stop)).sum())
        if within:
            yield Block(slice(begin, begin + within), near[:within], far[:within] - span.start)
        if within == len(far):
            return
        # Far tokens ascend, so equal ones stand together: the logits of each are made once a chunk.
        positions, rows = far[within:].unique_consecutive(return_inverse=True)
        near, limit = near[within:], min(self.chunk, self.tokens)
        for start in range(0, len(positions), limit):
            left, right = torch.searchsorted(rows, torch.tensor([start, start + limit])).tolist()
            pairs = slice(begin + within + left, begin + within + right)
            yield Block(
                pairs, near[left:right], rows[left:right] - start, positions[start : start + limit]
            )
