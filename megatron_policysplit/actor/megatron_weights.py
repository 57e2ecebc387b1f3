"""Loads weights from a torch_dist checkpoint, at any layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from checkpoints_conv.metadata import check_metadata
from megatron_policysplit.errors import CheckpointError

EXTRA_STATE = "_extra_state"


def load_megatron_weights(model: nn.Module, path: str | Path) -> None:
    """Fill this rank's parameters from a torch_dist directory.

    `policysplit convert hf-to-megatron` writes such a directory. Collective over all ranks. Padding
    rows of the vocabulary become zero; values are cast to the parameters' dtype. Extra states,
    pickles that hold nothing without FP8, are not read. Raises CheckpointError if the metadata are
    not torch_dist's own or a parameter is not in the checkpoint.
    """
    from megatron.core import dist_checkpointing

    # torch_dist unpickles the metadata, so only files that hold nothing but its own classes pass.
    check_metadata(Path(path) / ".metadata")
    sharded = without_extra_states(model.sharded_state_dict())
    loaded = dist_checkpointing.load({"model": sharded}, str(path))["model"]
    load_parameters(model, loaded, path)


def without_extra_states(sharded: Mapping[str, Any]) -> dict[str, Any]:
    """A model's `sharded_state_dict` without the extra states of its modules.

    They are pickles of what a quantised module keeps between steps; none of ours keeps anything.
    Their names differ between Transformer Engine's layers and Megatron's own, so that neither could
    load what the other saved. They are the model's only objects.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    return {key: value for key, value in sharded.items() if not isinstance(value, ShardedObject)}


def load_parameters(model: nn.Module, loaded: Mapping[str, Any], path: str | Path) -> None:
    """Fill a model's parameters; raises CheckpointError naming one that is not in `loaded`."""
    result = model.load_state_dict(loaded, strict=False)
    missing = [name for name in result.missing_keys if not name.endswith(EXTRA_STATE)]
    if missing:
        raise CheckpointError(
            f"{path} lacks parameter {missing[0]} of the model; convert the model again"
        )
