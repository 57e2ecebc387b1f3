"""Reads what a checkpoint directory says without its weights.

Imports no torch, so that the checks before a run starts can use it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from checkpoints_conv import model_keys
from megatron_policysplit.errors import CheckpointError

NAME = re.compile(r"step_(\d{6,})")


def checkpoint_path(directory: Path, step: int) -> Path:
    """The directory of the checkpoint after `step` rollout batches."""
    return directory / f"step_{step:06d}"


def complete(directory: Path) -> list[Path]:
    """List the complete checkpoints in `directory`, oldest first."""
    # The name says that they are complete: `checkpoint.save` gives it last.
    checkpoints = [
        (int(match[1]), path)
        for path in directory.glob("step_*")
        if (match := NAME.fullmatch(path.name))
    ]
    return [path for _, path in sorted(checkpoints)]


def read_trainer_json(path: Path) -> dict[str, Any]:
    """Read trainer.json of a checkpoint: "state", "model", "layout", and "files" in newer ones.

    Raises CheckpointError if it is missing, no JSON, or without one of the first three.
    """
    try:
        content = json.loads((path / "trainer.json").read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("trainer.json is not a mapping")
        for key in ("state", "model", "layout"):
            if not isinstance(content[key], dict):
                raise ValueError(f"{key} in trainer.json is not a mapping")
        if not isinstance(content["state"]["step"], int):
            raise ValueError("state.step in trainer.json is not an integer")
    except (OSError, ValueError) as error:
        raise damaged(path, str(error)) from error
    except KeyError as error:
        raise damaged(path, f"trainer.json has no {error}") from error
    return content


def file_sizes(path: Path) -> dict[str, int]:
    """The bytes of every file of a checkpoint but trainer.json, by name."""
    return {
        file.name: file.stat().st_size
        for file in sorted(path.iterdir())
        if file.is_file() and file.name != "trainer.json"
    }


def check_files(path: Path) -> None:
    """Raise CheckpointError if a file of a checkpoint is missing or not as long as it was saved.

    Checkpoints whose trainer.json has no "files" pass; they are looked at when they are loaded.
    """
    sizes = read_trainer_json(path).get("files", {})
    for name, size in sizes.items():
        file = path / name
        if not file.is_file():
            raise damaged(path, f"{name} is missing")
        if file.stat().st_size != size:
            raise damaged(path, f"{name} has {file.stat().st_size} bytes, saved were {size}")


def damaged(path: Path, reason: str) -> CheckpointError:
    """The sentence about a checkpoint that cannot be loaded, with the next older one."""
    older = [other for other in complete(path.parent) if other.name < path.name]
    go_on = f"resume from {older[-1].name}" if older else "begin again, as there is no older one"
    return CheckpointError(f"{path} is damaged ({reason}); move it away to {go_on}")


def check_model(
    saved: dict[str, Any],
    hf_config: dict[str, Any],
    path: Path,
    remedy: str = "use that model or another run.dir",
) -> None:
    """Raise CheckpointError if a checkpoint was saved from another model than `hf_config`'s.

    The message names the first key that differs. saved: "model" of trainer.json.
    """
    for key, value in model_keys(hf_config).items():
        if saved.get(key) != value:
            raise CheckpointError(
                f"{path} was saved from another model: {key}={saved.get(key)} there but {value} in "
                f"model.path; {remedy}"
            )
