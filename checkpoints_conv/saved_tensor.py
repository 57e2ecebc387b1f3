"""Reading a block of a tensor that torch.save wrote straight into its place, without another copy
in memory.

torch.load would make the whole tensor first, which for an embedding is the largest thing that a
conversion holds.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

# Bytes of a zip entry's header before its name, whose last four are the lengths of name and extra.
LOCAL_HEADER = 30


@dataclass(frozen=True)
class Block:
    """Elements [offsets, offsets + lengths) of an array of `shape`."""

    shape: Sequence[int]
    offsets: Sequence[int]
    lengths: Sequence[int]

    def run(self) -> int | None:
        """The first element's place in the array, if the block is one run of it; None if not."""
        inner = len(self.shape)
        while inner > 0 and self.lengths[inner - 1] == self.shape[inner - 1]:
            inner -= 1
        if any(length != 1 for length in self.lengths[: max(inner - 1, 0)]):
            return None
        strides = [prod(self.shape[axis + 1 :]) for axis in range(len(self.shape))]
        return sum(offset * stride for offset, stride in zip(self.offsets, strides, strict=True))


def read_into(
    path: Path, offset: int, length: int, offsets: Sequence[int], target: torch.Tensor
) -> bool:
    """Fill `target` with the block from `offsets` on of the tensor saved at bytes [offset, offset +
    length) of a file.

    Returns False, with nothing read, where the block is not one run of stored bytes of the target's
    type, or `target` (of the tensor's rank) is not one run of memory. Raises what zipfile and
    torch.load raise for damaged bytes.
    """
    if not target.is_contiguous():
        return False
    with path.open("rb", buffering=0) as file:
        found = _saved(io.BufferedReader(_Slice(file.fileno(), offset, length)))
        if found is None or found.dtype != target.dtype or len(found.shape) != target.dim():
            return False
        first = Block(found.shape, offsets, target.shape).run()
        if first is None:
            return False
        _read(file.fileno(), offset + found.start + first * target.element_size(), target)
    return True


class _Slice(io.RawIOBase):
    """Bytes [offset, offset + length) of a file."""

    def __init__(self, descriptor: int, offset: int, length: int):
        self._descriptor, self._offset, self._length, self._at = descriptor, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(
            0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        )
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer) -> int:
        wanted = memoryview(buffer)[: max(0, self._length - self._at)]
        count = os.preadv(self._descriptor, [wanted], self._offset + self._at) if wanted else 0
        self._at += count
        return count


@dataclass(frozen=True)
class _Saved:
    """A tensor whose elements stand one after the other from byte `start` of its file on."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int


def _saved(stream) -> _Saved | None:
    """Of a stream of torch.save; None if the tensor's storage is not just its elements in order,
    uncompressed.
    """
    with torch.serialization.skip_data():  # shapes and types, no values
        tensor = torch.load(stream, map_location="cpu", weights_only=True)
    if (
        not isinstance(tensor, torch.Tensor)
        or not tensor.is_contiguous()
        or tensor.storage_offset()
    ):
        return None
    stream.seek(0)
    with zipfile.ZipFile(stream) as archive:  # for its table of contents; checksums may be left out
        entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
    data = [entry for name, entry in entries.items() if name.startswith("data/")]
    if (
        len(data) != 1
        or data[0].compress_type != zipfile.ZIP_STORED
        or data[0].file_size != tensor.nbytes
    ):
        return None
    if "byteorder" in entries:
        stream.seek(_start(stream, entries["byteorder"]))
        if stream.read(entries["byteorder"].file_size) != b"little":
            return None
    return _Saved(tuple(tensor.shape), tensor.dtype, _start(stream, data[0]))


def _start(stream, entry: zipfile.ZipInfo) -> int:
    """The first byte of an entry's content."""
    stream.seek(entry.header_offset + LOCAL_HEADER - 4)
    name, extra = stream.read(2), stream.read(2)
    return (
        entry.header_offset
        + LOCAL_HEADER
        + int.from_bytes(name, "little")
        + int.from_bytes(extra, "little")
    )


def _read(descriptor: int, offset: int, target: torch.Tensor) -> None:
    if not target.numel():
        return
    left = memoryview(target.view(-1).view(torch.uint8).numpy())
    while left:
        count = os.preadv(descriptor, [left], offset)
        if count == 0:
            raise EOFError("the file ends within the tensor")
        left, offset = left[count:], offset + count
