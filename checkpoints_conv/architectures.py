"""The supported architectures: each one's mapping table and its config in Megatron-Core's words."""

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
    """What Megatron-Core needs to build a model. Made by `Architecture.megatron_arguments`."""

    transformer: dict[str, Any]  # keywords of TransformerConfig
    gpt: dict[str, Any]  # keywords of GPTModel
    llama3_rope: Llama3Rope | None  # frequency scaling that GPTModel's keywords cannot express


@dataclass(frozen=True)
class Architecture:
    """A family of models: the mapping table of one layer, and how its config.json is to be read.

    All instances are in `ARCHITECTURES`; `find_architecture` gives the one of a config.json.
    """

    name: str  # as in config.json's `architectures`
    model_type: str  # as in config.json, for files without `architectures`
    layer: tuple[ParamMapping, ...]  # the table of one layer, in Hugging Face's order
    qkv_bias: bool = False  # query, key and value projections have biases
    qk_norm: bool = False  # query and key heads are normalized
    moe: bool = False  # every layer's MLP is a mixture of experts
    # Whether config.json's `sliding_window` counts; if_set: only with `use_sliding_window`.
    window: Literal["never", "always", "if_set"] = "never"
    # What transformers assumes for keys that config.json leaves out.
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def sizes(self, hf_config: Mapping[str, Any]) -> Sizes:
        """Read the dimensions of a model.

        Raises ModelError naming a key that is missing or not a positive integer.
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
        value = hf_config.get(key, self.defaults.get(key, False))
        if not isinstance(value, bool):
            # transformers refuses null, too: what it stands for depends on the model's class.
            shown = "null" if value is None else repr(value)
            raise ModelError(
                f"config.json: {key}={shown} is neither true nor false; write which it is"
            )
        return value

    def mappings(self, hf_config: Mapping[str, Any]) -> list[tuple[int | None, list[ParamMapping]]]:
        """The mapping table of the whole model, in parts of (layer number or None, rows).

        The parts are the embedding, each layer, and the final norm with the head (none if tied).
        """
        sizes = self.sizes(hf_config)
        layers = [(layer, list(self._rows(layer, sizes.experts))) for layer in range(sizes.layers)]
        return [
            (None, [EMBEDDING]),
            *layers,
            (None, [FINAL_NORM] if sizes.tied else [FINAL_NORM, HEAD]),
        ]

    def _rows(self, layer: int, experts: int) -> Iterator[ParamMapping]:
        """The table of one layer, its rows for experts repeated for each expert in turn."""
        for per_expert, rows in groupby(self.layer, key=lambda mapping: mapping.per_expert):
            if not per_expert:
                yield from (mapping.at(layer) for mapping in rows)
                continue
            rows = tuple(rows)  # groupby's iterator can be walked only once
            yield from (mapping.at(layer, expert) for expert in range(experts) for mapping in rows)

    def hf_tensors(self, hf_config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor, in transformers' order; a tied head is left out."""
        sizes = self.sizes(hf_config)
        sources = [src for _, part in self.mappings(hf_config) for src in in_hf_order(part)]
        return {src.name: src.shape(sizes) for src in sources}

    def by_megatron_name(self, hf_config: Mapping[str, Any]) -> dict[str, ParamMapping]:
        """Megatron parameter name -> its row of the table, a tied head included.

        A parameter stands under its names of both layer specs; layers and experts are numbered over
        the whole model.
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
        """Translate a config.json into Megatron-Core's words.

        Raises ModelError naming a key whose value Megatron-Core cannot express.
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
        """TransformerConfig's keywords for the experts and their router.

        As in transformers, a token goes to the best `topk` of a softmax over all experts. With
        norm_topk_prob their probabilities are divided by their sum, which equals a softmax over the
        selected experts alone. Logits are in the model's precision, the softmax in fp32.
        transformers adds the loss of router_aux_loss_coef only to a language-modelling loss of its
        own, so it has no counterpart here.
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
        sparse_step = self._integer(hf_config, "decoder_sparse_step", 1)
        if sparse_step != 1 or hf_config.get("mlp_only_layers"):
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
        """Raise ModelError for a key whose value would give another model than the table's."""
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
        if "text_config" in hf_config:
            raise ModelError(
                f"config.json has a `text_config` beside the keys of {self.name}, as a model of "
                "several modalities has: which of the two the weights follow is not certain; "
                "remove it, or give the directory of the language model alone"
            )
        self._refuse_window(hf_config)
        kinds = hf_config.get("layer_types")
        if not isinstance(kinds, list | None):
            raise ModelError(f"config.json: layer_types={kinds!r} is not a list")
        if kinds is not None and any(kind != "full_attention" for kind in kinds):
            unsupported = next(kind for kind in kinds if kind != "full_attention")
            raise ModelError(
                f"config.json: layer_types has {unsupported!r}; only 'full_attention' is supported"
            )
        layers = self._integer(hf_config, "num_hidden_layers")
        if kinds is not None and len(kinds) != layers:
            raise ModelError(
                f"config.json: layer_types has {len(kinds)} entries, but "
                f"num_hidden_layers={layers}; they must be as many"
            )

    def _refuse_window(self, hf_config: Mapping[str, Any]) -> None:
        """Raise ModelError unless every layer attends to all earlier positions."""
        window = hf_config.get("sliding_window", self.defaults.get("sliding_window"))
        used = self.window == "always" or (
            self.window == "if_set" and self._boolean(hf_config, "use_sliding_window")
        )
        # Where there are layer_types, they count instead; `_refuse_unsupported` checks them.
        if window is None or not used or hf_config.get("layer_types") is not None:
            return
        if "max_window_layers" in self.defaults:
            # The first max_window_layers layers have no window; 0 is allowed here alone.
            zero = hf_config.get("max_window_layers") == 0
            windowless = 0 if zero else self._integer(hf_config, "max_window_layers")
            if windowless >= self._integer(hf_config, "num_hidden_layers"):
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
    """The sources of a part in the order of transformers' state dict.

    There a module's bias follows its weight, while a table has all weights of a rule in one row.
    """
    sources = [src for mapping in part for src in mapping.sources]
    modules = dict.fromkeys(src.name.rpartition(".")[0] for src in sources)
    order = {module: index for index, module in enumerate(modules)}
    return sorted(sources, key=lambda src: order[src.name.rpartition(".")[0]])


def find_architecture(hf_config: Mapping[str, Any]) -> Architecture:
    """Find the architecture of a config.json; ModelError lists those that are supported."""
    names = hf_config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelError(f"config.json: architectures={names!r} is not a list of names")
    for architecture in ARCHITECTURES:
        if architecture.name in names or (
            not names and hf_config.get("model_type") == architecture.model_type
        ):
            return architecture
    supported = ", ".join(architecture.name for architecture in ARCHITECTURES)
    unknown = ", ".join(names) or hf_config.get("model_type")
    raise ModelError(
        f"config.json: architecture {unknown!r} is not supported; supported are {supported}"
    )
