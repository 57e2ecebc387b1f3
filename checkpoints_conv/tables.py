"""Rows of the mapping tables, under the names that the architectures' entries call them by.

`*` in a name stands for the layer, `#` for the expert; both are counted over the whole model.
"""

from __future__ import annotations

from checkpoints_conv.mapping import Pair, columns, gated, qkv, replicated, source, vocab_rows

_D, _H = "decoder.layers.*.", "model.layers.*."

EMBEDDING = Pair(
    vocab_rows, ("embedding.word_embeddings.weight",), (source("model.embed_tokens.weight", "vocab", "hidden"),)
)
ATTENTION = (
    Pair(
        qkv,
        (_D + "self_attention.linear_qkv.weight",),
        (
            source(_H + "self_attn.q_proj.weight", "query", "hidden"),
            source(_H + "self_attn.k_proj.weight", "kv", "hidden"),
            source(_H + "self_attn.v_proj.weight", "kv", "hidden"),
        ),
    ),
    Pair(
        columns,
        (_D + "self_attention.linear_proj.weight",),
        (source(_H + "self_attn.o_proj.weight", "hidden", "query"),),
    ),
)
QKV_BIAS = Pair(
    qkv,
    (_D + "self_attention.linear_qkv.bias",),
    (
        source(_H + "self_attn.q_proj.bias", "query"),
        source(_H + "self_attn.k_proj.bias", "kv"),
        source(_H + "self_attn.v_proj.bias", "kv"),
    ),
)
QK_NORM = (
    Pair(replicated, (_D + "self_attention.q_layernorm.weight",), (source(_H + "self_attn.q_norm.weight", "head"),)),
    Pair(replicated, (_D + "self_attention.k_layernorm.weight",), (source(_H + "self_attn.k_norm.weight", "head"),)),
)
MLP = (
    Pair(
        gated,
        (_D + "mlp.linear_fc1.weight",),
        (
            source(_H + "mlp.gate_proj.weight", "ffn", "hidden"),
            source(_H + "mlp.up_proj.weight", "ffn", "hidden"),
        ),
    ),
    Pair(columns, (_D + "mlp.linear_fc2.weight",), (source(_H + "mlp.down_proj.weight", "hidden", "ffn"),)),
)
ROUTER = Pair(replicated, (_D + "mlp.router.weight",), (source(_H + "mlp.gate.weight", "experts", "hidden"),))
EXPERTS = (  # one matrix each; Transformer Engine's grouped linear layers number them within one module
    Pair(
        gated,
        (_D + "mlp.experts.local_experts.#.linear_fc1.weight", _D + "mlp.experts.linear_fc1.weight#"),
        (
            source(_H + "mlp.experts.#.gate_proj.weight", "expert_ffn", "hidden"),
            source(_H + "mlp.experts.#.up_proj.weight", "expert_ffn", "hidden"),
        ),
    ),
    Pair(
        columns,
        (_D + "mlp.experts.local_experts.#.linear_fc2.weight", _D + "mlp.experts.linear_fc2.weight#"),
        (source(_H + "mlp.experts.#.down_proj.weight", "hidden", "expert_ffn"),),
    ),
)
INPUT_NORM = Pair(
    replicated,
    (_D + "input_layernorm.weight", _D + "self_attention.linear_qkv.layer_norm_weight"),
    (source(_H + "input_layernorm.weight", "hidden"),),
)
MLP_NORM = Pair(
    replicated,
    (_D + "pre_mlp_layernorm.weight", _D + "mlp.linear_fc1.layer_norm_weight"),
    (source(_H + "post_attention_layernorm.weight", "hidden"),),
)
MOE_NORM = Pair(replicated, MLP_NORM.megatron[:1], MLP_NORM.sources)  # a norm of its own under both layer specs
FINAL_NORM = Pair(replicated, ("decoder.final_layernorm.weight",), (source("model.norm.weight", "hidden"),))
HEAD = Pair(vocab_rows, ("output_layer.weight",), (source("lm_head.weight", "vocab", "hidden"),))
TIED_HEAD = Pair(vocab_rows, HEAD.megatron, EMBEDDING.sources)  # a pipeline's last stage has its own copy
