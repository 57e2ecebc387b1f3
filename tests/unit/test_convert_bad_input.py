"""What conversion refuses: one error each, and nothing left that looks whole."""

import errno
import fcntl
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoints_conv.describe import describe
from checkpoints_conv.hf_to_megatron import hf_to_megatron
from checkpoints_conv.megatron_to_hf import megatron_to_hf
from checkpoints_conv.output import written_beside
from checkpoints_conv.ranks import Ranks
from megatron_policysplit.errors import CheckpointError, ModelError
from tests.support.conversion import assert_same_model, refused, tensors_of
from tests.support.hf_models import FAMILIES, make_model

UP = {"qwen3": "model.layers.1.mlp.up_proj.weight", "qwen3_moe": "model.layers.1.mlp.experts.6.up_proj.weight"}


def test_a_damaged_model_is_refused(original, family, tmp_path):
    out, name = tmp_path / "megatron", UP[family]
    tensors = tensors_of(original)

    def convert():
        hf_to_megatron(original, out)

    def save(changed):
        save_file(changed, original / "model.safetensors", metadata={"format": "pt"})

    save({key: value for key, value in tensors.items() if key != name})
    refused(convert, ModelError, f"lacks tensor {name} that {FAMILIES[family]} needs", out)
    save({**tensors, "model.extra": torch.zeros(1)})
    refused(convert, ModelError, f"has tensor model.extra that {FAMILIES[family]} does not know", out)
    save({**tensors, name: torch.zeros(7, 64)})
    refused(convert, ModelError, rf"tensor {name} in .* has shape \[7, 64\]", out)
    save(tensors)
    os.truncate(original / "model.safetensors", 5000)
    refused(convert, ModelError, "model.safetensors is cut short or damaged", out)
    (original / "model.safetensors").unlink()
    (original / "model.safetensors.index.json").write_text('{"weight_map": ')
    refused(convert, ModelError, "model.safetensors.index.json is not valid JSON", out)
    (original / "model.safetensors.index.json").unlink()
    torch.save(tensors, original / "pytorch_model.bin")
    refused(convert, ModelError, "only safetensors checkpoints are read", out)
    (original / "config.json").write_text('{"architectures": ["MambaForCausalLM"]}')
    refused(convert, ModelError, "'MambaForCausalLM' is not supported; supported are LlamaForCausalLM", out)


@pytest.mark.parametrize("family", ["qwen3"])
@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("architectures", "Qwen3ForCausalLM", "architectures='Qwen3ForCausalLM' is not a list of names"),
        ("architectures", [5], r"architectures=\[5\] is not a list of names"),
        ("tie_word_embeddings", "false", "tie_word_embeddings='false' is neither true nor false"),
        ("rms_norm_eps", None, "rms_norm_eps=None is not a positive number"),
        ("tie_word_embeddings", None, "tie_word_embeddings=null is neither true nor false; write which it is"),
        ("use_sliding_window", None, "use_sliding_window=null is neither true nor false; write which it is"),
        ("layer_types", 5, "layer_types=5 is not a list"),
        ("layer_types", ["full_attention"], "layer_types has 1 entries, but num_hidden_layers="),
        ("text_config", {"hidden_size": 64}, None),
        (
            "rope_parameters",
            {"full_attention": {"rope_type": "default", "rope_theta": 1e6}},
            "rope_parameters.full_attention holds rotary embeddings of a kind of layers of their own, which is not "
            "supported; write rope_type, rope_theta and the like into rope_parameters itself",
        ),
        ("rope_scaling", {"rope_type": "default", "sliding_attention": {}}, "rope_scaling.sliding_attention holds rot"),
        ("rope_parameters", "linear", "rope_parameters='linear' is not a JSON object"),
        ("rope_parameters", {"rope_theta": "many"}, "rope_theta='many' is not a positive number"),
        ("rope_parameters", {"rope_type": "linear", "factor": 0}, "rope_parameters.factor=0 is not a positive number"),
    ],
)
def test_a_value_of_the_config_that_is_of_another_kind_is_refused(original, tmp_path, key, value, match):
    config = json.loads((original / "config.json").read_text())
    (original / "config.json").write_text(json.dumps({**config, key: value}))
    text = f"config.json: {match}" if match else f"config.json has a `{key}` beside the keys of Qwen3ForCausalLM, as a "
    refused(lambda: hf_to_megatron(original, tmp_path / "x"), ModelError, text, tmp_path / "x")


