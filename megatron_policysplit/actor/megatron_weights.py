"""Loads weights from a torch_dist checkpoint, at any layout."""

from __future__ import annotations

from pathlib import Path

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
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    # torch_dist unpickles the metadata, so only files that hold nothing but its own classes pass.
    check_metadata(Path(path) / ".metadata")
    # Extra states, whose names differ between kinds of layers, are the model's only objects.
    sharded = {
        k: value
        for k, value in model.sharded_state_dict().items()
        if not isinstance(value, ShardedObject)
    }
    loaded = dist_checkpointing.load({"model": sharded}, str(path))["model"]
    result = model.load_state_dict(loaded, strict=False)
    skipped = [name for name in result.missing_keys if not name.endswith(EXTRA_STATE)]
    if skipped:
        raise CheckpointError(
            f"{path} lacks parameter {skipped[0]} of the model; convert the model again"
        )
