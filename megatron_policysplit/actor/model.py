"""The policy: Megatron-Core's GPTModel from a Hugging Face config, ending at the hidden states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from torch import Tensor

from checkpoints_conv import find_architecture
from checkpoints_conv.rope import Llama3Rope
from megatron_policysplit.actor.attention import CoreAttention
from megatron_policysplit.actor.gradient_fusion import idle_output_layer
from megatron_policysplit.actor.megatron_on_cpu import model_options
from megatron_policysplit.config.model_layout import check_layout
from megatron_policysplit.vocab_parallel import TILE_ELEMENTS, Head, VocabularyShard


class PolicyModel(GPTModel):
    """A pipeline stage whose forward returns hidden states instead of logits.

    forward(input_ids[b, s], position_ids[b, s], attention_mask) -> hidden[s, b, h]; on the last
    stage they have passed the final norm. `vocab_parallel` computes statistics and losses from them
    with `head`. `vocab_size` is the true one, `padded_vocab_size` a multiple of TP.
    """

    def __init__(
        self, *, vocab_size: int, tensor: int, llama3_rope: Llama3Rope | None, **arguments: Any
    ):
        padded = -(-vocab_size // tensor) * tensor  # rounded up
        super().__init__(vocab_size=padded, **arguments)
        self.vocab_size = vocab_size
        self.padded_vocab_size = padded
        if llama3_rope is not None:
            # Megatron's constructor takes only the factor of Llama 3's scaling; the other three
            # numbers come from the model's config too.
            rope = self.rotary_pos_emb
            rope.inv_freq = rope._apply_scaling(
                rope.inv_freq,
                factor=llama3_rope.factor,
                low_freq_factor=llama3_rope.low_freq_factor,
                high_freq_factor=llama3_rope.high_freq_factor,
                original_max_position_embeddings=llama3_rope.original_max_position_embeddings,
            )

    def _postprocess(self, hidden_states: Tensor, **unused: Any) -> Tensor:
        # Megatron's own makes logits of all tokens here, which is what we avoid.
        return hidden_states

    def head(
        self,
        chunk: int,
        *,
        triton: bool = False,
        mixed_products: bool = False,
        tile_elements: int = TILE_ELEMENTS,
    ) -> Head:
        """Return this tensor-parallel rank's shard of the LM head, tied or not; last stage only.

        Its rows are [tp_rank * n, (tp_rank + 1) * n) of the vocabulary with n = padded_vocab_size /
        TP; those at or past `vocab_size` are padding. chunk: tokens whose logits exist at a time.
        triton, mixed_products, tile_elements: see `Head` and `VocabularyShard`.
        """
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        group = parallel_state.get_tensor_model_parallel_group()
        rank = parallel_state.get_tensor_model_parallel_rank()
        shard = VocabularyShard.of(self.vocab_size, len(weight), rank, group, tile_elements)
        # Under sequence parallelism the backward of `whole` sums the gradients of hidden states.
        return Head(
            weight,
            shard,
            chunk,
            reduces_hidden=not self.config.sequence_parallel,
            triton=triton,
            mixed_products=mixed_products,
        )

    def whole(self, hidden: Tensor) -> Tensor:
        """Return the hidden states [s, b, h] of all tokens.

        Under sequence parallelism this rank has [s / TP, b, h] of them: forward all-gathers over
        the tensor-parallel group, backward reduce-scatters. Else they are returned as they are.
        """
        if not self.config.sequence_parallel:
            return hidden
        return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)


class _RMSNorm:
    """torch's RMSNorm for sequence parallelism, without Transformer Engine.

    Each rank sees a part of the tokens, so the gradients of the norm's weight must be summed over
    the tensor-parallel group. Megatron does that for weights with the mark `sequence_parallel`;
    its own wrapper of torch's RMSNorm sets no mark and refuses sequence parallelism.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any):
        norm = torch.nn.RMSNorm(hidden_size, eps=eps)
        norm.weight.sequence_parallel = True
        return norm


