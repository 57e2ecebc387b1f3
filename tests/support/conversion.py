"""Checkpoints to convert, and comparing what came of them."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def make_tree(path: Path) -> Path:
    """Give a model directory what else an instruction-tuned one has."""
    for name in COMPANIONS:
        (path / name).write_text(json.dumps({"from": name}))
    (path / "additional_chat_templates").mkdir(exist_ok=True)
    (path / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    return path


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a directory of safetensors, by name."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        tensors.update({name: tensor.clone() for name, tensor in load_file(file).items()})
    return tensors


def cast_model(path: Path, dtype_of) -> Path:
    """Cast each tensor of a directory's only file to `dtype_of(name)`."""
    tensors = {name: tensor.to(dtype_of(name)) for name, tensor in tensors_of(path).items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    kinds = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
    config = json.loads((path / "config.json").read_text())
    config["dtype"] = kinds.pop() if len(kinds) == 1 else "bfloat16"
    (path / "config.json").write_text(json.dumps(config))
    return path


def edit_metadata(path, change):
    """Apply `change` to the pickled metadata of a checkpoint."""
    with (path / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    change(metadata)
    with (path / ".metadata").open("wb") as file:
        pickle.dump(metadata, file)


def assert_same_model(original: Path, found: Path) -> None:
    """The same tensors bit for bit, and the same config."""
    expected, tensors = tensors_of(original), tensors_of(found)
    assert set(tensors) == set(expected)
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype and tensors[name].shape == tensor.shape, name
        assert torch.equal(tensors[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert json.loads((Path(found) / "config.json").read_text()) == json.loads(
        (Path(original) / "config.json").read_text()
    )


def refused(work, kind, match, out=None):
    """`work` raises; nothing is left at `out` or beside it."""
    with pytest.raises(kind, match=match):
        work()
    if out is not None:
        assert not out.exists() and not list(out.parent.glob(".*"))
