"""The supported architectures: a table of name pairs each, and their config in Megatron-Core's words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import gcd
from typing import Any

from checkpoints_conv.mapping import Pair, Sizes, Source, columns, gated, qkv, replicated, source, vocab_rows
from checkpoints_conv.rope import Llama3Rope, rope_of
from megatron_policysplit.errors import ConfigError, ModelError

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
MLP_AND_NORMS = (
    Pair(
        gated,
        (_D + "mlp.linear_fc1.weight",),
        (
            source(_H + "mlp.gate_proj.weight", "ffn", "hidden"),
            source(_H + "mlp.up_proj.weight", "ffn", "hidden"),
        ),
    ),
    Pair(columns, (_D + "mlp.linear_fc2.weight",), (source(_H + "mlp.down_proj.weight", "hidden", "ffn"),)),
    Pair(
        replicated,
        (_D + "input_layernorm.weight", _D + "self_attention.linear_qkv.layer_norm_weight"),
        (source(_H + "input_layernorm.weight", "hidden"),),
    ),
    Pair(
        replicated,
        (_D + "pre_mlp_layernorm.weight", _D + "mlp.linear_fc1.layer_norm_weight"),
        (source(_H + "post_attention_layernorm.weight", "hidden"),),
    ),
)
FINAL_NORM = Pair(replicated, ("decoder.final_layernorm.weight",), (source("model.norm.weight", "hidden"),))
HEAD = Pair(vocab_rows, ("output_layer.weight",), (source("lm_head.weight", "vocab", "hidden"),))
TIED_HEAD = Pair(vocab_rows, HEAD.megatron, EMBEDDING.sources)  # a pipeline's last stage has its own copy


@dataclass(frozen=True)
class MegatronArguments:
    """transformer: TransformerConfig's keywords. gpt: GPTModel's. llama3_rope: see `rope.Llama3Rope`."""

    transformer: dict[str, Any]
    gpt: dict[str, Any]
    llama3_rope: Llama3Rope | None


@dataclass(frozen=True)
class Architecture:
    """name: as in config.json's `architectures`. layer: the table of one layer, in Hugging Face's order.

    defaults: what transformers assumes for keys that config.json leaves out.
    """

    name: str
    model_type: str
    layer: tuple[Pair, ...]
    qkv_bias: bool = False
    qk_norm: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def sizes(self, hf_config: Mapping[str, Any]) -> Sizes:
        """Dimensions of the model; ModelError names a key that is missing or not a positive integer."""
        heads = self._integer(hf_config, "num_attention_heads")
        hidden = self._integer(hf_config, "hidden_size")
        kv_heads = self._integer(hf_config, "num_key_value_heads", heads)
        if heads % kv_heads:
            raise ModelError(f"config.json: num_attention_heads={heads} is not a multiple of {kv_heads} KV heads")
        return Sizes(
            vocab=self._integer(hf_config, "vocab_size"),
            hidden=hidden,
            ffn=self._integer(hf_config, "intermediate_size"),
            layers=self._integer(hf_config, "num_hidden_layers"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=self._integer(hf_config, "head_dim", hidden // heads),
            tied=bool(hf_config.get("tie_word_embeddings", False)),
        )

    def _integer(self, hf_config: Mapping[str, Any], key: str, fallback: int | None = None) -> int:
        value = hf_config.get(key, self.defaults.get(key))
        value = fallback if value is None else value
        if value is None:
            raise ModelError(f"config.json has no `{key}`, which {self.name} needs")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(f"config.json: {key}={value!r} is not a positive integer")
        return value

    def pairs(self, hf_config: Mapping[str, Any]) -> list[tuple[int | None, list[Pair]]]:
        """The table of the whole model in parts: embedding, each layer (with its number), norm and head."""
        sizes = self.sizes(hf_config)
        layers = [(layer, [pair.at(layer) for pair in self.layer]) for layer in range(sizes.layers)]
        return [(None, [EMBEDDING]), *layers, (None, [FINAL_NORM] if sizes.tied else [FINAL_NORM, HEAD])]

    def hf_tensors(self, hf_config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor of the model, in transformers' order; a tied head is left out."""
        sizes = self.sizes(hf_config)
        sources = [src for _, part in self.pairs(hf_config) for src in in_hf_order(part)]
        return {src.name: src.shape(sizes) for src in sources}

    def by_megatron_name(self, hf_config: Mapping[str, Any]) -> dict[str, Pair]:
        """Megatron parameter name (layers numbered over the whole model; both layer specs) -> its row."""
        table = {name: pair for _, part in self.pairs(hf_config) for pair in part for name in pair.megatron}
        if self.sizes(hf_config).tied:
            table[TIED_HEAD.megatron[0]] = TIED_HEAD
        return table

    def megatron_arguments(self, hf_config: Mapping[str, Any]) -> MegatronArguments:
        """The config in Megatron-Core's words. ModelError names a key that Megatron-Core cannot express."""
        sizes = self.sizes(hf_config)
        self._refuse_unsupported(hf_config)
        rope = rope_of(hf_config)
        return MegatronArguments(
            transformer={
                "num_layers": sizes.layers,
                "hidden_size": sizes.hidden,
                "ffn_hidden_size": sizes.ffn,
                "num_attention_heads": sizes.heads,
                "num_query_groups": sizes.kv_heads,
                "kv_channels": sizes.head_dim,
                "normalization": "RMSNorm",
                "layernorm_epsilon": float(hf_config.get("rms_norm_eps", 1e-6)),
                "gated_linear_unit": True,
                "add_bias_linear": False,
                "add_qkv_bias": self.qkv_bias,
                "qk_layernorm": self.qk_norm,
            },
            gpt={
                "vocab_size": sizes.vocab,
                "max_sequence_length": self._integer(hf_config, "max_position_embeddings"),
                "position_embedding_type": "rope",
                "rotary_base": rope.base,
                "seq_len_interpolation_factor": rope.linear_factor,
                "share_embeddings_and_output_weights": sizes.tied,
            },
            llama3_rope=rope.llama3,
        )

    def _refuse_unsupported(self, hf_config: Mapping[str, Any]) -> None:
        allowed = {
            "hidden_act": ("silu",),
            "attention_bias": (self.qkv_bias, False),
            "mlp_bias": (False,),
            "num_nextn_predict_layers": (0,),
            "quantization_config": (),
        }
        for key, values in allowed.items():
            value = hf_config.get(key)
            if value is not None and value not in values:
                wanted = f"only {key}={values[0]!r} is supported" if values else f"models with {key} are not supported"
                raise ModelError(f"config.json: {key}={value!r}; {wanted} for {self.name}")
        windowed = hf_config.get("use_sliding_window") and hf_config.get("sliding_window") is not None
        kinds = hf_config.get("layer_types")
        if kinds is None and windowed and hf_config.get("max_window_layers", 28) < hf_config["num_hidden_layers"]:
            raise ModelError("config.json: use_sliding_window=True; sliding-window attention is not supported")
        if kinds is not None and any(kind != "full_attention" for kind in kinds):
            other = next(kind for kind in kinds if kind != "full_attention")
            raise ModelError(f"config.json: layer_types has {other!r}; only 'full_attention' is supported")


