"""A rank's columns of the vocabulary and of the LM head, and the all-gather that joins ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

TILE_ELEMENTS = 2**18  # 1 MiB in fp32: a tile and its temporary tensors stay in a CPU's cache


@dataclass(frozen=True)
class VocabularyShard:
    """The columns of the vocabulary on this rank; later columns of its logits are padding."""

    start: int  # global id of the first column
    columns: int  # columns that are not padding; 0 where the whole shard is padding
    group: dist.ProcessGroup | None  # tensor-parallel group; None without tensor parallelism
    tile_elements: int = TILE_ELEMENTS  # logits that elementwise work takes at a time

    @classmethod
    def of(
        cls,
        vocab_size: int,
        padded_columns: int,
        rank: int,
        group: dist.ProcessGroup | None,
        tile_elements: int = TILE_ELEMENTS,
    ) -> VocabularyShard:
        """The shard of `rank` if each rank holds `padded_columns` of the padded vocabulary."""
        start = rank * padded_columns
        columns = max(0, min(padded_columns, vocab_size - start))
        return cls(start, columns, group, tile_elements)

    def tiles(self, rows: int, width: int) -> Iterator[slice]:
        """Slices of `rows` rows of logits, `width` wide, that have about `tile_elements` each."""
        height = max(1, self.tile_elements // max(1, width))
        return (slice(start, min(start + height, rows)) for start in range(0, rows, height))

    @property
    def ranks(self) -> int:
        """Ranks that share the vocabulary."""
        return 1 if self.group is None else dist.get_world_size(self.group)


class Gathering:
    """An all-gather under way: `parts` of every rank, all of one dtype, in one collective.

    It begins when the object is made; `wait` gives the result. The caller merges the parts.
    """

    def __init__(self, parts: Sequence[Tensor], shard: VocabularyShard):
        self._shapes = [part.shape for part in parts]
        flat = torch.cat([part.reshape(-1) for part in parts])
        self._work = None
        # All ranks pass parts of the same sizes, so all of them skip an empty collective.
        if shard.ranks == 1 or not len(flat):
            self._all = flat.expand(shard.ranks, -1)
        else:
            self._all = flat.new_empty(shard.ranks, len(flat))
            self._work = dist.all_gather(
                list(self._all.unbind()), flat, group=shard.group, async_op=True
            )

    def wait(self) -> list[Tensor]:
        """Return every part with the ranks as a new first dimension, in rank order."""
        if self._work is not None:
            self._work.wait()
        pieces = self._all.split([shape.numel() for shape in self._shapes], dim=1)
        return [
            piece.reshape(len(self._all), *shape)
            for piece, shape in zip(pieces, self._shapes, strict=True)
        ]


@dataclass(frozen=True)
class Head:
    """A rank's shard of the LM head. `PolicyModel.head` makes it."""

    weight: Tensor  # [padded columns, H]
    shard: VocabularyShard
    chunk: int  # tokens whose logits exist at a time
    # Whether backward sums the gradient of the hidden states over the ranks (one all-reduce). Off
    # under sequence parallelism, where the backward of `PolicyModel.whole` sums and scatters it.
    reduces_hidden: bool = True
    # Whether kernels that hold no logits do the work: a GPU, operands of at most 32 bits.
    triton: bool = False
    # Whether torch.mm and torch.addmm can write and add the product of matrices of 16 bits to a
    # matrix of 32 bits (`out_dtype`): a GPU and torch 2.10.
    mixed_products: bool = False

    def chunks(self, tokens: int) -> Iterator[slice]:
        """The chunks of a call with so many tokens, in order."""
        return (
            slice(start, min(start + self.chunk, tokens)) for start in range(0, tokens, self.chunk)
        )

    def sum_over_ranks(self, grad_hidden: Tensor) -> Tensor:
        """Sum the gradient of the hidden states [T, H] over the ranks, in place (one all-reduce).

        Each rank has the part that comes through its own columns.
        """
        if self.reduces_hidden and self.shard.ranks > 1:
            dist.all_reduce(grad_hidden, group=self.shard.group)
        return grad_hidden
