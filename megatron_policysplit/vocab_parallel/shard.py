"""Which columns of the vocabulary a rank holds, and the one collective by which ranks learn of each
other's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabularyShard:
    """Columns [start, start + columns) of the vocabulary are this rank's; later columns of its
    logits are padding.
    """

    start: int
    columns: int
    group: dist.ProcessGroup | None

    @classmethod
    def of(
        cls, vocab_size: int, padded_columns: int, rank: int, group: dist.ProcessGroup | None
    ) -> VocabularyShard:
        """The shard of `rank` when each rank holds `padded_columns` columns of the padded
        vocabulary.
        """
        start = rank * padded_columns
        return cls(start, max(0, min(padded_columns, vocab_size - start)), group)

    @property
    def ranks(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)


class Gathering:
    """An all-gather under way: the ranks' `parts`, of one dtype, in one collective. The merging is
    up to the caller.
    """

    def __init__(self, parts: Sequence[Tensor], shard: VocabularyShard):
        self._shapes = [part.shape for part in parts]
        mine = torch.cat([part.reshape(-1) for part in parts])
        self._work = None
        if shard.ranks == 1 or not len(mine):
            self._all = mine.expand(shard.ranks, -1)
        else:
            self._all = mine.new_empty(shard.ranks, len(mine))
            self._work = dist.all_gather(
                list(self._all.unbind()), mine, group=shard.group, async_op=True
            )

    def wait(self) -> list[Tensor]:
        """Every part with the ranks as a new first dimension, in rank order."""
        if self._work is not None:
            self._work.wait()
        pieces = self._all.split([shape.numel() for shape in self._shapes], dim=1)
        return [
            piece.reshape(len(self._all), *shape)
            for piece, shape in zip(pieces, self._shapes, strict=True)
        ]


@dataclass(frozen=True)
class Head:
    """A rank's shard of the LM head: weight [padded columns, H], chunk: tokens whose logits exist
    at a time.

    reduces_hidden: backward sums the gradient of the hidden states over the ranks (one all-reduce).
    Off where the hidden states come from `gather_sequence`, whose backward sums and scatters.
    triton: by kernels that hold no logits (a GPU, operands of at most 32 bits).
    """

    weight: Tensor
    shard: VocabularyShard
    chunk: int
    reduces_hidden: bool = True
    triton: bool = False

    def chunks(self, tokens: int) -> Iterator[slice]:
        return (
            slice(start, min(start + self.chunk, tokens)) for start in range(0, tokens, self.chunk)
        )

    def sum_over_ranks(self, grad_hidden: Tensor) -> Tensor:
        """The gradient of the hidden states [T, H], of which each rank has its columns' part, in
        place.
        """
        if self.reduces_hidden and self.shard.ranks > 1:
            dist.all_reduce(grad_hidden, group=self.shard.group)
        return grad_hidden
