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
    """Dimensions of a decoder; `ffn` is the MLP's inner width, `vocab` is not padded.

    experts, expert_ffn: their number in each layer and the inner width of one; 0 in a dense model.
    """

    vocab: int
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool
    experts: int = 0
    expert_ffn: int = 0

    def of(self, dimension: str) -> int:
        """A table's dimension name as a number of elements."""
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
    """Block [start, stop) along `dim` of tensor `source`; it begins at `offset` along `dim` of the
    local one.
    """

    source: str
    dim: int
    start: int
    stop: int
    offset: int


Rule = Callable[["ParamMapping", Sizes, int, int], list[Piece]]


@dataclass(frozen=True)
class Source:
    """A Hugging Face tensor: its name (`*` stands for the layer, `#` for the expert) and its
    dimensions' names.
    """

    name: str
    dims: tuple[str, ...]

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        return tuple(sizes.of(dim) for dim in self.dims)


def source(name: str, *dims: str) -> Source:
    return Source(name, dims)


@dataclass(frozen=True)
class ParamMapping:
    """One row of a mapping table.

    megatron: names of the parameter: the local layer spec's and, where it differs, Transformer
    Engine's.
    sources: the Hugging Face tensors it holds. rule: how they are laid out over tensor-parallel
    ranks.
    expert: whose row it is, once that is known; None for a row that no expert owns.
    """

    rule: Rule
    megatron: tuple[str, ...]
    sources: tuple[Source, ...]
    expert: int | None = None

    @property
    def per_layer(self) -> bool:
        return "*" in self.megatron[0]

    @property
    def per_expert(self) -> bool:
        return "#" in self.megatron[0]

    def at(self, layer: int, expert: int | None = None) -> ParamMapping:
        """This row with the layer's number in place of `*`, and the expert's in place of `#`.

        Both are counted over the whole model.
        """

        def named(name: str) -> str:
            return name.replace("*", str(layer)).replace("#", str(expert))

        return replace(
            self,
            megatron=tuple(named(name) for name in self.megatron),
            sources=tuple(Source(named(src.name), src.dims) for src in self.sources),
            expert=expert,
        )

    def pieces(self, sizes: Sizes, rank: int, tensor: int) -> list[Piece]:
        """What tensor-parallel rank `rank` of `tensor` holds."""
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
    """The whole tensor on every rank."""
    return [Piece(mapping.sources[0].name, 0, 0, mapping.sources[0].shape(sizes)[0], 0)]


def vocab_parallel(mapping: ParamMapping, sizes: Sizes, rank: int, tensor: int) -> list[Piece]:
    """Equal shares of the padded vocabulary; padding rows, at the end, have no piece."""
    rows = sizes.padded_vocab(tensor) // tensor
    start = min(rank * rows, sizes.vocab)
    stop = min(start + rows, sizes.vocab)
    return [Piece(mapping.sources[0].name, 0, start, stop, 0)] if stop > start else []


def row_parallel(mapping: ParamMapping, sizes: Sizes, rank: int, tensor: int) -> list[Piece]:
    """Equal shares of the input dimension (row-parallel linear)."""
    width = mapping.sources[0].shape(sizes)[1] // tensor
    return [Piece(mapping.sources[0].name, 1, rank * width, (rank + 1) * width, 0)]


def gate_up(mapping: ParamMapping, sizes: Sizes, rank: int, tensor: int) -> list[Piece]:
    """Each rank's share of the gate above its share of the up projection."""
    rows = mapping.sources[0].shape(sizes)[0] // tensor
    return [
        Piece(src.name, 0, rank * rows, (rank + 1) * rows, index * rows)
        for index, src in enumerate(mapping.sources)
    ]


def qkv(mapping: ParamMapping, sizes: Sizes, rank: int, tensor: int) -> list[Piece]:
    """Query groups one after the other: the group's query heads, its key head, its value head."""
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
