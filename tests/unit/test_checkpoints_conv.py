"""Mapping tables, config translation, and reading and writing Hugging Face directories."""

import json
import os
import subprocess
import sys
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_conv import SafetensorsReader, check_safetensors, find_architecture, read_hf_config, write_hf
from checkpoints_conv.architectures import ARCHITECTURES
from checkpoints_conv.rope import Llama3Rope, parse_rope
from megatron_policysplit.config.model_layout import check_layout
from megatron_policysplit.errors import ConfigError, ModelError
from tests.support.hf_models import FAMILIES, LLAMA3_ROPE, make_model


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {(f, tied): make_model(root / f"{f}-{tied}", f, tied=tied) for f in FAMILIES for tied in (False, True)}


@pytest.fixture
def model_dir(originals, tmp_path):
    """A copy of an untied Qwen3 directory that a test may damage."""
    for file in originals["qwen3", False].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


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


def in_memory(path):
    """Tensors of a directory's only file; `load_file` alone would leave them mapped to it."""
    return {name: tensor.clone() for name, tensor in load_file(path / "model.safetensors").items()}


def rewrite(path, change):
    """Apply `change` to the tensors of a directory's only file."""
    tensors = in_memory(path)
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def edit_config(path, **changes):
    hf_config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**hf_config, **changes}))


# Tables


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_tables_name_every_tensor_of_transformers_model(originals, family, tied):
    path = originals[family, tied]
    found = check_safetensors(path)
    wanted = find_architecture(read_hf_config(path)).hf_tensors(read_hf_config(path))
    assert {name: info.shape for name, info in found.items()} == wanted


def test_names_and_layouts_agree_with_mbridge(originals, monkeypatch):
    # mbridge needs einops only for the vision models that its package imports along.
    monkeypatch.setitem(sys.modules, "einops", types.SimpleNamespace(rearrange=None))
    from mbridge.models.llama import LLaMABridge
    from mbridge.models.qwen2 import Qwen2Bridge
    from mbridge.models.qwen3 import Qwen3Bridge
    from mbridge.models.qwen3moe import Qwen3MoEBridge
    from transformers import AutoConfig

    bridges = {
        "llama": LLaMABridge,
        "mistral": LLaMABridge,
        "qwen2": Qwen2Bridge,
        "qwen3": Qwen3Bridge,
        "qwen3_moe": Qwen3MoEBridge,
    }
    for family, bridge_class in bridges.items():
        path = originals[family, False]
        hf_config = read_hf_config(path)
        architecture = find_architecture(hf_config)
        sizes = architecture.sizes(hf_config)
        bridge = bridge_class.__new__(bridge_class)
        bridge.hf_config, bridge.make_vocab_size_divisible_by = AutoConfig.from_pretrained(path), None
        tensors = load_file(path / "model.safetensors")
        for part in architecture.mappings(hf_config):
            for mapping in part[1]:
                name = mapping.megatron[-1]  # mbridge knows Transformer Engine's names
                assert bridge._weight_name_mapping_mcore_to_hf(name) == [src.name for src in mapping.sources]
                sources = [tensors[src.name] for src in mapping.sources]
                theirs = bridge._weight_to_mcore_format(name, sources)
                ours = torch.full(mapping.local_shape(sizes, 1), float("nan"))
                for piece in mapping.pieces(sizes, 0, 1):
                    length = piece.stop - piece.start
                    block = tensors[piece.source].narrow(piece.dim, piece.start, length)
                    ours.narrow(piece.dim, piece.offset, length).copy_(block)
                assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.name)
@pytest.mark.parametrize("vocab", [3, 131])
def test_ranks_share_every_element_once(architecture, vocab):
    """With vocabulary 3 over 4 ranks the last rank holds padding only."""
    few = {"num_experts": 3} if architecture.moe else {}
    hf_config = config(architectures=[architecture.name], vocab_size=vocab, num_key_value_heads=4, **few)
    sizes = architecture.sizes(hf_config)
    for mapping in architecture.by_megatron_name(hf_config).values():
        for tensor in (1, 2, 4):
            replicas = tensor if mapping.rule.__name__ == "replicated" else 1
            counts = {src.name: torch.zeros(src.shape(sizes)) for src in mapping.sources}
            for rank in range(tensor):
                local = torch.zeros(mapping.local_shape(sizes, tensor))
                for piece in mapping.pieces(sizes, rank, tensor):
                    length = piece.stop - piece.start
                    counts[piece.source].narrow(piece.dim, piece.start, length).add_(1)
                    local.narrow(piece.dim, piece.offset, length).add_(1)
                assert local.max() <= 1
                assert "vocab" in mapping.sources[0].dims or local.min() == 1
            assert all((count == replicas).all() for count in counts.values())


