"""FP8 directories against plain torch: scales, values, what stays as it is, and the logits that come of them."""

import copy
import json

import pytest
import torch
from safetensors.torch import save_file

from checkpoints_conv.describe import describe
from checkpoints_conv.quantize import quantize
from checkpoints_conv.quantized import block_tensor_parallel, weight_groups
from megatron_policysplit.cli.fp8_calibration import input_maxima, spread
from megatron_policysplit.config import ModesConfig
from tests.support.conversion import COMPANIONS, cast_model, make_tree, tensors_of
from tests.support.fp8 import (
    LARGEST,
    QUESTIONS,
    WHOLE_BLOCKS,
    assert_rounded,
    dequantized,
    last_logits,
    served_model,
    write_questions,
)
from tests.support.hf_models import FAMILIES, make_model
from tests.support.toy_chat import make_chat_model

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("quantize")


@pytest.fixture(scope="module")
def chat(work):
    return make_chat_model(work / "chat", num_hidden_layers=2)


@pytest.fixture(scope="module")
def questions(work):
    return write_questions(work / "questions.jsonl")


def maxima_of(model, questions, **options):
    return lambda: input_maxima(model, questions, ModesConfig(), **options)


@pytest.fixture(scope="module")
def fp8(chat, questions, work):
    quantize(chat, work / "fp8", "fp8", input_maxima=maxima_of(chat, questions))
    return work / "fp8"


def prompts_of(model, modes=ModesConfig()):  # noqa: B008
    """Ids of both modes' prompts of every question, from the tokenizer's own template."""
    from transformers import AutoTokenizer

    from megatron_policysplit.data.prompts import read_prompt

    tokenizer = AutoTokenizer.from_pretrained(model)

    def ids(messages):
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    asked = [{"role": "user", "content": question} for question in QUESTIONS]
    system = {"role": "system", "content": read_prompt(modes)}
    return [ids([one]) for one in asked], [ids([system, one]) for one in asked]


