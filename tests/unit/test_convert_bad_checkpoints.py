"""What conversion refuses of checkpoints: one error each, and nothing left that looks whole."""

import os
import pickle

import pytest
import torch

from checkpoints_conv.describe import describe
from checkpoints_conv.hf_to_megatron import hf_to_megatron
from checkpoints_conv.megatron_to_hf import megatron_to_hf
from checkpoints_conv.ranks import Ranks
from megatron_policysplit.errors import CheckpointError, ModelError
from tests.support.conversion import assert_same_model, edit_metadata, refused
from tests.support.hf_models import make_model

QKV = "decoder.layers.self_attention.linear_qkv.weight"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: m.state_dict_metadata.pop(QKV), rf"lacks tensor {QKV} that Qwen3\w*ForCausalLM needs"),
        (
            lambda m: m.state_dict_metadata.update({"decoder.extra": m.state_dict_metadata[QKV]}),
            r"has tensor decoder.extra that Qwen3\w*ForCausalLM",
        ),
        (
            lambda m: setattr(m.state_dict_metadata[QKV], "size", torch.Size([2, 5, 64])),
            rf"tensor {QKV} in .* has shape \[2, 5, 64\], but config.json of .* makes it \[2, 192, 64\]",
        ),
        (lambda m: m.state_dict_metadata[QKV].chunks.pop(), f"tensor {QKV} in .* has gaps"),
        (
            lambda m: setattr(m.state_dict_metadata[QKV].properties, "dtype", torch.int32),
            f"tensor {QKV} in .* has dtype int32; supported are float32, bfloat16, float16",
        ),
        (
            lambda m: [m.storage_data.pop(index) for index in list(m.storage_data) if index.fqn == QKV],
            f"does not say where a part of tensor {QKV} is",
        ),
        (
            lambda m: [setattr(v, "relative_path", "../x.distcp") for k, v in m.storage_data.items() if k.fqn == QKV],
            "names .*x.distcp, which is outside the checkpoint",
        ),
    ],
    ids=["missing", "extra", "misshapen", "gap", "dtype", "unplaced", "outside"],
)
def test_a_damaged_checkpoint_is_refused(converted, tmp_path, change, match):
    edit_metadata(converted, change)
    refused(lambda: megatron_to_hf(converted, tmp_path / "x"), CheckpointError, match, tmp_path / "x")
    refused(lambda: describe(converted), CheckpointError, match)


EXPERTS = "decoder.layers.mlp.experts.experts.linear_fc1.weight"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda m: m.state_dict_metadata.pop(EXPERTS),
            f"lacks tensor {EXPERTS} that Qwen3MoeForCausalLM needs",
        ),
        (
            lambda m: setattr(m.state_dict_metadata[EXPERTS], "size", torch.Size([2, 7, 80, 64])),
            rf"tensor {EXPERTS} in .* has shape \[2, 7, 80, 64\], but config.json of .* makes it \[2, 8, 80, 64\]",
        ),
        (
            lambda m: m.state_dict_metadata[EXPERTS].chunks.pop(5),
            f"tensor {EXPERTS} in .* has gaps",
        ),
        (
            lambda m: m.state_dict_metadata.pop("decoder.layers.mlp.router.weight"),
            "lacks tensor decoder.layers.mlp.router.weight",
        ),
    ],
    ids=["missing", "misshapen", "gap", "router"],
)
@pytest.mark.parametrize("family", ["qwen3_moe"])
def test_damaged_experts_are_refused(converted, tmp_path, change, match):
    edit_metadata(converted, change)
    refused(lambda: megatron_to_hf(converted, tmp_path / "x"), CheckpointError, match, tmp_path / "x")