_QWEN_DEFAULTS = {"max_position_embeddings": 32768, "num_key_value_heads": 32}
ARCHITECTURES = (
    Architecture("LlamaForCausalLM", "llama", ATTENTION + MLP_AND_NORMS, defaults={"max_position_embeddings": 2048}),
    Architecture(
        "Qwen2ForCausalLM",
        "qwen2",
        (*ATTENTION, QKV_BIAS, *MLP_AND_NORMS),
        qkv_bias=True,
        defaults=_QWEN_DEFAULTS,
    ),
    Architecture(
        "Qwen3ForCausalLM",
        "qwen3",
        ATTENTION + QK_NORM + MLP_AND_NORMS,
        qk_norm=True,
        defaults={**_QWEN_DEFAULTS, "head_dim": 128},
    ),
)


def in_hf_order(part: list[Pair]) -> list[Source]:
    """Sources of a part in the order of transformers' state dict: a module's bias follows its weight."""
    sources = [src for pair in part for src in pair.sources]
    modules = list(dict.fromkeys(src.name.rpartition(".")[0] for src in sources))
    return sorted(sources, key=lambda src: modules.index(src.name.rpartition(".")[0]))


def architecture_of(hf_config: Mapping[str, Any]) -> Architecture:
    """The table for a config.json; ModelError lists the supported architectures."""
    names = hf_config.get("architectures") or []
    for architecture in ARCHITECTURES:
        if architecture.name in names or (not names and hf_config.get("model_type") == architecture.model_type):
            return architecture
    supported = ", ".join(architecture.name for architecture in ARCHITECTURES)
    found = ", ".join(names) or hf_config.get("model_type")
    raise ModelError(f"config.json: architecture {found!r} is not supported; supported are {supported}")


def check_layout(hf_config: Mapping[str, Any], tensor: int, pipeline: int) -> None:
    """Raise ConfigError if the model cannot be cut into `tensor` x `pipeline` equal parts."""
    sizes = architecture_of(hf_config).sizes(hf_config)
    parts = {
        "parallel.tensor": {
            "num_attention_heads": sizes.heads,
            "num_key_value_heads": sizes.kv_heads,
            "intermediate_size": sizes.ffn,
        },
        "parallel.pipeline": {"num_hidden_layers": sizes.layers},
    }
    for key, size in (("parallel.tensor", tensor), ("parallel.pipeline", pipeline)):
        for dimension, total in parts[key].items():
            if total % size:
                possible = _common_divisors(parts[key].values())
                raise ConfigError(f"{key}={size} does not divide {dimension}={total} of the model; use {possible}")


def _common_divisors(totals: Iterable[int]) -> str:
    """The common divisors in words: `1, 2 or 4`."""
    greatest = gcd(*totals)
    *others, last = (str(n) for n in range(1, greatest + 1) if greatest % n == 0)
    return f"{', '.join(others)} or {last}" if others else last