def input_maximum(model, prompts, modules):
    """Largest absolute input of each module over the prompts, by transformers' own forward pass."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    largest = dict.fromkeys(modules, 0.0)

    def hook(name):
        def measure(module, inputs):
            largest[name] = max(largest[name], inputs[0].abs().max().item())

        return measure

    for name in modules:
        loaded.get_submodule(name).register_forward_pre_hook(hook(name))
    last_logits(loaded, prompts)
    return largest


def group_of(name):
    """The weights that are served as one matrix with `name`."""
    for group in FUSED:
        for part in group:
            if f".{part}." in name:
                return [name.replace(part, other) for other in group]
    return [name]


def test_one_scale_for_what_is_served_as_one_matrix(chat, fp8):
    original, found, values = tensors_of(chat), tensors_of(fp8), dequantized(fp8)
    quantized = [name for name in original if name.endswith("_proj.weight")]
    assert len(quantized) == 2 * 7
    for name in quantized:
        largest = max(original[other].abs().max() for other in group_of(name))
        scale = found[name + "_scale"]
        assert scale.dtype == torch.float32 and scale.shape == () and torch.equal(scale, largest / LARGEST)
        assert found[name].dtype == torch.float8_e4m3fn and found[name].shape == original[name].shape
        assert_rounded(values[name], original[name], scale)
    kept = set(original) - set(quantized)
    assert set(found) == set(original) | {f"{name[:-7]}.{s}_scale" for name in quantized for s in ("weight", "input")}
    assert kept and all(torch.equal(found[name], original[name]) for name in kept)


def test_inputs_are_measured_under_both_system_prompts(chat, fp8, questions):
    found = tensors_of(fp8)
    normal, entropy = prompts_of(chat)
    modules = [name.removesuffix(".input_scale") for name in found if name.endswith(".input_scale")]
    measured = [input_maximum(chat, prompts, modules) for prompts in (normal, entropy)]
    for module in modules:
        largest = max(mode_options[module] for mode_options in measured)
        assert found[f"{module}.input_scale"].item() == pytest.approx(largest / LARGEST, rel=1e-5)
    assert any(measured[0][module] < 0.999 * measured[1][module] for module in modules)  # one alone would not do
    assert any(measured[1][module] < 0.999 * measured[0][module] for module in modules)
    fewer = input_maxima(chat, questions, ModesConfig(high_entropy_prompt="Guess."), questions=1)
    alone = prompts_of(chat, ModesConfig(high_entropy_prompt="Guess."))
    again = input_maximum(chat, [alone[0][0], alone[1][0]], modules)
    assert fewer == pytest.approx({f"{module}.weight": value for module, value in again.items()}, rel=1e-5)


def test_questions_are_spread_over_the_file():
    assert spread(list(range(10)), 4) == [0, 2, 5, 7]
    assert spread(list(range(3)), 256) == [0, 1, 2]


def test_block_scales(work):
    model = make_tree(
        make_model(work / "dense", "qwen2", tied=False, num_hidden_layers=2, hidden_size=256, intermediate_size=384)
    )
    tensors = tensors_of(model)
    name = "model.layers.1.mlp.gate_proj.weight"
    tensors[name][128:256] = 0.0  # scales of nothing must not be 0
    tensors[name][0, 0] = 30.0
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    cast_model(model, lambda name: torch.bfloat16)
    assert quantize(model, work / "block", "fp8-block").tensor_parallel == [1]
    original, found, values = tensors_of(model), tensors_of(work / "block"), dequantized(work / "block")
    quantized = [name for name in original if name.endswith("_proj.weight")]
    assert len(quantized) == 2 * 7
    for weight in quantized:
        rows, columns = (size // 128 for size in original[weight].shape)
        scales = found[weight + "_scale_inv"]
        assert scales.dtype == torch.float32 and scales.shape == (rows, columns)
        blocks = original[weight].float().reshape(rows, 128, columns, 128).transpose(1, 2)
        largest = blocks.abs().amax((2, 3))
        assert torch.equal(scales, torch.where(largest == 0, 1.0, largest / LARGEST))
        wide = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
        assert_rounded(values[weight], original[weight].float(), wide)
    assert not found[name][128:256].float().any() and values[name][0, 0] == 30.0
    for other in set(original) - set(quantized):
        assert found[other].dtype == torch.bfloat16 and torch.equal(found[other], original[other])
    assert set(found) == set(original) | {weight + "_scale_inv" for weight in quantized}


def test_blocks_are_those_of_modelopts_own_quantizer(work):
    """Its FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG on the whole model rounds every weight to what is written here."""
    import modelopt.torch.quantization as mtq
    from transformers import AutoModelForCausalLM

    path = make_model(work / "whole", "llama", tied=True, num_hidden_layers=1, **WHOLE_BLOCKS)
    quantize(path, work / "whole_block", "fp8-block")
    model = AutoModelForCausalLM.from_pretrained(path)
    values = dequantized(work / "whole_block")
    mtq.quantize(model, copy.deepcopy(mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG), lambda model: None)
    checked = 0
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            assert torch.allclose(module.weight_quantizer(module.weight), values[f"{name}.weight"], rtol=1e-6, atol=0)
            checked += 1
    assert checked == 7


def test_experts(work, questions):
    """Each expert's matrices have their own weight scale; all of a layer have the same input scales."""
    from transformers import AutoModelForCausalLM

    path = make_chat_model(
        work / "moe", family="qwen3_moe", num_hidden_layers=2, **WHOLE_BLOCKS, moe_intermediate_size=128
    )
    quantize(path, work / "moe_fp8", "fp8", input_maxima=maxima_of(path, questions))
    quantize(path, work / "moe_block", "fp8-block")
    original, fp8, block = (tensors_of(work / name) for name in ("moe", "moe_fp8", "moe_block"))
    experts = [name for name in original if ".mlp.experts." in name]
    assert len(experts) == 2 * 8 * 3
    for name in experts:
        largest = max(original[other].abs().max() for other in group_of(name))
        assert torch.equal(fp8[name + "_scale"], largest / LARGEST)
        assert torch.equal(block[name + "_scale_inv"].squeeze(), original[name].abs().max() / LARGEST)
        assert_rounded(dequantized(work / "moe_fp8")[name], original[name], fp8[name + "_scale"])
    for tensors in (fp8, block):
        for layer in range(2):
            gate = f"model.layers.{layer}.mlp.gate.weight"
            assert torch.equal(tensors[gate], original[gate])
    model = AutoModelForCausalLM.from_pretrained(path)
    largest = {}

    def measure(layer):
        def hook(module, inputs):
            rows = inputs[0].reshape(-1, inputs[0].shape[-1])
            name = f"model.layers.{layer}.mlp"
            chosen = (rows @ original[f"{name}.gate.weight"].t()).topk(3).indices
            inner = 0.0
            for expert in range(8):
                mine = rows[(chosen == expert).any(-1)]
                gate, up = (mine @ original[f"{name}.experts.{expert}.{p}_proj.weight"].t() for p in ("gate", "up"))
                if len(mine):
                    inner = max(inner, (torch.nn.functional.silu(gate) * up).abs().max().item())
            outer = rows.abs().max().item()
            before = largest.get(layer, (0.0, 0.0))
            largest[layer] = (max(before[0], outer), max(before[1], inner))

        return hook

    for layer in range(2):
        model.get_submodule(f"model.layers.{layer}.mlp").register_forward_pre_hook(measure(layer))
    normal, entropy = prompts_of(path)
    last_logits(model, normal + entropy)
    for name in experts:
        expected = largest[int(name.split(".")[2])]["down_proj" in name]
        assert fp8[name.replace(".weight", ".input_scale")].item() == pytest.approx(expected / LARGEST, rel=1e-4)
    ignored = ["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    assert config_of(work / "moe_fp8")["ignore"] == ignored
    assert config_of(work / "moe_block")["modules_to_not_convert"] == ignored
    assert describe(work / "moe_fp8")["quantized"].startswith("fp8 (")
    assert describe(work / "moe_block")["quantized"].startswith("fp8-block (")


def config_of(path):
    return json.loads((path / "config.json").read_text())["quantization_config"]


def test_logits_are_those_of_modelopts_own_simulation(chat, fp8):
    """Its FP8_DEFAULT_CFG on the whole model, with the weight scales of fused matrices made equal by its own export."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export.quant_utils import preprocess_linear_fusion
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(chat, dtype=torch.float32)
    prompts = sum(prompts_of(chat), [])
    plain = last_logits(model, prompts)
    mtq.quantize(model, copy.deepcopy(mtq.FP8_DEFAULT_CFG), lambda model: last_logits(model, prompts))
    for layer in model.model.layers:
        for block, group in ((layer.self_attn, FUSED[0]), (layer.mlp, FUSED[1])):
            preprocess_linear_fusion([getattr(block, name) for name in group])
    simulated, found = last_logits(model, prompts), last_logits(served_model(fp8, chat, round_inputs=True), prompts)
    error = (found - plain).abs().mean()
    assert (found - simulated).abs().mean() < 0.01 * error
    assert 0.001 < error / plain.abs().mean() < 0.25  # random weights; those of a trained model come far closer


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_in_bfloat16(tmp_path, questions, family, tied):
    sizes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 1}
    sizes |= {"moe_intermediate_size": 128} if family == "qwen3_moe" else {}
    path = make_chat_model(tmp_path / "model", family, tied=tied, **sizes)
    cast_model(path, lambda name: torch.bfloat16)
    original = tensors_of(path)
    for form in ("fp8", "fp8-block"):
        out = tmp_path / form
        quantize(path, out, form, input_maxima=maxima_of(path, questions) if form == "fp8" else None)
        assert describe(out)["dtype"] == "bfloat16, float32, float8_e4m3fn"
        values = dequantized(out)
        assert set(values) == set(original)
        for name, tensor in original.items():
            largest = tensor.float().abs().max() if name.endswith("_proj.weight") else 0.0
            assert (values[name] - tensor.float()).abs().max() <= largest * 2.0**-4, name


def test_a_complete_directory_in_shards(work):
    model = make_tree(make_model(work / "tree", "qwen3", tied=False, num_hidden_layers=2, **WHOLE_BLOCKS))
    out = work / "sharded"
    quantize(model, out, "fp8-block", max_shard_bytes=100_000)
    files = sorted(out.glob("*.safetensors"))
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(files) > 3 and set(index.values()) == {file.name for file in files}
    assert set(index) == set(tensors_of(out))
    for name in COMPANIONS:
        assert (out / name).read_bytes() == (model / name).read_bytes()
    before, after = (json.loads((path / "config.json").read_text()) for path in (model, out))
    assert after.pop("quantization_config")["weight_block_size"] == [128, 128] and after == before
    assert not list(work.glob(".*"))


def test_the_weights_that_are_quantized(chat):
    config = json.loads((chat / "config.json").read_text())
    layer = "model.layers.1"
    assert weight_groups(config)[4:] == [
        tuple(f"{layer}.self_attn.{name}_proj.weight" for name in "qkv"),
        (f"{layer}.self_attn.o_proj.weight",),
        tuple(f"{layer}.mlp.{name}_proj.weight" for name in ("gate", "up")),
        (f"{layer}.mlp.down_proj.weight",),
    ]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"intermediate_size": 12288}, [1, 2, 4, 8, 16, 32]),  # Qwen3-8B
        ({"intermediate_size": 768}, [1, 2]),
        ({"intermediate_size": 12288, "head_dim": 64}, [1, 2, 4]),
        ({"intermediate_size": 11008, "num_attention_heads": 40, "num_key_value_heads": 40}, [1, 2]),
    ],
)
def test_tensor_parallel_sizes_of_servers(sizes, expected):
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 1,
        "hidden_size": 4096,
        "num_hidden_layers": 1,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        **sizes,
    }
    assert block_tensor_parallel(config) == expected
