"""What config.json says of sliding windows and experts, in Megatron-Core's words or refused."""

import re
from math import prod
from pathlib import Path

import pytest

from checkpoints_conv import find_architecture
from megatron_policysplit.config.model_layout import check_layout
from megatron_policysplit.errors import ConfigError, ModelError


def config(**changes):
    base = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 131,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return {**base, **changes}


def test_the_worked_example_is_the_code():
    page = Path(__file__).parents[2] / "docs" / "new_architecture.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    exec(block, names)
    assert names["MISTRAL"] == find_architecture({"architectures": ["MistralForCausalLM"]})


WINDOW = "sliding_window=8 is less than max_position_embeddings=32"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
        ("Qwen3MoeForCausalLM", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 6}),
        ("MistralForCausalLM", {"sliding_window": 8}),
    ],
)
def test_a_window_is_refused(name, changes):
    windowed = config(architectures=[name], max_position_embeddings=32, **changes)
    with pytest.raises(ModelError, match=WINDOW):
        find_architecture(windowed).megatron_arguments(windowed)


def test_mistral_has_a_window_unless_its_config_says_otherwise():
    silent = config(architectures=["MistralForCausalLM"], max_position_embeddings=8192)
    with pytest.raises(ModelError, match="sliding_window=4096 is less than max_position_embeddings=8192"):
        find_architecture(silent).megatron_arguments(silent)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 6}),
        ("Qwen2ForCausalLM", {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 2}),
        ("Qwen3MoeForCausalLM", {"use_sliding_window": False, "sliding_window": 8}),
        ("MistralForCausalLM", {"sliding_window": None}),
        ("MistralForCausalLM", {"sliding_window": 32}),
    ],
)
def test_a_window_that_hides_nothing_is_accepted(name, changes):
    unused = config(architectures=[name], max_position_embeddings=32, **changes)
    find_architecture(unused).megatron_arguments(unused)


def moe_config(**changes):
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
    return config(architectures=["Qwen3MoeForCausalLM"], **experts | changes)


def test_experts_in_megatron_words():
    arguments = find_architecture(moe_config()).megatron_arguments(moe_config()).transformer
    assert (arguments["num_moe_experts"], arguments["moe_router_topk"]) == (8, 2)
    assert (arguments["moe_ffn_hidden_size"], arguments["ffn_hidden_size"]) == (32, 96)
    assert arguments["moe_router_load_balancing_type"] == "none" and not arguments["moe_router_pre_softmax"]
    plain = moe_config(norm_topk_prob=False)
    assert find_architecture(plain).megatron_arguments(plain).transformer["moe_router_pre_softmax"]
    renamed = moe_config()
    renamed["num_local_experts"] = renamed.pop("num_experts") // 2  # as transformers 5 writes it
    assert find_architecture(renamed).megatron_arguments(renamed).transformer["num_moe_experts"] == 4
    assert "num_moe_experts" not in find_architecture(config()).megatron_arguments(config()).transformer


def test_the_tensors_of_qwen3_30b_a3b():
    """From its published config.json: as many tensors, and half as many elements as bytes, as its index says."""
    published = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }
    architecture = find_architecture(published)
    shapes = architecture.hf_tensors(published)
    assert len(shapes) == 18867 and sum(map(prod, shapes.values())) == 61_064_245_248 // 2
    assert shapes["model.layers.47.mlp.experts.127.down_proj.weight"] == (2048, 768)
    assert architecture.megatron_arguments(published).transformer["kv_channels"] == 128


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 is more than the 8 experts"),
        ({"num_experts_per_tok": 1}, "norm_topk_prob=True with num_experts_per_tok=1"),
        ({"decoder_sparse_step": 2}, "only models with experts in every layer are supported"),
        ({"mlp_only_layers": [0]}, "only models with experts in every layer are supported"),
        ({"num_experts": 0}, "num_experts=0 is not a positive integer"),
    ],
)
def test_experts_that_are_refused(changes, message):
    with pytest.raises(ModelError, match=message):
        find_architecture(moe_config()).megatron_arguments(moe_config(**changes))


def test_layouts_of_experts():
    check_layout(moe_config(), 2, 3, 4, sequence=True)
    for (tensor, expert, sequence), message in {
        (1, 3, False): "parallel.expert=3 does not divide num_experts=8 of the model; use 1, 2, 4 or 8",
        (2, 1, False): "parallel.tensor=2 with parallel.sequence=false: Qwen3MoeForCausalLM has experts, and Megatron-"
        "Core trains them under tensor parallelism only with parallel.sequence=true",
    }.items():
        with pytest.raises(ConfigError) as error:
            check_layout(moe_config(), tensor, 1, expert, sequence=sequence)
        assert str(error.value) == message
    with pytest.raises(ConfigError, match="moe_intermediate_size=31 of the model"):
        check_layout(moe_config(moe_intermediate_size=31), 2, 1, sequence=True)
    with pytest.raises(ConfigError, match="parallel.expert=2, but LlamaForCausalLM has no experts; use 1"):
        check_layout(config(), 1, 1, 2)
