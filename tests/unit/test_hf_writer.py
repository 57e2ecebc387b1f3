"""Hugging Face directories are written whole or not at all."""

import json

import pytest
import torch
from safetensors.torch import load_file

from checkpoints_conv import check_safetensors, read_hf_config, write_hf
from megatron_policysplit.errors import ModelError
from tests.support.conversion import tensors_of
from tests.support.hf_models import make_model

FAMILIES = ("llama", "qwen2", "qwen3")


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {(f, tied): make_model(root / f"{f}-{tied}", f, tied=tied) for f in FAMILIES for tied in (False, True)}


def test_written_directory_is_what_transformers_loads(originals, tmp_path):
    from transformers import AutoModelForCausalLM

    source = originals["qwen2", True]
    companions = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
    (tmp_path / "source").mkdir()
    for file in source.iterdir():
        (tmp_path / "source" / file.name).write_bytes(file.read_bytes())
    for name in companions:
        (tmp_path / "source" / name).write_text("{}")
    (tmp_path / "source" / "optimizer.bin").write_text("not to be copied")
    tensors = load_file(source / "model.safetensors")
    target = tmp_path / "target"
    write_hf(target, tmp_path / "source", iter(tensors.items()), torch.bfloat16, max_shard_bytes=40_000)

    assert not (tmp_path / ".target.partial").exists()
    shards = sorted(target.glob("*.safetensors"))
    assert len(shards) > 2 and all(f"-of-{len(shards):05d}" in shard.name for shard in shards)
    assert all((target / name).exists() for name in companions) and not (target / "optimizer.bin").exists()
    written = read_hf_config(target)
    assert written["architectures"] == ["Qwen2ForCausalLM"]
    assert written.get("dtype", written.get("torch_dtype")) == "bfloat16"
    assert set(check_safetensors(target)) == set(tensors)
    loaded = AutoModelForCausalLM.from_pretrained(target)
    assert loaded.dtype == torch.bfloat16
    for name, tensor in loaded.state_dict().items():
        if name in tensors:
            assert torch.equal(tensor, tensors[name].bfloat16()), name


def test_shards_hold_no_more_than_asked(originals, tmp_path):
    source = originals["llama", False]
    tensors = load_file(source / "model.safetensors")
    largest = max(tensor.nbytes for tensor in tensors.values())
    write_hf(tmp_path / "t", source, tensors.items(), torch.float32, max_shard_bytes=largest)
    for shard in (tmp_path / "t").glob("*.safetensors"):
        assert sum(tensor.nbytes for tensor in load_file(shard).values()) <= largest
    total = json.loads((tmp_path / "t" / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    assert total == sum(tensor.nbytes for tensor in tensors.values())


def test_a_failed_write_leaves_the_old_model(originals, tmp_path):
    source, target = originals["llama", False], tmp_path / "target"
    tensors = tensors_of(source)
    write_hf(target, source, tensors.items(), torch.float32)
    before = (target / "model.safetensors").read_bytes()

    def breaks():
        yield next(iter(tensors.items()))
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write_hf(target, source, breaks(), torch.float32)
    assert (target / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    doubled = {name: tensor * 2 for name, tensor in tensors.items()}
    write_hf(target, source, doubled.items(), torch.float32)
    assert torch.equal(load_file(target / "model.safetensors")["lm_head.weight"], doubled["lm_head.weight"])


def test_a_killed_write_is_cleaned_up_by_the_next(originals, tmp_path):
    source, target = originals["llama", False], tmp_path / "target"
    tensors = load_file(source / "model.safetensors")
    (tmp_path / ".target.partial").mkdir()
    (tmp_path / ".target.partial" / "config.json").write_text("{}")
    (tmp_path / ".target.previous").mkdir()
    (tmp_path / ".target.previous" / "config.json").write_text("{}")
    write_hf(target, source, tensors.items(), torch.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert set(check_safetensors(target)) == set(tensors)


def test_a_directory_that_is_no_model_is_not_replaced(originals, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ModelError, match="is not a Hugging Face model directory; choose another path"):
        write_hf(tmp_path, originals["llama", False], [("x", torch.zeros(1))], torch.float32)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_only_whole_models_are_written(originals, tmp_path):
    source, target = originals["qwen3", True], tmp_path / "target"
    tensors = tensors_of(source)
    name = "model.layers.3.mlp.up_proj.weight"
    some = [(key, tensor) for key, tensor in tensors.items() if key != name]
    for given, message in (
        (some, f"tensor {name} of the model was not given"),
        ([*tensors.items(), (name, tensors[name])], f"tensor {name} was given twice or is none of the model's"),
        ([("model.ghost", torch.zeros(1))], "tensor model.ghost was given twice or is none of the model's"),
        ([(name, torch.zeros(3, 3))], rf"tensor {name} in what was to be written has shape \[3, 3\]"),
    ):
        with pytest.raises(ModelError, match=message):
            write_hf(target, source, given, torch.float32)
        assert not any(tmp_path.iterdir())
    write_hf(target, source, [*tensors.items(), ("lm_head.weight", torch.zeros(131, 64))], torch.float32)
    assert set(check_safetensors(target)) == set(tensors)


def test_what_a_killed_writer_left_is_no_model(originals, tmp_path):
    left = tmp_path / ".target.partial"
    write_hf(tmp_path / "target", originals["qwen3", True], tensors_of(originals["qwen3", True]).items(), torch.float32)
    (tmp_path / "target").rename(left)
    with pytest.raises(ModelError, match="is the rest of a write that was interrupted; remove it"):
        check_safetensors(left)