@pytest.mark.parametrize("family", ["qwen3"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool])
def test_a_surplus_buffer_of_another_dtype_is_left_out(original, tmp_path, dtype):
    tensors = tensors_of(original)
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8).to(dtype)}
    save_file({**tensors, **buffer}, original / "model.safetensors", metadata={"format": "pt"})
    hf_to_megatron(original, tmp_path / "megatron")
    assert "inv_freq" not in str(describe(tmp_path / "megatron")) and describe(original)["dtype"] == "float32"
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert tensors_of(tmp_path / "back").keys() == tensors.keys()
    wrong = {UP["qwen3"]: tensors[UP["qwen3"]].to(dtype)}
    save_file({**tensors, **wrong}, original / "model.safetensors", metadata={"format": "pt"})
    refused(
        lambda: hf_to_megatron(original, tmp_path / "x"), ModelError, "has dtype .*; supported are F32", tmp_path / "x"
    )


NORM = "model.norm.weight"


@pytest.mark.parametrize("family", ["qwen3"])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"dtype": "BF16"}, rf"damaged: its header gives tensor {NORM} \(BF16, shape \[64\]\) the bytes"),
        ({"shape": [32]}, rf"damaged: its header gives tensor {NORM} \(F32, shape \[32\]\) the bytes"),
        ({"shape": [64.0]}, "header does not parse"),
        ({"data_offsets": [0, 256]}, "is cut short or damaged|damaged: its header gives tensor"),
    ],
    ids=["dtype", "shape", "fraction", "offsets"],
)
def test_a_header_that_its_data_contradict_is_refused(original, change, match):
    """safetensors itself would refuse to open the file, in words of its own and only when it is too late."""
    file = original / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header[NORM].update(change)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    refused(lambda: describe(original), ModelError, match)


@pytest.mark.parametrize("family", ["qwen3"])
def test_an_index_that_its_files_contradict_is_refused(original):
    tensors = tensors_of(original)
    names = sorted(tensors)
    (original / "model.safetensors").unlink()
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    whole = {name: file for file, part in parts.items() for name in part}

    def write(weight_map, parts=parts):
        for file, part in parts.items():
            save_file({name: tensors[name] for name in part}, original / file)
        (original / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    write(whole)
    assert "2 files" in describe(original)["format"]
    write({**whole, NORM: 5})
    refused(lambda: describe(original), ModelError, f"places tensor {NORM} in 5, which is no name of a file")
    write({**whole, NORM: "x" * 300})
    refused(lambda: describe(original), ModelError, "xxx is missing, but .*index.json names it")
    write({name: file for name, file in whole.items() if name != NORM})
    refused(lambda: describe(original), ModelError, f"does not name tensor {NORM}")
    write(whole, {**parts, "b.safetensors": names[4:]})
    refused(lambda: describe(original), ModelError, f"tensor {names[4]} is in .*a.safetensors and in .*b.safetensors")


def test_a_tied_head_of_its_own_is_refused(family, tmp_path):
    """transformers unties such a model, so that to leave the head out would be to lose it."""
    original = make_model(tmp_path / "hf", family, tied=True, num_hidden_layers=2)
    tensors = tensors_of(original)
    embedding = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embedding.clone()}, original / "model.safetensors")
    hf_to_megatron(original, tmp_path / "same")
    save_file({**tensors, "lm_head.weight": embedding * 2}, original / "model.safetensors")
    match = "has a lm_head.weight that differs from model.embed_tokens.weight, although config.json has tie_word"
    refused(lambda: hf_to_megatron(original, tmp_path / "x"), ModelError, match, tmp_path / "x")
    refused(lambda: describe(original), ModelError, match)


def test_an_output_that_is_taken_is_refused(original, converted, tmp_path):
    before = (converted / "metadata.json").stat().st_mtime_ns
    with pytest.raises(ModelError, match="--out .*megatron exists and is not an empty directory"):
        hf_to_megatron(original, converted)
    with pytest.raises(ModelError, match="--out .*hf exists and is not an empty directory"):
        megatron_to_hf(converted, original)
    assert (converted / "metadata.json").stat().st_mtime_ns == before
    (tmp_path / "empty").mkdir()
    megatron_to_hf(converted, tmp_path / "empty")
    assert_same_model(original, tmp_path / "empty")
    with pytest.raises(ModelError, match="is not an empty directory"):
        megatron_to_hf(converted, original / "config.json")


@pytest.mark.parametrize("family", ["qwen3"])
def test_an_output_that_could_not_be_renamed_to_is_refused_at_once(original, tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    (tmp_path / "link").symlink_to(here)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    monkeypatch.chdir(here)
    for out in (Path("."), here, tmp_path / "link", tmp_path / "dangling"):
        with pytest.raises(ModelError, match="--out .* is a link or the current directory; name a new directory"):
            hf_to_megatron(original, out)
    with pytest.raises(ModelError, match="--out .*x.partial ends in .partial, as what an interrupted write leaves"):
        hf_to_megatron(original, tmp_path / "x.partial")
    with pytest.raises(ModelError, match="--out .*File name too long.*choose another path"):
        hf_to_megatron(original, tmp_path / ("x" * 300))
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "here", "link", "dangling"}
    assert not list(here.iterdir())


