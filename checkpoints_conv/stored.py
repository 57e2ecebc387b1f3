"""How torch_dist stores the parameters of the mapping tables: keys, shapes and extra states."""

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
    """Where a checkpoint stores a parameter, or some of its rows.

    The stored tensor may stack layers, or layers and experts, along axes before the parameter's
    own.
    """

    key: str  # of the stored tensor
    index: tuple[int, ...]  # position along the stacking axes: (layer, expert), one of them, or ()
    axes: tuple[int, ...]  # lengths of the stacking axes
    start: int  # the parameter's rows [start, stop) are here
    stop: int


@dataclass(frozen=True, eq=False)
class Parameter:
    """A Megatron parameter of one layer (and of one expert, if it is an expert's), unsharded.

    Made by `list_parameters`. Megatron-Core stores a parameter in one of several forms:

    - all layers (and experts) stacked along the first axes of one tensor, the form written here;
    - a tensor for each layer, its experts stacked (`non_homogeneous_layers`);
    - a tensor for each matrix, gate and up projection apart (`singleton_local_shards`).
    """

    mapping: ParamMapping  # its row of the mapping table
    shape: tuple[int, ...]  # without padding of the vocabulary
    forms: tuple[tuple[Place, ...], ...]  # its places in each form, the written form first
    # Whether it is a second copy of another's values, for layers that look for them there.
    copy: bool = False

    @property
    def place(self) -> Place:
        """The place where the whole parameter is written."""
        return self.forms[0][0]

    @property
    def numel(self) -> int:
        """Number of elements, without padding."""
        return prod(self.shape)

    @property
    def is_vocabulary(self) -> bool:
        """Whether rows of padding may follow those of the vocabulary."""
        return self.mapping.rule is vocab_parallel


def list_parameters(hf_config: Mapping[str, Any]) -> list[Parameter]:
    """List every parameter of the model, in the order of Hugging Face's tensors.

    A tied head is left out. A copy follows its original.
    """
    architecture = find_architecture(hf_config)
    sizes = architecture.sizes(hf_config)
    parameters = []
    for layer, part in architecture.mappings(hf_config):
        for mapping in part:
            parameters.append(_parameter(mapping, layer, sizes))
            # `replicated` is looked at first because it costs less than the numbering by `at`.
            if (
                mapping.rule is replicated
                and layer is not None
                and mapping.megatron == MOE_NORM.at(layer).megatron
            ):
                # Megatron-Core's own layers look for it where a dense model has it.
                parameters.append(replace(_parameter(MLP_NORM.at(layer), layer, sizes), copy=True))
    return parameters


def extra_state_keys(hf_config: Mapping[str, Any]) -> list[str]:
    """Keys of the empty extra states that layers of Megatron-Core ask a checkpoint for.

    Megatron-Core's own layers have them for linear maps, Transformer Engine's for norms, too.
    """
    architecture = find_architecture(hf_config)
    sizes = architecture.sizes(hf_config)
    attention = ["self_attention.linear_qkv", "self_attention.linear_proj"]
    if architecture.qk_norm:
        attention += ["self_attention.q_layernorm", "self_attention.k_layernorm"]
    axes = {f"{LAYERS}{module}": (sizes.layers,) for module in attention}
    mlp, mlp_axes = "mlp", (sizes.layers,)
    if architecture.moe:
        axes[f"{LAYERS}pre_mlp_layernorm"] = (sizes.layers,)
        mlp, mlp_axes = "mlp.experts.experts", (sizes.layers, sizes.experts)
    axes |= {f"{LAYERS}{mlp}.{linear}": mlp_axes for linear in ("linear_fc1", "linear_fc2")}
    axes["decoder.final_layernorm"] = (1,)
    return [
        f"{module}._extra_state/shard_{'.'.join(map(str, index))}_{'.'.join(map(str, lengths))}"
        for module, lengths in axes.items()
        for index in product(*map(range, lengths))
    ]


def _parameter(mapping: ParamMapping, layer: int | None, sizes: Sizes) -> Parameter:
    """The parameter of a row of the table, with its places in every form."""
    shape = mapping.local_shape(sizes, 1)
    if layer is None:
        return Parameter(mapping, shape, (_whole(mapping.megatron[-1], shape),))
    # Megatron-Core stores under Transformer Engine's names, whatever the layers are; experts under
    # names of their own.
    stacked = single = mapping.megatron[-1].removeprefix(f"{LAYERS}{layer}.")
    layers, experts = (layer, sizes.layers), ()
    if mapping.expert is not None:
        name = mapping.megatron[0].removeprefix(f"{LAYERS}{layer}.")
        module, matrix = name.split(f"local_experts.{mapping.expert}.")
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
    """The form with a parameter in one place. axes: (index, length) of each stacking axis."""
    index, lengths = tuple(index for index, _ in axes), tuple(length for _, length in axes)
    return (Place(key, index, lengths, 0, shape[0]),)


@dataclass(frozen=True)
class Chunk:
    """Rows of a parameter that are written at once. Made by `hf_to_megatron.list_chunks`."""

    parameter: Parameter
    offset: int  # of the first row in the parameter; its other axes are whole
    rows: int
    pieces: tuple[Piece, ...]  # the blocks of Hugging Face tensors that make it up
    dtype: str  # float32, bfloat16 or float16

    @property
    def shape(self) -> tuple[int, ...]:
        """[rows, *the parameter's other axes]."""
        return (self.rows, *self.parameter.shape[1:])

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return prod(self.shape) * BYTES[self.dtype]
