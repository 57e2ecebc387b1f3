"""Rows of the mapping tables, named for the entries of `architectures`.

`*` in a name stands for the layer, `#` for the expert; both are counted over the whole model. Two
Megatron names are those of the local layer spec and of Transformer Engine's, where they differ.
"""

from __future__ import annotations

from checkpoints_conv.mapping import (
    ParamMapping,
    gate_up,
    qkv,
    replicated,
    row_parallel,
    source,
    vocab_parallel,
)

_D, _H = "decoder.layers.*.", "model.layers.*."  # Megatron-Core's and Hugging Face's prefixes

EMBEDDING = ParamMapping(
    vocab_parallel,
    ("embedding.word_embeddings.weight",),
    (source("model.embed_tokens.weight", "vocab", "hidden"),),
)
ATTENTION = (
    ParamMapping(
        qkv,
        (_D + "self_attention.linear_qkv.weight",),
        (
            source(_H + "self_attn.q_proj.weight", "query", "hidden"),
            source(_H + "self_attn.k_proj.weight", "kv", "hidden"),
            source(_H + "self_attn.v_proj.weight", "kv", "hidden"),
        ),
    ),
    ParamMapping(
        row_parallel,
        (_D + "self_attention.linear_proj.weight",),
        (source(_H + "self_attn.o_proj.weight", "hidden", "query"),),
    ),
)
QKV_BIAS = ParamMapping(
    qkv,
    (_D + "self_attention.linear_qkv.bias",),
    (
        source(_H + "self_attn.q_proj.bias", "query"),
        source(_H + "self_attn.k_proj.bias", "kv"),
        source(_H + "self_attn.v_proj.bias", "kv"),
    ),
)
QK_NORM = (
    ParamMapping(
        replicated,
        (_D + "self_attention.q_layernorm.weight",),
        (source(_H + "self_attn.q_norm.weight", "head"),),
    ),
    ParamMapping(
        replicated,
        (_D + "self_attention.k_layernorm.weight",),
        (source(_H + "self_attn.k_norm.weight", "head"),),
    ),
)
MLP = (
    ParamMapping(
        gate_up,
        (_D + "mlp.linear_fc1.weight",),
        (
            source(_H + "mlp.gate_proj.weight", "ffn", "hidden"),
            source(_H + "mlp.up_proj.weight", "ffn", "hidden"),
        ),
    ),
    ParamMapping(
        row_parallel,
        (_D + "mlp.linear_fc2.weight",),
        (source(_H + "mlp.down_proj.weight", "hidden", "ffn"),),
    ),
)
ROUTER = ParamMapping(
    replicated, (_D + "mlp.router.weight",), (source(_H + "mlp.gate.weight", "experts", "hidden"),)
)
# One matrix each; Transformer Engine's grouped linear layers number them within one module.
EXPERTS = (
    ParamMapping(
        gate_up,
        (
            _D + "mlp.experts.local_experts.#.linear_fc1.weight",
            _D + "mlp.experts.linear_fc1.weight#",
        ),
        (
            source(_H + "mlp.experts.#.gate_proj.weight", "expert_ffn", "hidden"),
            source(_H + "mlp.experts.#.up_proj.weight", "expert_ffn", "hidden"),
        ),
    ),
    ParamMapping(
        row_parallel,
        (
            _D + "mlp.experts.local_experts.#.linear_fc2.weight",
            _D + "mlp.experts.linear_fc2.weight#",
        ),
        (source(_H + "mlp.experts.#.down_proj.weight", "hidden", "expert_ffn"),),
    ),
)
INPUT_NORM = ParamMapping(
    replicated,
    (_D + "input_layernorm.weight", _D + "self_attention.linear_qkv.layer_norm_weight"),
    (source(_H + "input_layernorm.weight", "hidden"),),
)
MLP_NORM = ParamMapping(
    replicated,
    (_D + "pre_mlp_layernorm.weight", _D + "mlp.linear_fc1.layer_norm_weight"),
    (source(_H + "post_attention_layernorm.weight", "hidden"),),
)
# Before experts, Transformer Engine does not fold the norm into a linear layer.
MOE_NORM = ParamMapping(replicated, MLP_NORM.megatron[:1], MLP_NORM.sources)
FINAL_NORM = ParamMapping(
    replicated, ("decoder.final_layernorm.weight",), (source("model.norm.weight", "hidden"),)
)
HEAD = ParamMapping(
    vocab_parallel, ("output_layer.weight",), (source("lm_head.weight", "vocab", "hidden"),)
)
# The last of several pipeline stages holds a second copy of the embedding as its head.
TIED_HEAD = ParamMapping(vocab_parallel, HEAD.megatron, EMBEDDING.sources)
