"""How torch_dist stores the parameters of the mapping tables: keys, shapes, and what a checkpoint must hold."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from checkpoints_conv.architectures import architecture_of
from checkpoints_conv.mapping import Pair, Sizes, vocab_rows

LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Parameter:
    """A Megatron parameter of the whole model, unsharded.

    pair: its row of the mapping table. shape: without padding of the vocabulary. layer: its number, None outside
    the layers. key: of the tensor that holds this parameter of all `layers` layers along a first axis (of this one
    alone outside the layers). layer_key: of a tensor of its own, as Megatron-Core writes it for unequal layers.
    """

    pair: Pair
    shape: tuple[int, ...]
    layer: int | None
    layers: int
    key: str
    layer_key: str

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def is_vocabulary(self) -> bool:
        """Whether rows of padding may follow those of the vocabulary."""
        return self.pair.rule is vocab_rows

    @property
    def stacked_shape(self) -> tuple[int, ...]:
        """Shape of the tensor stored under `key`."""
        return self.shape if self.layer is None else (self.layers, *self.shape)


def parameters_of(hf_config: Mapping[str, Any]) -> list[Parameter]:
    """Every parameter of the model, in the order of Hugging Face's tensors; a tied head is left out."""
    architecture = architecture_of(hf_config)
    sizes = architecture.sizes(hf_config)
    return [_parameter(pair, layer, sizes) for layer, part in architecture.pairs(hf_config) for pair in part]


def extra_state_keys(hf_config: Mapping[str, Any]) -> list[str]:
    """Keys of the (empty) extra states that layers of Megatron-Core ask a checkpoint for.

    Its own layers have them for the four linear maps. Transformer Engine's have them for attention and norms, too.
    """
    architecture = architecture_of(hf_config)
    layers = architecture.sizes(hf_config).layers
    modules = ["self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"]
    modules.append("self_attention.core_attention")
    if architecture.qk_norm:
        modules += ["self_attention.q_layernorm", "self_attention.k_layernorm"]
    keys = [f"decoder.layers.{module}._extra_state/shard_{n}_{layers}" for module in modules for n in range(layers)]
    return [*keys, "decoder.final_layernorm._extra_state/shard_0_1"]


def _parameter(pair: Pair, layer: int | None, sizes: Sizes) -> Parameter:
    name = pair.megatron[-1]  # Megatron-Core stores under Transformer Engine's names, whatever the layers are
    match = LAYER.fullmatch(name)
    key = f"decoder.layers.{match[2]}" if match else name
    return Parameter(pair, pair.local_shape(sizes, 1), layer, sizes.layers, key, name)
