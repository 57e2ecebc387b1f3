"""What a checkpoint directory says without reading a weight; imports no torch, so that preflight
can ask.
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
    return directory / f"step_{step:06d}"


def complete(directory: Path) -> list[Path]:
    """Complete checkpoints in `directory`, oldest first."""
    found = [
        (int(match[1]), path)
        for path in directory.glob("step_*")
        if (match := NAME.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


def read_trainer_json(path: Path) -> dict[str, Any]:
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
    """Raise CheckpointError naming the first key in which the checkpoint's model differs from
    `hf_config`'s.
    """
    for key, value in model_keys(hf_config).items():
        if saved.get(key) != value:
            raise CheckpointError(
                f"{path} was saved from another model: {key}={saved.get(key)} there but {value} in "
                f"model.path; {remedy}"
            )
