"""Reading torch_dist's `.metadata`, a pickle, without running what a stranger put into it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoints_conv.errors import CheckpointError

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata


class _MetadataUnpickler(pickle.Unpickler):
    """An unpickler that lets a pickle name torch_dist's plain data classes and nothing else."""

    ALLOWED = {
        "torch": {"Size", "bfloat16", "float32", "float16", "float64", "int32", "int64", "uint8"},
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.distributed.checkpoint.metadata": {
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.planner": {
            "SavePlan",
            "TensorWriteData",
            "WriteItem",
            "WriteItemType",
        },
        "torch.serialization": {"_get_layout"},
        "pathlib": {"PosixPath"},
    }

    def find_class(self, module: str, name: str):
        # Exact names: pickle walks dotted ones, and a whole module would open everything that it
        # imports.
        if name in self.ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_metadata(path: Path) -> Metadata:
    """Read a `.metadata` file.

    Raises CheckpointError unless it unpickles to Metadata with torch_dist's data classes alone.
    """
    from torch.distributed.checkpoint.metadata import Metadata

    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except (
        OSError,
        pickle.UnpicklingError,
        EOFError,
        AttributeError,
        ValueError,
        TypeError,
        LookupError,
    ) as error:  # what pickle raises for damaged bytes
        raise CheckpointError(
            f"{path} is not torch_dist metadata ({error}); delete the checkpoint"
        ) from error
    if not isinstance(metadata, Metadata):
        raise CheckpointError(
            f"{path} is not torch_dist metadata (it is a pickled {type(metadata).__name__})"
        )
    return metadata


def check_metadata(path: Path) -> None:
    """Raise CheckpointError unless `read_metadata` can read `path`.

    Megatron reads this file with pickle; after this check those bytes can run nothing. (`common.pt`
    it reads with torch.load, whose default since torch 2.6 is weights_only.)
    """
    read_metadata(path)
