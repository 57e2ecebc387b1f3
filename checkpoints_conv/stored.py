"""How torch_dist stores the parameters of the mapping tables: keys, shapes, and what a checkpoint
must hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any

from checkpoints_conv.architectures import find_architecture
from checkpoints_conv.dtypes import BYTES
from checkpoints_conv.mapping import ParamMapping, Piece, Sizes, gate_up, replicated, vocab_parallel
from checkpoints_conv.tables import MLP_NORM, MOE_NORM

LAYERS = "decoder.layers."


@dataclass(frozen=True)
class Place:
    """Rows [start, stop) of a parameter in the tensor `key` of a checkpoint.

    index, axes: where on, and how long, the axes before the parameter's own are: (layer, expert),
    one of them, or none.
    """

    key: str
    index: tuple[int, ...]
    axes: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Parameter:
    """A Megatron parameter of the whole model, unsharded: one layer's, and one expert's if it is
    one of experts.

    mapping: its row of the mapping table. shape: without padding of the vocabulary. forms: the ways in
    which Megatron-Core stores it, the one in which it is written first: all layers (and experts)
    stacked along first axes of one tensor; a tensor for each layer, its experts stacked
    (`non_homogeneous_layers`); a tensor for each matrix, gate and up projection apart
    (`singleton_local_shards`).
    copy: whether the same values are stored once more under another key, as layers of another kind
    look for them.
    """

    mapping: ParamMapping
    shape: tuple[int, ...]
    forms: tuple[tuple[Place, ...], ...]
    copy: bool = False

    @property
    def place(self) -> Place:
        """Where it is written, whole."""
        return self.forms[0][0]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def is_vocabulary(self) -> bool:
        """Whether rows of padding may follow those of the vocabulary."""
        return self.mapping.rule is vocab_parallel


def list_parameters(hf_config: Mapping[str, Any]) -> list[Parameter]:
    """Every parameter of the model, in the order of Hugging Face's tensors; a tied head is left
    out.
    """
    architecture = find_architecture(hf_config)
    sizes = architecture.sizes(hf_config)
    parameters = []
    for layer, part in architecture.mappings(hf_config):
        for mapping in part:
            parameters.append(_parameter(mapping, layer, sizes))
            if (
                mapping.rule is replicated
                and layer is not None
                and mapping.megatron == MOE_NORM.at(layer).megatron
            ):
                # Megatron-Core's own layers look for it where a dense model has it.
                parameters.append(replace(_parameter(MLP_NORM.at(layer), layer, sizes), copy=True))
    return parameters


def extra_state_keys(hf_config: Mapping[str, Any]) -> list[str]:
    """Keys of the (empty) extra states that layers of Megatron-Core ask a checkpoint for.

    Its own layers have them for linear maps. Transformer Engine's have them for norms, too.
    """
    architecture = find_architecture(hf_config)
    sizes = architecture.sizes(hf_config)
    attention = ["self_attention.linear_qkv", "self_attention.linear_proj"]
    if architecture.qk_norm:
        attention += ["self_attention.q_layernorm", "self_attention.k_layernorm"]
    axes = {f"{LAYERS}{module}": (sizes.layers,) for module in attention}
    if architecture.moe:
        axes[f"{LAYERS}pre_mlp_layernorm"] = (sizes.layers,)
    experts, mlp = (
        ((sizes.layers, sizes.experts), "mlp.experts.experts")
        if architecture.moe
        else ((sizes.layers,), "mlp")
    )
    axes |= {f"{LAYERS}{mlp}.{linear}": experts for linear in ("linear_fc1", "linear_fc2")}
    axes["decoder.final_layernorm"] = (1,)
    return [
        f"{module}._extra_state/shard_{'.'.join(map(str, index))}_{'.'.join(map(str, lengths))}"
        for module, lengths in axes.items()
        for index in product(*map(range, lengths))
    ]


def _parameter(mapping: ParamMapping, layer: int | None, sizes: Sizes) -> Parameter:
    shape = mapping.local_shape(sizes, 1)
    if layer is None:
        return Parameter(mapping, shape, (_whole(mapping.megatron[-1], shape),))
    # Megatron-Core stores under Transformer Engine's names, whatever the layers are; experts under
    # names of their own.
    stacked = single = mapping.megatron[-1].removeprefix(f"{LAYERS}{layer}.")
    layers, experts = (layer, sizes.layers), ()
    if mapping.expert is not None:
        module, matrix = (
            mapping.megatron[0]
            .removeprefix(f"{LAYERS}{layer}.")
            .split(f"local_experts.{mapping.expert}.")
        )
        stacked, single = f"{module}experts.{matrix}", f"{module}experts.{mapping.expert}.{matrix}"
        experts = ((mapping.expert, sizes.experts),)
    forms = [
        _whole(f"{LAYERS}{stacked}", shape, layers, *experts),
        _whole(f"{LAYERS}{layer}.{stacked}", shape, *experts),
    ]
    if mapping.rule is gate_up:
        key, half = f"{LAYERS}{layer}.{single}", shape[0] // 2
        forms.append(
            (Place(f"{key}_w", (), (), 0, half), Place(f"{key}_v", (), (), half, shape[0]))
        )
    elif experts:
        forms.append(_whole(f"{LAYERS}{layer}.{single}", shape))
    return Parameter(mapping, shape, tuple(forms))


def _whole(key: str, shape: tuple[int, ...], *axes: tuple[int, int]) -> tuple[Place]:
    """All of a parameter; axes: (index, length) each."""
    return (
        Place(
            key, tuple(index for index, _ in axes), tuple(length for _, length in axes), 0, shape[0]
        ),
    )


@dataclass(frozen=True)
class Chunk:
    """A block of a stored parameter that is written at once: `pieces` of Hugging Face tensors that
    make it up.

    offset, rows: along the parameter's first axis; other axes are whole. dtype: float32, bfloat16
    or float16.
    """

    parameter: Parameter
    offset: int
    rows: int
    pieces: tuple[Piece, ...]
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, *self.parameter.shape[1:])

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * BYTES[self.dtype]
