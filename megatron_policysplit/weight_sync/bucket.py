"""SGLang's flattened bucket: consecutive tensors as the bytes of one, and where each of them lies.

The format's pickle is written here, with torch and the standard library alone: SGLang need not be
installed beside the trainer. Its receiver unpickles nothing but a list of harmless types, and reads
the fields of the metadata by name, so `types.SimpleNamespace` carries them.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import prod
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.multiprocessing import get_sharing_strategy, reductions, set_sharing_strategy

if TYPE_CHECKING:
    from megatron_policysplit.actor.export_buckets import Exported

DEVICE_ARGUMENT = 6  # position of the device among the arguments of torch's rebuild_cuda_tensor


@dataclass(frozen=True)
class Bucket:
    """Consecutive tensors of one dtype that travel together. Made by `plan_buckets`."""

    stage: int  # the pipeline stage that owns them; the first one's if they belong to several
    names: tuple[str, ...]  # Hugging Face names, in the order of the export
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype

    @cached_property
    def ends(self) -> list[int]:
        """Offset in bytes at which each tensor ends; the next begins there."""
        ends, end = [], 0
        for shape in self.shapes:
            end += prod(shape) * self.dtype.itemsize
            ends.append(end)
        return ends

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return self.ends[-1]

    def fill(self, stream: Iterator[tuple[str, Tensor]], flat: Tensor) -> None:
        """Take this bucket's tensors from `stream` and copy them into flat (uint8[nbytes or more]).

        Raises ValueError if the next tensors of the stream are others than planned.
        """
        start = 0
        for expected, shape, end in zip(self.names, self.shapes, self.ends, strict=True):
            name, tensor = next(stream)
            if (name, tuple(tensor.shape), tensor.dtype) != (expected, shape, self.dtype):
                raise ValueError(
                    f"{name} {list(tensor.shape)} {tensor.dtype} came in place of {expected} "
                    f"{shape}"
                )
            flat[start:end].copy_(tensor.reshape(-1).view(torch.uint8))
            start = end


def plan_buckets(
    tensors: Sequence[Exported], dtype: torch.dtype, limit_bytes: int, *, per_stage: bool
) -> list[Bucket]:
    """Put consecutive tensors in buckets of at most `limit_bytes`; a larger tensor goes alone.

    per_stage: no bucket holds tensors of two pipeline stages.
    """
    groups: list[list[Exported]] = []
    filled = 0  # bytes of the last group
    for tensor in tensors:
        nbytes = prod(tensor.shape) * dtype.itemsize
        if (
            not groups
            or filled + nbytes > limit_bytes
            or (per_stage and groups[-1][-1].stage != tensor.stage)
        ):
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += nbytes
    return [
        Bucket(
            group[0].stage,
            tuple(t.name for t in group),
            tuple(tuple(t.shape) for t in group),
            dtype,
        )
        for group in groups
    ]


def payload(bucket: Bucket, flat: Tensor) -> str:
    """Return what one tensor-parallel rank of an engine needs to read `flat` (uint8[nbytes]).

    A pickle in base64. It names the memory; the bytes stay where they are, so the sender keeps
    `flat` until the engine has answered. Each payload is for one receiver: torch counts them.
    """
    starts = [0, *bucket.ends[:-1]]
    metadata = [
        SimpleNamespace(
            name=name,
            shape=torch.Size(shape),
            dtype=bucket.dtype,
            start_idx=start,
            end_idx=end,
            numel=end - start,
        )
        for name, shape, start, end in zip(
            bucket.names, bucket.shapes, starts, bucket.ends, strict=True
        )
    ]
    file = io.BytesIO()
    with _named_files():
        _Pickler(file).dump({"flattened_tensor": flat, "metadata": metadata})
    return base64.b64encode(file.getvalue()).decode("ascii")


class _Pickler(ForkingPickler):
    """torch's pickler of shared tensors, with a GPU's UUID in the place of its number.

    The engine may number GPUs otherwise (CUDA_VISIBLE_DEVICES). SGLang's receiver takes a UUID.
    """

    def reducer_override(self, value):
        if not isinstance(value, Tensor):
            return NotImplemented
        rebuild, arguments = reductions.reduce_tensor(value)
        if rebuild is reductions.rebuild_cuda_tensor:
            arguments = list(arguments)
            device = arguments[DEVICE_ARGUMENT]
            arguments[DEVICE_ARGUMENT] = str(torch.cuda.get_device_properties(device).uuid)
            arguments = tuple(arguments)
        return rebuild, arguments


@contextmanager
def _named_files():
    """Share host memory as named files while the context lasts.

    torch's default, a descriptor sent from process to process, only works between a process and its
    children; another receiver (an SGLang server) dies of it.
    """
    before = get_sharing_strategy()
    set_sharing_strategy("file_system")
    try:
        yield
    finally:
        set_sharing_strategy(before)
