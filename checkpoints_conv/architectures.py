"""The supported architectures: a table of name mappings each, and their config in Megatron-Core's
words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

from checkpoints_conv.errors import ModelError
from checkpoints_conv.mapping import ParamMapping, Sizes, Source
from checkpoints_conv.rope import Llama3Rope, parse_rope, positive
from checkpoints_conv.tables import (
    ATTENTION,
    EMBEDDING,
    EXPERTS,
    FINAL_NORM,
    HEAD,
    INPUT_NORM,
    MLP,
    MLP_NORM,
    MOE_NORM,
    QK_NORM,
    QKV_BIAS,
    ROUTER,
    TIED_HEAD,
)


@dataclass(frozen=True)
class MegatronArguments:
    """transformer: TransformerConfig's keywords. gpt: GPTModel's. llama3_rope: see
    `rope.Llama3Rope`.
    """

    transformer: dict[str, Any]
    gpt: dict[str, Any]
    llama3_rope: Llama3Rope | None


@dataclass(frozen=True)
class Architecture:
    """name: as in config.json's `architectures`. layer: the table of one layer, in Hugging Face's
    order.

    defaults: what transformers assumes for keys that config.json leaves out. moe: every layer's MLP
    is a mixture of experts. window: whether `sliding_window` counts: never, always, or if
    `use_sliding_window` is set.
    """

    name: str
    model_type: str
    layer: tuple[ParamMapping, ...]
    qkv_bias: bool = False
    qk_norm: bool = False
    moe: bool = False
    window: Literal["never", "always", "if_set"] = "never"
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def sizes(self, hf_config: Mapping[str, Any]) -> Sizes:
        """Dimensions of the model; ModelError names a key that is missing or not a positive
        integer.
        """
        heads = self._integer(hf_config, "num_attention_heads")
        hidden = self._integer(hf_config, "hidden_size")
        kv_heads = self._integer(hf_config, "num_key_value_heads", heads)
        if heads % kv_heads:
            raise ModelError(
                f"config.json: num_attention_heads={heads} is not a multiple of {kv_heads} KV heads"
            )
        experts = {}
        if self.moe:
            # transformers 5 writes the number of experts under its common name.
            key = "num_local_experts" if "num_local_experts" in hf_config else "num_experts"
            experts = {
                "experts": self._integer(hf_config, key),
                "expert_ffn": self._integer(hf_config, "moe_intermediate_size"),
            }
        return Sizes(
            vocab=self._integer(hf_config, "vocab_size"),
            hidden=hidden,
            ffn=self._integer(hf_config, "intermediate_size"),
            layers=self._integer(hf_config, "num_hidden_layers"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=self._integer(hf_config, "head_dim", hidden // heads),
            tied=self._boolean(hf_config, "tie_word_embeddings"),
            **experts,
        )

    def _integer(self, hf_config: Mapping[str, Any], key: str, fallback: int | None = None) -> int:
        value = hf_config.get(key, self.defaults.get(key))
        value = fallback if value is None else value
        if value is None:
            raise ModelError(f"config.json has no `{key}`, which {self.name} needs")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(f"config.json: {key}={value!r} is not a positive integer")
        return value

    def _boolean(self, hf_config: Mapping[str, Any], key: str) -> bool:
        value = hf_config.get(key, self.defaults.get(key))
        if not isinstance(value, bool | None):
            raise ModelError(f"config.json: {key}={value!r} is neither true nor false")
        return bool(value)

    def mappings(self, hf_config: Mapping[str, Any]) -> list[tuple[int | None, list[ParamMapping]]]:
        """The table of the whole model in parts: embedding, each layer (with its number), norm and
        head.
        """
        sizes = self.sizes(hf_config)
        layers = [(layer, list(self._rows(layer, sizes.experts))) for layer in range(sizes.layers)]
        return [
            (None, [EMBEDDING]),
            *layers,
            (None, [FINAL_NORM] if sizes.tied else [FINAL_NORM, HEAD]),
        ]

    def _rows(self, layer: int, experts: int) -> Iterator[ParamMapping]:
        """The table of one layer; the rows of an expert stand together, one expert after the other."""
        for per_expert, rows in groupby(self.layer, key=lambda mapping: mapping.per_expert):
            if not per_expert:
                yield from (mapping.at(layer) for mapping in rows)
                continue
            rows = tuple(rows)
            yield from (mapping.at(layer, expert) for expert in range(experts) for mapping in rows)

    def hf_tensors(self, hf_config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor of the model, in transformers' order; a tied head is left
        out.
        """
        sizes = self.sizes(hf_config)
        sources = [src for _, part in self.mappings(hf_config) for src in in_hf_order(part)]
        return {src.name: src.shape(sizes) for src in sources}

    def by_megatron_name(self, hf_config: Mapping[str, Any]) -> dict[str, ParamMapping]:
        """Megatron parameter name (layers numbered over the whole model; both layer specs) -> its
        row.
        """
        table = {
            name: mapping
            for _, part in self.mappings(hf_config)
            for mapping in part
            for name in mapping.megatron
        }
        if self.sizes(hf_config).tied:
            table[TIED_HEAD.megatron[0]] = TIED_HEAD
        return table

    def megatron_arguments(self, hf_config: Mapping[str, Any]) -> MegatronArguments:
        """The config in Megatron-Core's words. ModelError names a key that Megatron-Core cannot
        express.
        """
        sizes = self.sizes(hf_config)
        self._refuse_unsupported(hf_config)
        rope = parse_rope(hf_config)
        return MegatronArguments(
            transformer={
                "num_layers": sizes.layers,
                "hidden_size": sizes.hidden,
                "ffn_hidden_size": sizes.ffn,
                "num_attention_heads": sizes.heads,
                "num_query_groups": sizes.kv_heads,
                "kv_channels": sizes.head_dim,
                "normalization": "RMSNorm",
                "layernorm_epsilon": positive("rms_norm_eps", hf_config.get("rms_norm_eps", 1e-6)),
                "gated_linear_unit": True,
                "add_bias_linear": False,
                "add_qkv_bias": self.qkv_bias,
                "qk_layernorm": self.qk_norm,
                **(self._moe_arguments(hf_config, sizes) if self.moe else {}),
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

    def _moe_arguments(self, hf_config: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
        """The experts and their router: the best `topk` of a softmax over all experts, as
        transformers has it.

        With norm_topk_prob their probabilities are divided by their sum, which is a softmax over
        the chosen alone. The logits are in the model's precision, the softmax in fp32. transformers
        adds router_aux_loss_coef's loss only to a language-modelling loss of its own, so it has no
        counterpart here.
        """
        topk = self._integer(hf_config, "num_experts_per_tok")
        normalized = self._boolean(hf_config, "norm_topk_prob")
        if topk > sizes.experts:
            raise ModelError(
                f"config.json: num_experts_per_tok={topk} is more than the {sizes.experts} experts"
            )
        if normalized and topk == 1:
            raise ModelError(
                "config.json: norm_topk_prob=True with num_experts_per_tok=1 gives every expert "
                "weight 1"
            )
        if self._integer(hf_config, "decoder_sparse_step", 1) != 1 or hf_config.get(
            "mlp_only_layers"
        ):
            raise ModelError(
                "config.json: decoder_sparse_step and mlp_only_layers leave some layers without "
                "experts; only models with experts in every layer are supported"
            )
        return {
            "num_moe_experts": sizes.experts,
            "moe_ffn_hidden_size": sizes.expert_ffn,
            "moe_router_topk": topk,
            "moe_router_pre_softmax": not normalized,
            "moe_router_load_balancing_type": "none",
        }

    def _refuse_unsupported(self, hf_config: Mapping[str, Any]) -> None:
        allowed = {
            "hidden_act": ("silu",),
            "attention_bias": (self.qkv_bias, False),
            "mlp_bias": (False,),
            "num_nextn_predict_layers": (0,),
        }
        for key, values in allowed.items():
            value = hf_config.get(key)
            if value is not None and value not in values:
                raise ModelError(
                    f"config.json: {key}={value!r}; only {key}={values[0]!r} is supported for "
                    f"{self.name}"
                )
        quantized = hf_config.get("quantization_config")
        if quantized is not None:
            method = quantized.get("quant_method") if isinstance(quantized, Mapping) else quantized
            raise ModelError(
                f"config.json has a quantization_config (quant_method={method!r}): quantized "
                "weights are for serving alone; give the directory that they were made from"
            )
        self._refuse_window(hf_config)
        kinds = hf_config.get("layer_types")
        if not isinstance(kinds, list | None):
            raise ModelError(f"config.json: layer_types={kinds!r} is not a list")
        if kinds is not None and any(kind != "full_attention" for kind in kinds):
            other = next(kind for kind in kinds if kind != "full_attention")
            raise ModelError(
                f"config.json: layer_types has {other!r}; only 'full_attention' is supported"
            )

    def _refuse_window(self, hf_config: Mapping[str, Any]) -> None:
        """Attention must reach back over all positions in every layer."""
        window = hf_config.get("sliding_window", self.defaults.get("sliding_window"))
        used = self.window == "always" or (
            self.window == "if_set" and self._boolean(hf_config, "use_sliding_window")
        )
        if window is None or not used or hf_config.get("layer_types") is not None:
            return
        if "max_window_layers" in self.defaults:  # the first layers have no window
            none = hf_config.get("max_window_layers") == 0
            whole = 0 if none else self._integer(hf_config, "max_window_layers")
            if whole >= self._integer(hf_config, "num_hidden_layers"):
                return
        longest = self._integer(hf_config, "max_position_embeddings")
        if self._integer(hf_config, "sliding_window") < longest:
            raise ModelError(
                f"config.json: sliding_window={window} is less than "
                f"max_position_embeddings={longest}; sliding-window attention is not supported"
            )


_QWEN_DEFAULTS = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_NORMS = (INPUT_NORM, MLP_NORM)
ARCHITECTURES = (
    Architecture(
        "LlamaForCausalLM",
        "llama",
        (*ATTENTION, *MLP, *_NORMS),
        defaults={"max_position_embeddings": 2048},
    ),
    Architecture(
        "MistralForCausalLM",
        "mistral",
        (*ATTENTION, *MLP, *_NORMS),
        window="always",
        defaults={
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
        },
    ),
    Architecture(
        "Qwen2ForCausalLM",
        "qwen2",
        (*ATTENTION, QKV_BIAS, *MLP, *_NORMS),
        qkv_bias=True,
        window="if_set",
        defaults=_QWEN_DEFAULTS,
    ),
    Architecture(
        "Qwen3ForCausalLM",
        "qwen3",
        (*ATTENTION, *QK_NORM, *MLP, *_NORMS),
        qk_norm=True,
        window="if_set",
        defaults={**_QWEN_DEFAULTS, "head_dim": 128},
    ),
    Architecture(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        (*ATTENTION, *QK_NORM, ROUTER, *EXPERTS, INPUT_NORM, MOE_NORM),
        qk_norm=True,
        moe=True,
        window="if_set",
        defaults={
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
        },
    ),
)


def in_hf_order(part: list[ParamMapping]) -> list[Source]:
    """Sources of a part in the order of transformers' state dict: a module's bias follows its
    weight.
    """
    sources = [src for mapping in part for src in mapping.sources]
    modules = dict.fromkeys(src.name.rpartition(".")[0] for src in sources)
    order = {module: index for index, module in enumerate(modules)}
    return sorted(sources, key=lambda src: order[src.name.rpartition(".")[0]])


def find_architecture(hf_config: Mapping[str, Any]) -> Architecture:
    """The table for a config.json; ModelError lists the supported architectures."""
    names = hf_config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelError(f"config.json: architectures={names!r} is not a list of names")
    for architecture in ARCHITECTURES:
        if architecture.name in names or (
            not names and hf_config.get("model_type") == architecture.model_type
        ):
            return architecture
    supported = ", ".join(architecture.name for architecture in ARCHITECTURES)
    found = ", ".join(names) or hf_config.get("model_type")
    raise ModelError(
        f"config.json: architecture {found!r} is not supported; supported are {supported}"
    )