# Config


def test_config_in_megatron_words():
    arguments = find_architecture(config()).megatron_arguments(config(rms_norm_eps=1e-5, rope_theta=5e5))
    assert arguments.transformer["kv_channels"] == 16 and arguments.transformer["num_query_groups"] == 2
    assert arguments.transformer["layernorm_epsilon"] == 1e-5
    assert not arguments.transformer["add_qkv_bias"] and not arguments.transformer["qk_layernorm"]
    assert arguments.gpt["rotary_base"] == 5e5 and arguments.llama3_rope is None
    qwen3 = config(architectures=["Qwen3ForCausalLM"])
    assert find_architecture(qwen3).megatron_arguments(qwen3).transformer["kv_channels"] == 128  # transformers' default
    assert find_architecture(qwen3).megatron_arguments(qwen3).transformer["qk_layernorm"]


def test_defaults_are_those_of_transformers():
    import transformers

    for architecture in ARCHITECTURES:
        config_class = getattr(transformers, architecture.name.replace("ForCausalLM", "Config"))
        theirs = config_class(**({"use_sliding_window": True} if architecture.window == "if_set" else {}))
        for key, value in architecture.defaults.items():
            assert getattr(theirs, key) == value, (architecture.name, key)
        assert theirs.rms_norm_eps == 1e-6 and theirs.tie_word_embeddings is False
        assert theirs.rope_parameters["rope_theta"] == parse_rope({}).base


def test_old_and_new_rope_keys_mean_the_same():
    scaling = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    new = parse_rope({"rope_parameters": LLAMA3_ROPE})
    assert parse_rope({"rope_theta": 500.0, "rope_scaling": scaling}) == new
    assert new.llama3 == Llama3Rope(4.0, 1.0, 4.0, 32) and new.base == 500.0
    old_type = {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2}}
    assert parse_rope(old_type).linear_factor == 2.0
    assert parse_rope({"rope_theta": 7.0, "rope_scaling": None}).base == 7.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "rope_scaling.rope_type='yarn' is not supported"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rope_parameters.rope_type='dynamic' is not supported"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters has no `factor`"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5; only 1.0 is supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'; only hidden_act='silu' is supported"),
        ({"attention_bias": True}, "attention_bias=True; only attention_bias=False is supported"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers=1"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config .*'fp8'.*for serving alone"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has 'sliding_attention'"),
        ({"hidden_size": None}, "config.json has no `hidden_size`"),
        ({"num_hidden_layers": "6"}, "num_hidden_layers='6' is not a positive integer"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of 3 KV heads"),
    ],
)
def test_what_megatron_cannot_express_is_refused(changes, message):
    with pytest.raises(ModelError, match=message):
        find_architecture(config()).megatron_arguments(config(**changes))


def test_an_unknown_architecture_lists_the_known_ones():
    with pytest.raises(ModelError, match="'GemmaForCausalLM' is not supported.*LlamaForCausalLM, MistralForCausalLM"):
        find_architecture(config(architectures=["GemmaForCausalLM"]))
    assert find_architecture({"model_type": "qwen2"}).name == "Qwen2ForCausalLM"


def test_layouts_that_do_not_divide_the_model():
    check_layout(config(), 2, 3)
    with pytest.raises(ConfigError) as error:
        check_layout(config(), 4, 1)
    assert str(error.value) == "parallel.tensor=4 does not divide num_key_value_heads=2 of the model; use 1 or 2"
    with pytest.raises(ConfigError) as error:
        check_layout(config(), 1, 4)
    message = "parallel.pipeline=4 does not divide num_hidden_layers=6 of the model; use 1, 2, 3 or 6"
    assert str(error.value) == message