@pytest.mark.parametrize("family", ["qwen3_moe"])
def test_the_norm_before_experts_is_read_from_either_key(original, converted, tmp_path):
    """Megatron-Core's own layers and Transformer Engine's store it under one each."""
    keys = ["decoder.layers.mlp.linear_fc1.layer_norm_weight", "decoder.layers.pre_mlp_layernorm.weight"]
    removed = {}
    for key in keys:
        edit_metadata(converted, lambda m, key=key: removed.update({key: m.state_dict_metadata.pop(key)}))
        megatron_to_hf(converted, tmp_path / f"without {key}")
        assert_same_model(original, tmp_path / f"without {key}")
        edit_metadata(converted, lambda m: m.state_dict_metadata.update(removed))
    edit_metadata(converted, lambda m: [m.state_dict_metadata.pop(key) for key in keys])
    refused(lambda: describe(converted), CheckpointError, f"lacks tensor {keys[1]} that Qwen3MoeForCausalLM needs")


def test_damaged_files_of_a_checkpoint_are_refused(converted, tmp_path):
    data = converted / "__0_0.distcp"
    content = data.read_bytes()
    os.truncate(data, len(content) - 3000)
    refused(lambda: describe(converted), CheckpointError, "__0_0.distcp is cut short: tensor .* ends at byte")
    data.unlink()
    refused(lambda: describe(converted), CheckpointError, "__0_0.distcp is missing, but holds a part of tensor")
    data.write_bytes(b"\0" * len(content))
    match = "tensor embedding.word_embeddings.weight in .* cannot be read: its bytes are damaged"
    refused(lambda: megatron_to_hf(converted, tmp_path / "x"), CheckpointError, match, tmp_path / "x")
    data.write_bytes(content)
    for name in ("common.pt", "metadata.json"):
        kept = (converted / name).read_bytes()
        (converted / name).unlink()
        refused(lambda: describe(converted), CheckpointError, f"{name}.*is not complete")
        (converted / name).write_bytes(kept)
    (converted / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    refused(lambda: describe(converted), CheckpointError, "sharded_backend='zarr'; only 'torch_dist' is supported")


def test_pickles_are_not_read(converted, tmp_path):
    class Call:
        def __reduce__(self):
            return (open, (str(tmp_path / "marker"), "w"))

    (converted / ".metadata").write_bytes(pickle.dumps(Call()))
    refused(lambda: megatron_to_hf(converted, tmp_path / "x"), CheckpointError, r"it names \w+\.open", tmp_path / "x")
    # A tensor's bytes may be a pickle of something else as well.
    legacy = tmp_path / "legacy" / "mp_rank_00"
    legacy.mkdir(parents=True)
    torch.save({"model": Call()}, legacy / "model_optim_rng.pt")
    refused(lambda: megatron_to_hf(legacy.parent, tmp_path / "x"), CheckpointError, "pickled checkpoints .* not read")
    assert not (tmp_path / "marker").exists()


def test_a_pickle_in_place_of_a_tensor_is_not_run(converted, tmp_path):
    class Call:
        def __reduce__(self):
            return (open, (str(tmp_path / "marker"), "w"))

    torch.save(Call(), converted / "evil.distcp")
    size = (converted / "evil.distcp").stat().st_size

    def swap(metadata):
        for index, place in metadata.storage_data.items():
            if index.fqn == "decoder.final_layernorm.weight":
                place.relative_path, place.offset, place.length = "evil.distcp", 0, size

    edit_metadata(converted, swap)
    match = "tensor decoder.final_layernorm.weight in .* cannot be read"
    refused(lambda: megatron_to_hf(converted, tmp_path / "x"), CheckpointError, match, tmp_path / "x")
    assert not (tmp_path / "marker").exists()


def test_a_tensor_that_no_process_has_written(tmp_path, monkeypatch):
    """A gap in what processes share would be a hole of zeros."""

    original = make_model(tmp_path / "model", "llama", tied=False)
    hf_to_megatron(original, tmp_path / "megatron")
    monkeypatch.setattr(Ranks, "share", lambda self, items, size_of: list(items)[:-1])
    with pytest.raises(ModelError, match="tensor lm_head.weight of the model was not given; nothing is kept"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_directory_of_iterations(tmp_path):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("100")
    (tmp_path / "iter_0000100").mkdir()
    with pytest.raises(CheckpointError, match="give one of its iter_\\* directories"):
        megatron_to_hf(tmp_path, tmp_path / "out", hf=tmp_path)
