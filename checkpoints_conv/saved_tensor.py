"""Reading a block of a tensor saved by torch.save, straight into its place in memory.

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
    """A block of an array: elements [offsets, offsets + lengths) along each axis."""

    shape: Sequence[int]  # of the array
    offsets: Sequence[int]
    lengths: Sequence[int]

    def run(self) -> int | None:
        """The index of the first element, if the block is one run of the array; None if not."""
        # A run takes the innermost axes whole, a part of one axis, and one index of those outside.
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
    """Fill `target` with a block of a saved tensor; False, with nothing read, where that cannot be.

    It cannot be where the block is not one run of stored bytes of the target's type, or the target
    is not one run of memory. Raises what zipfile and torch.load raise for damaged bytes.

    path: the file.
    offset, length: the tensor was saved at bytes [offset, offset + length) of it.
    offsets: where the block begins in the tensor; one number for each axis.
    target: has the block's shape.
    """
    if not target.is_contiguous():
        return False
    with path.open("rb", buffering=0) as file:
        saved = _read_layout(io.BufferedReader(_Slice(file.fileno(), offset, length)))
        if saved is None or saved.dtype != target.dtype or len(saved.shape) != target.dim():
            return False
        first = Block(saved.shape, offsets, target.shape).run()
        if first is None:
            return False
        _read(file.fileno(), offset + saved.start + first * target.element_size(), target)
    return True


class _Slice(io.RawIOBase):
    """Bytes [offset, offset + length) of a file, as a file of their own."""

    def __init__(self, descriptor: int, offset: int, length: int):
        self._descriptor, self._offset, self._length, self._at = descriptor, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = max(0, origin + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer) -> int:
        view = memoryview(buffer)[: max(0, self._length - self._at)]
        count = os.preadv(self._descriptor, [view], self._offset + self._at) if view else 0
        self._at += count
        return count


@dataclass(frozen=True)
class _SavedLayout:
    """A saved tensor whose elements are consecutive, from byte `start` of its stream on."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int


def _read_layout(stream) -> _SavedLayout | None:
    """Find where a stream of torch.save has the elements of its tensor.

    None if its storage is not just these elements, in order, uncompressed and little-endian.
    """
    with torch.serialization.skip_data():  # shapes and types, no values
        tensor = torch.load(stream, map_location="cpu", weights_only=True)
    if (
        not isinstance(tensor, torch.Tensor)
        or not tensor.is_contiguous()
        or tensor.storage_offset()  # a view of a larger storage
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
    return _SavedLayout(tuple(tensor.shape), tensor.dtype, _start(stream, data[0]))


def _start(stream, entry: zipfile.ZipInfo) -> int:
    """The first byte of a zip entry's content, behind its own header, name and extra field."""
    # The table of contents may give other lengths than this header, which alone counts here.
    stream.seek(entry.header_offset + LOCAL_HEADER - 4)
    name, extra = stream.read(2), stream.read(2)
    return (
        entry.header_offset
        + LOCAL_HEADER
        + int.from_bytes(name, "little")
        + int.from_bytes(extra, "little")
    )


def _read(descriptor: int, offset: int, target: torch.Tensor) -> None:
    """Fill `target` with the bytes from `offset` on; EOFError if the file is too short."""
    if not target.numel():
        return
    remaining = memoryview(target.view(-1).view(torch.uint8).numpy())
    while remaining:
        count = os.preadv(descriptor, [remaining], offset)
        if count == 0:
            raise EOFError("the file ends within the tensor")
        remaining, offset = remaining[count:], offset + count
