"""Hugging Face -> Megatron -> Hugging Face without a model, and what is refused."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import MetadataIndex

from checkpoints_conv import check_safetensors, read_hf_config
from checkpoints_conv.describe import describe
from checkpoints_conv.hf_to_megatron import hf_to_megatron
from checkpoints_conv.megatron_reader import MegatronCheckpoint
from checkpoints_conv.megatron_to_hf import megatron_to_hf
from checkpoints_conv.verify import verify
from megatron_policysplit.errors import ModelError
from tests.support.conversion import COMPANIONS, assert_same_model, cast_model, edit_metadata, make_tree, tensors_of
from tests.support.hf_models import FAMILIES, make_model

BOTH = (False, True)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {(f, tied): make_tree(make_model(root / f"{f}-{tied}", f, tied=tied)) for f in FAMILIES for tied in BOTH}


@pytest.fixture(params=["mistral", "qwen3", "qwen3_moe"])
def original(request, tmp_path):
    """A small untied model that a test may damage."""
    return make_tree(make_model(tmp_path / "hf", request.param, tied=False, num_hidden_layers=2))


@pytest.fixture
def converted(original, tmp_path):
    hf_to_megatron(original, tmp_path / "megatron")
    return tmp_path / "megatron"


# Round trips


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", BOTH)
def test_there_and_back_keeps_every_bit(originals, tmp_path, family, tied):
    original = originals[family, tied]
    hf_to_megatron(original, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", max_shard_bytes=100_000)
    assert_same_model(original, tmp_path / "back")
    assert list(check_safetensors(tmp_path / "back")) and len(list((tmp_path / "back").glob("*.safetensors"))) > 2
    for name in (*COMPANIONS, "additional_chat_templates/tools.jinja"):
        assert (tmp_path / "back" / name).read_bytes() == (original / name).read_bytes()
    assert verify(original, tmp_path / "megatron").tensors == len(tensors_of(original))


@pytest.mark.parametrize(
    "dtype_of",
    [
        lambda name: torch.bfloat16,
        lambda name: torch.float16,
        lambda name: torch.float32 if "norm" in name else torch.bfloat16,
    ],
    ids=["bf16", "fp16", "norms in fp32"],
)
@pytest.mark.parametrize("family", ["mistral", "qwen3", "qwen3_moe"])
def test_there_and_back_keeps_dtypes(tmp_path, family, dtype_of):
    original = cast_model(make_model(tmp_path / "hf", family, tied=False, vocab=33), dtype_of)
    hf_to_megatron(original, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert_same_model(original, tmp_path / "back")


def test_layers_of_different_dtypes_are_stored_in_one_that_holds_both(tmp_path):
    """torch_dist has one dtype for a key, and all layers share it."""
    original = make_model(tmp_path / "hf", "llama", tied=True)
    cast_model(original, lambda name: torch.float16 if ".layers.0." in name else torch.bfloat16)
    hf_to_megatron(original, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    for name, tensor in tensors_of(original).items():
        back = tensors_of(tmp_path / "back")[name]
        assert back.dtype == (torch.float32 if ".layers." in name else torch.bfloat16)
        assert torch.equal(back, tensor.to(back.dtype)), name


def test_experts_of_different_dtypes_are_stored_in_one_that_holds_both(tmp_path):
    """All experts share a key as well."""
    original = make_model(tmp_path / "hf", "qwen3_moe", tied=False, num_hidden_layers=1)
    cast_model(original, lambda name: torch.float16 if ".experts.5." in name else torch.bfloat16)
    hf_to_megatron(original, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    for name, tensor in tensors_of(original).items():
        back = tensors_of(tmp_path / "back")[name]
        assert back.dtype == (torch.float32 if ".experts." in name else torch.bfloat16)
        assert torch.equal(back, tensor.to(back.dtype)), name


def test_bits_survive_nan_infinity_and_denormals(original, tmp_path):
    tensors = tensors_of(original)
    odd = tensors["model.norm.weight"]
    odd[:5] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-42, -float("inf")])
    odd.view(torch.int32)[5] = 0x7FC12345  # a NaN with a payload
    save_file(tensors, original / "model.safetensors", metadata={"format": "pt"})
    hf_to_megatron(original, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert_same_model(original, tmp_path / "back")


def test_a_sharded_source_is_read_too(original, tmp_path):
    hf_to_megatron(original, tmp_path / "1")
    megatron_to_hf(tmp_path / "1", tmp_path / "sharded", max_shard_bytes=60_000)
    hf_to_megatron(tmp_path / "sharded", tmp_path / "2")
    megatron_to_hf(tmp_path / "2", tmp_path / "back")
    assert_same_model(original, tmp_path / "back")


def test_the_second_copy_of_a_tied_head_is_left_out(originals, tmp_path):
    original = make_model(tmp_path / "hf", "qwen3", tied=True)
    tensors = tensors_of(original)
    copied = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(copied, original / "model.safetensors", metadata={"format": "pt"})
    hf_to_megatron(original, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert set(tensors_of(tmp_path / "back")) == set(tensors)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3_moe"])
def test_what_transformers_loads_computes_the_same(originals, tmp_path, family):
    from transformers import AutoModelForCausalLM

    original = originals[family, False]
    hf_to_megatron(original, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", max_shard_bytes=100_000)
    ids = torch.randint(0, 131, (2, 16), generator=torch.Generator().manual_seed(3))
    logits = [AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (original, tmp_path / "back")]
    assert torch.equal(*logits)


# Casts


def test_casts(original, tmp_path):
    with pytest.raises(ModelError, match=r"--dtype bfloat16 would round tensor .*\(float32\) and .* more; add"):
        hf_to_megatron(original, tmp_path / "megatron", dtype="bfloat16")
    assert not (tmp_path / "megatron").exists()
    hf_to_megatron(original, tmp_path / "megatron", dtype="bfloat16", allow_downcast=True)
    expected = {name: tensor.bfloat16() for name, tensor in tensors_of(original).items()}
    assert verify(original, tmp_path / "megatron").cast == len(expected)
    with pytest.raises(ModelError, match=r"--dtype float16 would round .*\(bfloat16\)"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "back", dtype="float16")
    for dtype in ("bfloat16", "float32", "float16"):
        out = tmp_path / dtype
        megatron_to_hf(tmp_path / "megatron", out, dtype=dtype, allow_downcast=dtype == "float16")
        assert read_hf_config(out)["dtype"] == dtype
        for name, tensor in tensors_of(out).items():
            assert torch.equal(tensor, expected[name].to(getattr(torch, dtype))), name


# Written files


def test_files_are_those_that_safetensors_itself_writes(original, converted, tmp_path):
    megatron_to_hf(converted, tmp_path / "back")
    with safe_open(tmp_path / "back" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(tensors_of(original))
    data = (tmp_path / "back" / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert int.from_bytes(data[:8], "little") % 8 == 0
    spans = sorted(entry["data_offsets"] for name, entry in header.items() if name != "__metadata__")
    assert spans[0][0] == 0 and all(a[1] == b[0] for a, b in zip(spans, spans[1:], strict=False))


def test_shards_hold_no_more_than_asked(original, converted, tmp_path):
    megatron_to_hf(converted, tmp_path / "back", max_shard_bytes=50_000)
    files = list((tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 3
    for file in files:
        assert sum(tensor.nbytes for tensor in load_file(file).values()) <= 50_000
    assert not list(tmp_path.glob(".*"))


def test_inspect(original, converted, tmp_path):
    assert describe(original)["format"] == "Hugging Face safetensors, 1 file"
    for path in (original, converted):
        found = describe(path)
        assert found["architecture"] == read_hf_config(original)["architectures"][0] and found["dtype"] == "float32"
        experts = "8 in each layer, inner width 40" if "Moe" in found["architecture"] else None
        assert found.get("experts") == experts
        tensors = tensors_of(original)
        assert found["parameters"].startswith(f"{sum(t.numel() for t in tensors.values()):,} in {len(tensors)} tensors")
    assert describe(converted)["format"] == "Megatron-Core torch_dist, 1 file"
    assert describe(converted)["optimizer"] == "none"
    assert MegatronCheckpoint(converted).vocabulary_padding == 0


# Verify


def test_verify_names_what_differs(original, converted):
    tensors = tensors_of(original)
    tensors["model.layers.1.self_attn.v_proj.weight"][3, 5] += 0.5
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, original / "model.safetensors", metadata={"format": "pt"})
    match = r"2 of \d+ tensors of .* differ from .*v_proj.weight \(by up to 0.5\), model.norm.weight \(by up to nan\)"
    with pytest.raises(ModelError, match=match):
        verify(original, converted)


def test_verify_names_the_expert_that_differs(tmp_path):
    original = make_model(tmp_path / "hf", "qwen3_moe", tied=True, num_hidden_layers=2)
    hf_to_megatron(original, tmp_path / "megatron")
    tensors = tensors_of(original)
    tensors["model.layers.1.mlp.experts.6.down_proj.weight"][7, 3] += 0.25
    tensors["model.layers.0.mlp.gate.weight"][2] += 1
    save_file(tensors, original / "model.safetensors", metadata={"format": "pt"})
    match = (
        r"2 of \d+ tensors .*layers.0.mlp.gate.weight \(by up to 1\), .*experts.6.down_proj.weight \(by up to 0.25\)"
    )
    with pytest.raises(ModelError, match=match):
        verify(original, tmp_path / "megatron")


def test_verify_compares_the_copy_of_the_norm_before_experts(tmp_path):
    """Which Megatron-Core's own layers read, and Transformer Engine's do not."""
    original = make_model(tmp_path / "hf", "qwen3_moe", tied=True, num_hidden_layers=2)
    hf_to_megatron(original, tmp_path / "megatron")
    copies = {"decoder.layers.mlp.linear_fc1.layer_norm_weight": "decoder.layers.pre_mlp_layernorm.weight"}

    def take_the_other_layer(metadata):
        for index, place in metadata.storage_data.items():
            if index.fqn in copies and index.offset[0] == 0:
                place.offset = metadata.storage_data[MetadataIndex(copies[index.fqn], [1, 0])].offset

    edit_metadata(tmp_path / "megatron", take_the_other_layer)
    with pytest.raises(ModelError, match=r"1 of \d+ tensors of .*model.layers.0.post_attention_layernorm.weight"):
        verify(original, tmp_path / "megatron")


def test_verify_compares_configs(original, converted):
    config = json.loads((original / "config.json").read_text())
    (original / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    with pytest.raises(ModelError, match="config.json: rms_norm_eps=1e-06 in .*hf but 0.5 in"):
        verify(original, converted)
