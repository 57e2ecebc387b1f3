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
    """Read trainer.json of a checkpoint: "state", "model" and "layout".

    Raises CheckpointError if it is missing or no JSON.
    """
    try:
        return json.loads((path / "trainer.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a complete checkpoint ({error}); delete it to resume from an older one"
        ) from error


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