def test_the_command_line_can_import_this_without_torch():
    code = "import checkpoints_conv, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# Reading


def test_missing_directory_and_config(tmp_path):
    with pytest.raises(ModelError, match="nowhere does not exist"):
        read_hf_config(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="config.json is missing"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="config.json is not valid JSON"):
        read_hf_config(tmp_path)


def test_truncated_file(model_dir):
    file = model_dir / "model.safetensors"
    size = file.stat().st_size
    os.truncate(file, size - 100)
    with pytest.raises(ModelError, match=f"model.safetensors is cut short.*expected {size} bytes, found {size - 100}"):
        check_safetensors(model_dir)
    os.truncate(file, 50)
    with pytest.raises(ModelError, match="its header needs [0-9]+ bytes, the file has 50"):
        check_safetensors(model_dir)
    os.truncate(file, 0)
    with pytest.raises(ModelError, match="the file has 0"):
        check_safetensors(model_dir)


def test_header_that_does_not_parse(model_dir):
    file = model_dir / "model.safetensors"
    file.write_bytes(b"\x08" + b"\0" * 7 + b"notjson!")
    with pytest.raises(ModelError, match="its header does not parse"):
        check_safetensors(model_dir)


def test_missing_misshapen_extra_and_mistyped_tensors(model_dir):
    name = "model.layers.2.self_attn.k_norm.weight"
    rewrite(model_dir, lambda tensors: tensors.pop(name))
    with pytest.raises(ModelError, match=f"lacks tensor {name} that Qwen3ForCausalLM needs"):
        check_safetensors(model_dir)
    rewrite(model_dir, lambda tensors: tensors.update({name: torch.zeros(23)}))
    with pytest.raises(ModelError, match=rf"tensor {name} in .* has shape \[23\], but config.json makes it \[24\]"):
        check_safetensors(model_dir)
    rewrite(model_dir, lambda tensors: tensors.update({name: torch.zeros(24, dtype=torch.int8)}))
    with pytest.raises(ModelError, match=f"tensor {name} .* has dtype I8; supported are F32, BF16, F16"):
        check_safetensors(model_dir)
    rewrite(model_dir, lambda tensors: tensors.update({name: torch.zeros(24), "model.extra.weight": torch.zeros(1)}))
    with pytest.raises(ModelError, match="has tensor model.extra.weight that Qwen3ForCausalLM does not know"):
        check_safetensors(model_dir)


def test_a_second_copy_of_a_tied_head_is_harmless(model_dir):
    edit_config(model_dir, tie_word_embeddings=True)
    tensors = in_memory(model_dir)
    same = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(same, model_dir / "model.safetensors", metadata={"format": "pt"})
    assert "lm_head.weight" in check_safetensors(model_dir)


def test_index_and_its_files(model_dir):
    tensors = in_memory(model_dir)
    (model_dir / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="neither model.safetensors nor model.safetensors.index.json"):
        check_safetensors(model_dir)
    source = model_dir / "sharded"
    write_hf(source, model_dir, tensors.items(), torch.float32, max_shard_bytes=60_000)
    victim = sorted(source.glob("*.safetensors"))[1]
    content = victim.read_bytes()
    victim.unlink()
    with pytest.raises(ModelError, match=f"{victim.name} is missing, but model.safetensors.index.json names it"):
        check_safetensors(source)
    victim.write_bytes(content)
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.ghost"] = victim.name
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=f"places tensor model.ghost in {victim.name}, which does not have it"):
        check_safetensors(source)
    index["weight_map"]["model.ghost"] = "../outside.safetensors"
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="outside the model directory"):
        check_safetensors(source)


def test_reader_slices_and_closes(model_dir):
    tensors = in_memory(model_dir)
    name = "model.layers.1.mlp.down_proj.weight"
    with SafetensorsReader(model_dir) as reader:
        assert torch.equal(reader.get(name), tensors[name])
        assert torch.equal(reader.slice(name, 0, 3, 9), tensors[name][3:9])
        assert torch.equal(reader.slice(name, 1, 10, 20), tensors[name][:, 10:20])
        with pytest.raises(ModelError, match="lacks tensor model.nothing"):
            reader.get("model.nothing")
    with open("/proc/self/maps") as maps:
        assert str(model_dir) not in maps.read()