@pytest.mark.parametrize("family", ["qwen3"])
@pytest.mark.parametrize("locks", [True, False], ids=["locks", "no locks"])
def test_two_writers_of_one_output(original, tmp_path, monkeypatch, locks):
    """The second is refused; where the file system has no locks the first is, and the second's model stands."""

    def no_locks(*arguments):
        raise OSError(errno.ENOSYS, "Function not implemented")

    if not locks:
        monkeypatch.setattr(fcntl, "flock", no_locks)
    out = tmp_path / "x"
    with pytest.raises(ModelError, match="--out .*x is being written by another process"):
        with written_beside(out, Ranks()) as partial:
            (partial / "metadata.json").write_text("{}")
            hf_to_megatron(original, out)
            assert not locks
    if not locks:
        assert describe(out)
    assert {path.name for path in tmp_path.iterdir()} == ({"hf"} if locks else {"hf", "x"})


@pytest.mark.parametrize("family", ["qwen3_moe"])
def test_more_files_than_may_be_open(original, converted, tmp_path, monkeypatch):
    """A file for each tensor of many experts; half of them would be open at the end."""
    import checkpoints_conv.writer as writer

    monkeypatch.setattr(writer, "MOST_OPEN", 3)
    opened, most, real_open, real_close = set(), [0], os.open, os.close

    def watched_open(path, *arguments, **options):
        descriptor = real_open(path, *arguments, **options)
        if str(path).endswith(".safetensors") and arguments == (os.O_WRONLY,):
            opened.add(descriptor)
            most[0] = max(most[0], len(opened))
        return descriptor

    def watched_close(descriptor):
        opened.discard(descriptor)
        real_close(descriptor)

    monkeypatch.setattr(os, "open", watched_open)
    monkeypatch.setattr(os, "close", watched_close)
    megatron_to_hf(converted, tmp_path / "x", max_shard_bytes=1)
    assert most[0] == 3 and not opened
    assert_same_model(original, tmp_path / "x")


def test_a_disk_without_room_is_refused_before_anything_is_written(original, converted, tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    for convert in (
        lambda: hf_to_megatron(original, tmp_path / "x"),
        lambda: megatron_to_hf(converted, tmp_path / "x"),
    ):
        refused(convert, ModelError, r"no space left for --out .*x: 0.00 GB are needed, 0.00 GB free", tmp_path / "x")


def test_a_disk_that_runs_full(original, converted, tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda *arguments: (_ for _ in ()).throw(full))
        refused(lambda: megatron_to_hf(converted, tmp_path / "x"), ModelError, "no space left for .*x", tmp_path / "x")
    import checkpoints_conv.torch_dist as torch_dist

    class Full(torch_dist._Stream):
        written = 0

        def write(self, data):
            Full.written += len(data)
            if Full.written > 100_000:
                self.error = full
                raise full
            return super().write(data)

    with monkeypatch.context() as patch:
        patch.setattr(torch_dist, "_Stream", Full)
        refused(lambda: hf_to_megatron(original, tmp_path / "x"), ModelError, "no space left for .*x", tmp_path / "x")
    assert Full.written > 100_000


def test_companions_must_be_found(original, converted, tmp_path):
    (converted / "hf").rename(tmp_path / "elsewhere")
    refused(lambda: describe(converted), CheckpointError, "has no hf/config.json and is in no run; name .* with --hf")
    assert describe(converted, original) == describe(converted, tmp_path / "elsewhere") | {
        "config and tokenizer": str(original)
    }
    step = tmp_path / "run" / "checkpoints" / "step_000001"
    step.parent.mkdir(parents=True)
    converted.rename(step)
    (step / "trainer.json").write_text('{"state": {"step": 1}}')
    (tmp_path / "run" / "config.yaml").write_text("model: {path: gone}\n")
    refused(lambda: describe(step), CheckpointError, "model.path=gone is not a directory here; name .* with --hf")
    (tmp_path / "run" / "config.yaml").write_text("train: {}\n")
    refused(lambda: describe(step), CheckpointError, "config.yaml has no model.path .*; name the model with --hf")
    (tmp_path / "run" / "config.yaml").write_text(f"model: {{path: {original}}}\n")
    assert describe(step)["training step"] == "1"