def _layer_spec(
    config: TransformerConfig, transformer_engine: bool
) -> ModuleSpec | TransformerBlockSubmodules:
    """The layers that the model is made of."""
    if not transformer_engine:
        return _local_spec(config)
    return get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
    )


def _local_spec(config: TransformerConfig) -> TransformerBlockSubmodules:
    """Build the spec of Megatron's own layers, without Transformer Engine.

    Experts are computed one after the other.
    """
    experts, qk_layernorm = config.num_moe_experts, config.qk_layernorm
    spec = get_gpt_layer_local_spec(
        num_experts=experts, qk_layernorm=qk_layernorm, normalization="RMSNorm"
    )
    if experts:
        # The norm before experts is stored in checkpoints as Transformer Engine's layers store it,
        # not as in a dense layer.
        spec.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    attention.core_attention = CoreAttention
    layers = [spec] * get_num_layers_to_build(config)
    if not config.sequence_parallel:
        # The last norm is named too: left to itself, Megatron takes Transformer Engine's or Apex's
        # wherever these are installed.
        return TransformerBlockSubmodules(layers, layer_norm=WrappedTorchNorm)
    layer.input_layernorm = layer.pre_mlp_layernorm = _RMSNorm
    if qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = _RMSNorm
    return TransformerBlockSubmodules(layers, layer_norm=_RMSNorm)


def _transformer_config(
    architecture: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    transformer_engine: bool,
    sequence: bool,
    deterministic: bool,
) -> TransformerConfig:
    """Megatron's configuration of the layers at this rank's layout.

    architecture: fields that follow from the Hugging Face config.
    """
    return TransformerConfig(
        **architecture,
        **model_options(transformer_engine, deterministic),
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        expert_model_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
        moe_grouped_gemm=transformer_engine and "num_moe_experts" in architecture,
        sequence_parallel=sequence,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        # Every micro-batch has its own length. Megatron refuses that with its default MoE
        # dispatcher, even for models without experts.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        calculate_per_token_loss=True,
        # Zeros, for the weights are loaded anyway; but initialization stays on, because it also
        # marks parameters as tensor-parallel, which gradient norms rely on.
        init_method=torch.nn.init.zeros_,
        output_layer_init_method=torch.nn.init.zeros_,
        embedding_init_method=torch.nn.init.zeros_,
    )


def build_model(
    hf_config: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    pre_process: bool | None = None,
    post_process: bool | None = None,
    transformer_engine: bool = False,
    sequence: bool = False,
    deterministic: bool = False,
) -> PolicyModel:
    """Build this rank's stage of the model with zero weights; `weights.load_weights` fills them.

    Needs parallel state. Raises ModelError for a config that Megatron-Core cannot
    express and ConfigError for a layout that does not divide the model.

    pre_process, post_process: whether the stage has the embedding, and the final norm with the
        head; None: as the pipeline rank says.
    transformer_engine: whether layers are Transformer Engine's (`layers.choose_layers`).
    sequence: sequence parallelism.
    deterministic: train.deterministic.
    """
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    pipeline = parallel_state.get_pipeline_model_parallel_world_size()
    expert = parallel_state.get_expert_model_parallel_world_size()
    check_layout(hf_config, tensor, pipeline, expert, sequence=sequence)
    arguments = find_architecture(hf_config).megatron_arguments(hf_config)
    if pre_process is None:
        pre_process = parallel_state.is_pipeline_first_stage()
    if post_process is None:
        post_process = parallel_state.is_pipeline_last_stage()
    config = _transformer_config(
        arguments.transformer,
        dtype=dtype,
        transformer_engine=transformer_engine,
        sequence=sequence,
        deterministic=deterministic,
    )
    gpt = dict(arguments.gpt)
    with idle_output_layer():
        return PolicyModel(
            config=config,
            transformer_layer_spec=_layer_spec(config, transformer_engine),
            vocab_size=gpt.pop("vocab_size"),
            tensor=tensor,
            llama3_rope=arguments.llama3_rope,
            pre_process=pre_process,
            post_process=post_process,
            **gpt,
        )
