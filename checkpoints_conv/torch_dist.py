"""Parts for torch.distributed.checkpoint that write and read one tensor at a time.

torch's own FileSystemWriter keeps the last tensor of every key until its file is written, which is
a large part of a model whose layers share keys; its reader wants the whole tensor of a key as its
destination.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from checkpoints_conv.dtypes import torch_dtype
from checkpoints_conv.progress import Advance

if TYPE_CHECKING:
    from checkpoints_conv.stored import Chunk

Index = tuple[str, tuple[int, ...]]  # key, and offsets in the stored tensor


class StreamingPlanner(SavePlanner):
    """Plans what this rank writes from sizes alone, and reads each chunk when it is written.

    chunks: this rank's, by key and offsets.
    extra_states: keys of empty extra states that this rank writes.
    read: gives the values of a chunk.
    """

    def __init__(
        self, chunks: Mapping[Index, Chunk], extra_states: list[str], read: Callable[[Chunk], Any]
    ):
        self._chunks, self._extra_states, self._read = chunks, extra_states, read

    def set_up_planner(
        self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        """Do nothing: the state dict is empty, since what is written comes from `read`."""

    def create_local_plan(self) -> SavePlan:
        states = [
            WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self._extra_states
        ]
        return SavePlan(
            [*states, *(_write_item(index, chunk) for index, chunk in self._chunks.items())]
        )

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            state = io.BytesIO()
            torch.save([None], state)  # a list, as Megatron-Core's sharded objects are
            return state
        chunk = self._chunks[write_item.index.fqn, tuple(write_item.index.offset)]
        values = self._read(chunk)
        return values.view(_stored_sizes(chunk))


class StreamingWriter(FileSystemWriter):
    """Writes one file a rank; each tensor is asked for, written and forgotten.

    Calls `advance` with the bytes of each tensor.
    """

    def __init__(self, path: Path, advance: Advance):
        super().__init__(path)
        self._advance = advance

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future:
        """Write this rank's file to the disk; the results say where each item is in it."""
        name = f"{plan.storage_data.prefix}0.distcp"
        results = []
        with (Path(self.path) / name).open("xb") as file, _no_checksums():
            for item in plan.items:
                start = file.tell()
                data = planner.resolve_data(item)
                if isinstance(data, io.BytesIO):
                    file.write(data.getbuffer())
                else:
                    _save_tensor(data, file)
                    self._advance(data.nbytes)
                del data  # before the next one is read
                length = file.tell() - start
                results.append(WriteResult(item.index, length, _StorageInfo(name, start, length)))
            file.flush()
            os.fsync(file.fileno())
        done: Future = Future()
        done.set_result(results)
        return done


class Into:
    """Has a reader copy what it reads into one tensor.

    It has those methods of a LoadPlanner that FileSystemReader calls for tensors, and no others.
    """

    def __init__(self, target: torch.Tensor):
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        block = self._target
        for dim, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            block = block.narrow(dim, start, length)
        return block

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Do nothing: the reader has copied into a view of the target."""


def _write_item(index: Index, chunk: Chunk) -> WriteItem:
    """The entry of a save plan for a chunk."""
    key, offsets = index
    place = chunk.parameter.place
    return WriteItem(
        index=MetadataIndex(key, torch.Size(offsets)),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=_stored_sizes(chunk)),
            properties=TensorProperties(dtype=torch_dtype(chunk.dtype)),
            size=torch.Size([*place.axes, *chunk.parameter.shape]),
        ),
    )


def _stored_sizes(chunk: Chunk) -> torch.Size:
    """The shape of a chunk in the stored tensor: 1 along the stacking axes, then its own."""
    return torch.Size([*(1 for _ in chunk.parameter.place.axes), *chunk.shape])


class _Stream:
    """A file for torch.save that keeps the system's error.

    torch.save reports a full disk as an error of its own, which does not say so.
    """

    def __init__(self, file: Any):
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def _save_tensor(tensor: torch.Tensor, file: Any) -> None:
    """torch.save one tensor; raises the system's OSError if the file cannot take it."""
    # torch.save writes whole storages, of which a view would be a part.
    if tensor.untyped_storage().nbytes() != tensor.nbytes or not tensor.is_contiguous():
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    stream = _Stream(file)
    try:
        torch.save(tensor, stream)
    except Exception as error:
        if stream.error is not None and error is not stream.error:
            raise stream.error from error
        raise


@contextmanager
def _no_checksums():
    """Have torch.save leave out CRC-32, which takes longer than the writing.

    torch.load does not look at it.
    """
    setting = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(setting)
