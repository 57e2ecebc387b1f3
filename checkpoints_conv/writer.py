"""Writing Hugging Face model directories tensor by tensor, complete or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints_conv.architectures import find_architecture
from checkpoints_conv.dtypes import BYTES, SAFETENSORS, dtype_name
from checkpoints_conv.errors import ModelError
from checkpoints_conv.output import partial_path
from checkpoints_conv.reader import INDEX, SINGLE, check_shape, read_hf_config

if TYPE_CHECKING:
    import torch

COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "chat_template*",
    "tekken.json",  # Mistral's tokenizer
    "additional_chat_templates",
)
MOST_OPEN = 64  # files at a time: many systems allow a process no more than 1024
# torch's name of a dtype -> safetensors'
SAFETENSORS_OF = {name: short for short, name in SAFETENSORS.items()}


@dataclass(frozen=True)
class Planned:
    """A tensor to be written."""

    shape: tuple[int, ...]
    dtype: str  # float32, bfloat16, float16 or float8_e4m3fn

    @property
    def nbytes(self) -> int:
        """Bytes of its data in the file."""
        return prod(self.shape) * BYTES[self.dtype]


class HfFiles:
    """The safetensors files of a model, laid out beforehand and filled in any order.

    Files hold the tensors in the order of `plan`, at most `max_shard_bytes` bytes of data each; a
    larger tensor gets its own file. Several processes may write to the same files once one of them
    has called `create`.
    """

    def __init__(self, directory: Path, plan: Mapping[str, Planned], max_shard_bytes: int):
        self.directory, self.plan = directory, plan
        shards = _shards(plan, max_shard_bytes)
        single = len(shards) == 1
        self._headers: dict[str, bytes] = {}
        self._places: dict[str, tuple[str, int]] = {}  # file, and offset in it, of each tensor
        for number, names in enumerate(shards):
            file = SINGLE if single else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
            header, offsets = _header({name: plan[name] for name in names})
            self._headers[file] = header
            self._places.update({name: (file, offset) for name, offset in offsets.items()})
        self._missing = dict.fromkeys(plan)  # an ordered set
        self._open: dict[str, int] = {}  # file -> descriptor, the oldest first

    def create(self) -> None:
        """Create the files, with headers but without data, and the index if there are several."""
        sizes = {file: len(header) for file, header in self._headers.items()}
        for name, planned in self.plan.items():
            sizes[self._places[name][0]] += planned.nbytes
        for file, header in self._headers.items():
            with (self.directory / file).open("xb") as stream:
                stream.write(header)
                stream.truncate(sizes[file])
        if len(self._headers) > 1:
            weight_map = {name: self._places[name][0] for name in self.plan}
            total = sum(planned.nbytes for planned in self.plan.values())
            write_json(
                self.directory / INDEX,
                {"metadata": {"total_size": total}, "weight_map": weight_map},
            )

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor, cast to the planned dtype, to its place.

        Raises ModelError for a tensor that the plan does not have, that this process has written
        before, or of another shape than planned.
        """
        import torch

        if name not in self._missing:
            raise ModelError(
                f"tensor {name} was given twice or is none of the model's; nothing is kept"
            )
        planned = self.plan[name]
        check_shape(name, tuple(tensor.shape), planned.shape, "what was to be written")
        data = tensor.detach().to(device="cpu", dtype=getattr(torch, planned.dtype)).contiguous()
        file, offset = self._places[name]
        if file not in self._open:
            if len(self._open) == MOST_OPEN:
                self._close_oldest()
            self._open[file] = os.open(self.directory / file, os.O_WRONLY)
        remaining = memoryview(data.view(-1).view(torch.uint8).numpy())
        while remaining:  # Linux writes at most 2 GiB at a time
            written = os.pwrite(self._open[file], remaining, offset)
            remaining, offset = remaining[written:], offset + written
        del self._missing[name]

    @property
    def missing(self) -> list[str]:
        """Tensors of the plan that this process has not written, in the plan's order."""
        return list(self._missing)

    def check_complete(self, missing: Collection[str] | None = None) -> None:
        """Raise ModelError naming a tensor of the plan that was not written.

        missing: those that none of several processes has written; None takes this process's own.
        """
        for name in self.missing if missing is None else missing:
            raise ModelError(f"tensor {name} of the model was not given; nothing is kept")

    def close(self) -> None:
        """Close the files; a later `write` opens them again."""
        while self._open:
            self._close_oldest()

    def _close_oldest(self) -> None:
        os.close(self._open.pop(next(iter(self._open))))


