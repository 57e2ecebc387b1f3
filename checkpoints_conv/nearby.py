"""Which directory is meant where another one near it is given: a run, or one that holds several."""

from __future__ import annotations

import re
from pathlib import Path

from checkpoints_conv.output import is_partial

CONFIG = "config.json"
# Of a converted checkpoint, for config.json, tokenizer and the like; of a run, its exported model.
COMPANIONS = "hf"
CHECKPOINTS = "checkpoints"  # of a run


def is_megatron(path: Path) -> bool:
    """Whether the directory looks like a torch_dist checkpoint, whole or not."""
    return (path / ".metadata").exists() or (path / "metadata.json").exists()


def newest_checkpoint(path: Path) -> Path | None:
    """The torch_dist checkpoint with the highest number in a directory of them, or in a run.

    None if there is none.
    """
    for directory in (path, path / CHECKPOINTS):
        checkpoints = [child for child in _directories(directory) if is_megatron(child)]
        if checkpoints:
            return max(checkpoints, key=_number)
    return None


def hf_remedy(path: Path) -> str:
    """What to give instead of a directory that has no config.json."""
    if is_megatron(path):
        return f"this is a Megatron-Core checkpoint; {_conversion(path)}"
    # A run, a directory of models, or a model in the cache of huggingface_hub.
    models = [
        child
        for child in (*_directories(path), *_directories(path / "snapshots"))
        if (child / CONFIG).is_file() and any(child.glob("*.safetensors"))
    ]
    if models:
        return f"give {max(models, key=_order_of_models)}, which is a Hugging Face model directory"
    if (checkpoint := newest_checkpoint(path)) is not None:
        return f"{checkpoint} is a Megatron-Core checkpoint; {_conversion(checkpoint)}"
    return "a Hugging Face model directory needs it"


def megatron_remedy(path: Path) -> str | None:
    """What is wrong with a directory that is no torch_dist checkpoint, and what to give instead.

    None where nothing near it is one.
    """
    if (checkpoint := newest_checkpoint(path)) is not None:
        what = "holds checkpoints" if checkpoint.parent == path else "is a run"
        return f"{path} {what}; give one of its checkpoints, such as {checkpoint}"
    if path.name == COMPANIONS and is_megatron(path.parent):
        return f"{path} is a part of a checkpoint; give {path.parent}"
    if (path / CONFIG).is_file():
        return (
            f"{path} is a Hugging Face directory, not a Megatron-Core checkpoint; make one of it "
            f"with `policysplit convert hf-to-megatron --hf {path} --out DIR`"
        )
    if (path / CHECKPOINTS).is_dir():
        return f"{path} is a run that has no checkpoint yet; give a checkpoint of another run"
    return None


def _conversion(checkpoint: Path) -> str:
    return (
        "make a Hugging Face directory of it with `policysplit convert megatron-to-hf --megatron "
        f"{checkpoint} --out DIR`"
    )


def _order_of_models(path: Path) -> tuple[bool, int, str]:
    """Last: a run's exported model, else the one with the highest number."""
    return path.name == COMPANIONS, *_number(path)


def _directories(path: Path) -> list[Path]:
    """The directories in `path` that are complete; none if it is no directory or is locked."""
    try:
        return [child for child in path.iterdir() if child.is_dir() and not is_partial(child)]
    except OSError:
        return []


def _number(path: Path) -> tuple[int, str]:
    """By number, then by name: step_000010 comes after step_000009, iter_0000002 before both."""
    match = re.search(r"(\d+)$", path.name)
    return int(match[1]) if match else -1, path.name
