"""Rules by which Hugging Face tensors make up one tensor-parallel rank's Megatron-Core parameter.

A rule answers with `Piece`s: which block of which Hugging Face tensor lies where in the local
parameter. The same pieces read a checkpoint (copy source to local) and write one (copy local to
source). Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Sizes:
    """Dimensions of a decoder. Made of a config.json by `Architecture.sizes`."""

    vocab: int  # rows of the embedding, without padding
    hidden: int
    ffn: int  # inner width of the MLP
    layers: int
    heads: int  # query heads
    kv_heads: int  # key and value heads
    head_dim: int
    tied: bool  # whether the head is the embedding
    experts: int = 0  # in each layer; 0 in a dense model
    expert_ffn: int = 0  # inner width of one expert; 0 in a dense model

    def of(self, dimension: str) -> int:
        """The number of elements of a dimension that a table names."""
        return {
            "vocab": self.vocab,
            "hidden": self.hidden,
            "ffn": self.ffn,
            "query": self.heads * self.head_dim,
            "kv": self.kv_heads * self.head_dim,
            "head": self.head_dim,
            "experts": self.experts,
            "expert_ffn": self.expert_ffn,
        }[dimension]

    def padded_vocab(self, tensor: int) -> int:
        """The vocabulary rounded up to a multiple of the tensor-parallel size."""
        return -(-self.vocab // tensor) * tensor


@dataclass(frozen=True)
class Piece:
    """A block of a Hugging Face tensor and its position in a rank's local parameter."""

    source: str  # name of the Hugging Face tensor
    dim: int  # the dimension along which the block is cut; the others are whole
    start: int  # the block is [start, stop) along `dim` of the source
    stop: int
    offset: int  # where the block begins along `dim` of the local parameter


# (row of the table, sizes, tensor-parallel rank, tensor-parallel size) -> what the rank holds
Rule = Callable[["ParamMapping", Sizes, int, int], list[Piece]]


@dataclass(frozen=True)
class Source:
    """A Hugging Face tensor of a mapping table."""

    name: str  # `*` stands for the layer, `#` for the expert
    dims: tuple[str, ...]  # names of its dimensions, see `Sizes.of`

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return tuple(sizes.of(dim) for dim in self.dims)


def source(name: str, *dims: str) -> Source:
    """A `Source`, as the tables write it: the name, then a name for each dimension."""
    return Source(name, dims)


@dataclass(frozen=True)
class ParamMapping:
    """One row of a mapping table: a Megatron-Core parameter and the tensors that make it up."""

    rule: Rule  # how the sources are laid out over tensor-parallel ranks
    # The parameter's names: the local layer spec's and, where it differs, Transformer Engine's.
    megatron: tuple[str, ...]
    sources: tuple[Source, ...]  # the Hugging Face tensors it holds
    expert: int | None = None  # set by `at`; None for a row that no expert owns

    @property
    def per_layer(self) -> bool:
        """Whether the row stands for one parameter in each layer."""
        return "*" in self.megatron[0]

    @property
    def per_expert(self) -> bool:
        """Whether the row stands for one parameter in each expert."""
        return "#" in self.megatron[0]

    def at(self, layer: int, expert: int | None = None) -> ParamMapping:
        """This row with the layer's number in place of `*`, and the expert's in place of `#`.

        Both are counted over the whole model.
        """

        def numbered(name: str) -> str:
            return name.replace("*", str(layer)).replace("#", str(expert))

        return replace(
            self,
            megatron=tuple(numbered(name) for name in self.megatron),
            sources=tuple(Source(numbered(src.name), src.dims) for src in self.sources),
            expert=expert,
        )

    def pieces(self, sizes: Sizes, rank: int, tensor: int) -> list[Piece]:
        """The blocks that tensor-parallel rank `rank` of `tensor` ranks holds."""
        return self.rule(self, sizes, rank, tensor)

    def local_shape(self, sizes: Sizes, tensor: int) -> tuple[int, ...]:
        """Shape of the parameter on each of `tensor` ranks (the vocabulary padded)."""
        shape = list(self.sources[0].shape(sizes))
        if self.rule is vocab_parallel:
            shape[0] = sizes.padded_vocab(tensor) // tensor
        elif self.rule is row_parallel:
            shape[1] //= tensor
        elif self.rule in (qkv, gate_up):
            shape[0] = sum(src.shape(sizes)[0] for src in self.sources) // tensor
        return tuple(shape)


def replicated(mapping: ParamMapping, sizes: Sizes, rank: int, tensor: int) -> list[Piece]:
    """Give every rank the whole tensor."""
    return [Piece(mapping.sources[0].name, 0, 0, mapping.sources[0].shape(sizes)[0], 0)]


def vocab_parallel(mapping: ParamMapping, sizes: Sizes, rank: int, tensor: int) -> list[Piece]:
    """Give each rank an equal share of the padded vocabulary; padding, at the end, has no piece."""
    rows = sizes.padded_vocab(tensor) // tensor
    start = min(rank * rows, sizes.vocab)
    stop = min(start + rows, sizes.vocab)
    # A small vocabulary over many ranks can leave the last ones nothing but padding.
    return [Piece(mapping.sources[0].name, 0, start, stop, 0)] if stop > start else []


def row_parallel(mapping: ParamMapping, sizes: Sizes, rank: int, tensor: int) -> list[Piece]:
    """Give each rank an equal share of the input dimension (row-parallel linear)."""
    width = mapping.sources[0].shape(sizes)[1] // tensor
    return [Piece(mapping.sources[0].name, 1, rank * width, (rank + 1) * width, 0)]


def gate_up(mapping: ParamMapping, sizes: Sizes, rank: int, tensor: int) -> list[Piece]:
    """Give each rank its share of the gate projection above its share of the up projection."""
    rows = mapping.sources[0].shape(sizes)[0] // tensor
    return [
        Piece(src.name, 0, rank * rows, (rank + 1) * rows, index * rows)
        for index, src in enumerate(mapping.sources)
    ]


def qkv(mapping: ParamMapping, sizes: Sizes, rank: int, tensor: int) -> list[Piece]:
    """Give each rank an equal share of the query groups, one group after the other.

    A group is its query heads, its key head and its value head, in this order.
    """
    groups = sizes.kv_heads // tensor
    query_rows = sizes.heads // sizes.kv_heads * sizes.head_dim
    pieces, offset = [], 0
    for group in range(rank * groups, (rank + 1) * groups):
        for src, rows in zip(
            mapping.sources, (query_rows, sizes.head_dim, sizes.head_dim), strict=True
        ):
            pieces.append(Piece(src.name, 0, group * rows, (group + 1) * rows, offset))
            offset += rows
    return pieces