def write_hf(
    path: str | Path,
    source_dir: str | Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    dtype: torch.dtype,
    max_shard_bytes: int = 5 * 2**30,
) -> None:
    """Write a complete model directory, tensor by tensor.

    All is written beside `path` and renamed at the end, so a killed run leaves no half-written
    model. An existing model directory at `path` is replaced. Raises ModelError if something else is
    there, and if a tensor is missing, misshapen or none of the model's.

    path: the directory to write.
    source_dir: the model directory from which everything but the weights is copied.
    tensors: (name, tensor) of all tensors of its architecture, in any order. A second copy of a
    tied head is left out. Only one tensor is held at a time.
    dtype: what the tensors are cast to.
    max_shard_bytes: the largest file's bytes of data; a larger tensor gets its own file.
    """
    path = Path(path)
    hf_config = read_hf_config(source_dir)
    partial, previous = _clear_way(path)
    architecture = find_architecture(hf_config)
    shapes, tied = architecture.hf_tensors(hf_config), architecture.sizes(hf_config).tied
    files = HfFiles(
        partial,
        {name: Planned(shape, dtype_name(dtype)) for name, shape in shapes.items()},
        max_shard_bytes,
    )
    try:
        files.create()
        for name, tensor in tensors:
            if not (tied and name == "lm_head.weight"):
                files.write(name, tensor)
        files.check_complete()
        copy_companions(source_dir, partial)
        write_config(partial, hf_config, dtype_name(dtype))
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        files.close()
    if path.exists():  # a directory that is not empty cannot be renamed to
        path.rename(previous)
    partial.rename(path)
    shutil.rmtree(previous, ignore_errors=True)


def _clear_way(path: Path) -> tuple[Path, Path]:
    """Check that `path` may be written, and remove what killed writers left.

    Returns the new, empty directory beside it to write into, and the place to which what stands at
    `path` is moved in the end.
    """
    partial, previous = partial_path(path), path.with_name(f".{path.name}.previous")
    replaceable = (path / "config.json").is_file() or (path.is_dir() and not any(path.iterdir()))
    if path.exists() and not replaceable:
        raise ModelError(
            f"{path} exists and is not a Hugging Face model directory; choose another path"
        )
    if previous.exists() and not path.exists():
        previous.rename(path)  # an earlier writer was killed between its two renames
    shutil.rmtree(previous, ignore_errors=True)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial, previous


def copy_companions(source_dir: str | Path, directory: Path) -> None:
    """Copy tokenizer, chat templates and generation config; config.json is not one of them."""
    for pattern in COPIED:
        for file in Path(source_dir).glob(pattern):
            (shutil.copytree if file.is_dir() else shutil.copyfile)(file, directory / file.name)


def write_config(directory: Path, hf_config: Mapping[str, Any], dtype: str | None) -> None:
    """Write config.json with `dtype` in it; None leaves it as it is."""
    # transformers 5 has `dtype`, older versions `torch_dtype`.
    keys = [key for key in ("dtype", "torch_dtype") if key in hf_config] or ["torch_dtype"]
    changed = {} if dtype is None else dict.fromkeys(keys, dtype)
    write_json(directory / "config.json", {**hf_config, **changed})


def write_json(file: Path, value: Any) -> None:
    """Write a value as indented JSON in UTF-8."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _shards(plan: Mapping[str, Planned], max_shard_bytes: int) -> list[list[str]]:
    """The tensors of each file: consecutive ones of at most `max_shard_bytes`, or a single one."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, planned in plan.items():
        if shards[-1] and held + planned.nbytes > max_shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += planned.nbytes
    return shards


def _header(tensors: Mapping[str, Planned]) -> tuple[bytes, dict[str, int]]:
    """A file's bytes before its data, and each tensor's offset in the file.

    Tensors of wide types come first in a file, so that all are aligned.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for name, planned in sorted(tensors.items(), key=lambda item: -BYTES[item[1].dtype]):
        starts[name], end = end, end + planned.nbytes
        entries[name] = {
            "dtype": SAFETENSORS_OF[planned.dtype],
            "shape": list(planned.shape),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + start for name, start in starts.items()}
