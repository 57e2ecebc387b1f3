"""Reading a Hugging Face model directory: config, safetensors headers, tensors and their slices."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints_conv.architectures import find_architecture
from checkpoints_conv.dtypes import BYTES, SAFETENSORS
from checkpoints_conv.errors import ModelError
from checkpoints_conv.nearby import hf_remedy
from checkpoints_conv.output import is_partial
from checkpoints_conv.tables import EMBEDDING, HEAD

if TYPE_CHECKING:
    import torch

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = ("F32", "BF16", "F16")  # of models that are trained or converted
# Entries of config.json in which two copies of one model must agree, see `model_keys`.
MODEL_KEYS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
    "moe_intermediate_size",
    "num_experts_per_tok",
    "norm_topk_prob",
)


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as a file's header describes it."""

    file: Path
    dtype: str  # in safetensors' words: F32, BF16, ...
    shape: tuple[int, ...]
    start: int  # the data are bytes [start, stop) of the file
    stop: int


def read_hf_config(path: str | Path) -> dict[str, Any]:
    """Read config.json of a model directory.

    Raises ModelError if either is missing or the file is not a JSON object, and for a directory
    that a killed writer left (`*.partial`), whatever is in it.
    """
    path = Path(path)
    if is_partial(path):
        raise ModelError(f"{path} is the rest of a write that was interrupted; remove it")
    if not path.is_dir():
        if (path.parent / "config.json").is_file() and path.is_file():
            raise ModelError(f"model directory {path} is a file; give its directory {path.parent}")
        what = "is a file" if path.exists() else "does not exist"
        raise ModelError(
            f"model directory {path} {what}; give a directory with config.json and safetensors"
        )
    file = path / "config.json"
    return _json_object(file, "" if file.is_file() else hf_remedy(path))


def model_keys(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of config.json in which copies of one model must agree; None for a missing one."""
    # transformers 5 writes the number of experts under its common name.
    experts = hf_config.get("num_experts", hf_config.get("num_local_experts"))
    return {**{key: hf_config.get(key) for key in MODEL_KEYS}, "num_experts": experts}


def read_headers(path: str | Path) -> dict[str, TensorInfo]:
    """Name -> header entry of every tensor of a model directory; no tensor is read.

    Raises ModelError naming a file that is missing, has an unreadable header or another file's, is
    cut short (with the bytes expected and found), or is at odds with the index.
    """
    path = Path(path)
    tensors: dict[str, TensorInfo] = {}
    for file in _files(path):
        for name, info in _read_header(file).items():
            if name in tensors:
                raise ModelError(
                    f"tensor {name} is in {tensors[name].file} and in {file}; download the model "
                    "again"
                )
            tensors[name] = info
    if not (path / SINGLE).exists():
        weight_map = _weight_map(path)
        for name, file in weight_map.items():
            if name not in tensors or tensors[name].file.name != file:
                raise ModelError(
                    f"{path / INDEX} places tensor {name} in {file}, which does not have it"
                )
        unnamed = [name for name in tensors if name not in weight_map]
        if unnamed:
            raise ModelError(
                f"{path / INDEX} does not name {listed(unnamed)}; download the model again"
            )
    return tensors


def check_safetensors(path: str | Path) -> dict[str, TensorInfo]:
    """Check that the files hold exactly what the architecture needs, and return their headers.

    Tensors are not read, except for a tied model that stores a head all the same: then the head and
    the embedding are compared. Raises ModelError as `read_headers` does, and for a tensor that is
    missing, has another shape or a dtype that is not a float of 16 or 32 bits, for tensors the
    architecture lacks, and for a tied head with values of its own.
    """
    hf_config = read_hf_config(path)
    architecture = find_architecture(hf_config)
    architecture.megatron_arguments(hf_config)
    shapes, headers = architecture.hf_tensors(hf_config), read_headers(path)
    missing = [name for name in shapes if name not in headers]
    if missing:
        raise ModelError(f"{path} lacks {listed(missing)} that {architecture.name} needs")
    for name, shape in shapes.items():
        _check_tensor(name, headers[name], shape)
    extra = [name for name in headers if name not in shapes and not _is_harmless(name, hf_config)]
    if extra:
        raise ModelError(f"{path} has {listed(extra)} that {architecture.name} does not know")
    head, embedding = HEAD.sources[0].name, EMBEDDING.sources[0].name
    second_copy = head in headers and head not in shapes
    if second_copy and not _same_bytes(headers[head], headers[embedding]):
        raise ModelError(
            f"{path} has a {head} that differs from {embedding}, although config.json has "
            "tie_word_embeddings=true; transformers does not tie them then: set it to false"
        )
    return headers


def model_dtypes(hf_config: Mapping[str, Any], headers: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Name -> dtype (float32, bfloat16 or float16) of the architecture's own tensors.

    headers: those of `check_safetensors`. Surplus tensors that it lets pass may have any type.
    """
    names = find_architecture(hf_config).hf_tensors(hf_config)
    return {name: SAFETENSORS[headers[name].dtype] for name in names}


class SafetensorsReader:
    """Reads tensors of a model directory, or parts of them; a context manager.

    Files are opened when first needed and closed at the end. Raises ModelError for a tensor that
    the directory lacks and for a file that cannot be read.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._stack = ExitStack()
        self._open: dict[Path, Any] = {}

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Name -> header entry of every tensor."""
        return read_headers(self.path)

    def get(self, name: str) -> torch.Tensor:
        """Read a whole tensor, on the CPU."""
        return self._handle(name).get_tensor(name)

    def slice(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """Read only rows (dim 0) or columns (dim 1) [start, stop) of a tensor."""
        view = self._handle(name).get_slice(name)
        return view[start:stop] if dim == 0 else view[:, start:stop]

    def _handle(self, name: str) -> Any:
        from safetensors import SafetensorError, safe_open

        if name not in self.tensors:
            raise ModelError(f"{self.path} lacks tensor {name}")
        file = self.tensors[name].file
        if file not in self._open:
            try:
                opened = safe_open(file, framework="pt", device="cpu")
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{file} cannot be read ({error})") from error
            self._open[file] = self._stack.enter_context(opened)
        return self._open[file]

    def close(self) -> None:
        """Close all files; a later read opens them again."""
        self._open.clear()
        self._stack.close()

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()


def check_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...], where: Any) -> None:
    """Raise ModelError naming tensor, shapes and file if the shapes differ."""
    if tuple(shape) != tuple(expected):
        raise ModelError(
            f"tensor {name} in {where} has shape {list(shape)}, but config.json makes it "
            f"{list(expected)}"
        )


def _check_tensor(name: str, info: TensorInfo, shape: tuple[int, ...]) -> None:
    """Raise ModelError if a tensor has another shape, or a dtype that models do not have here."""
    check_shape(name, info.shape, shape, info.file)
    if info.dtype not in DTYPES:
        raise ModelError(
            f"tensor {name} in {info.file} has dtype {info.dtype}; supported are "
            f"{', '.join(DTYPES)}"
        )


def _is_harmless(name: str, hf_config: dict[str, Any]) -> bool:
    """Whether a surplus tensor is a buffer of old exports, or the second copy of a tied head."""
    tied = bool(hf_config.get("tie_word_embeddings", False))
    return name.endswith(".rotary_emb.inv_freq") or (tied and name == "lm_head.weight")


def listed(names: list[str], most: int = 5) -> str:
    """Names in words: `tensors a, b, ... and 3 more`; at most `most` are named."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"tensor{'s' if len(names) > 1 else ''} {', '.join(names[:most])}{more}"


def _files(path: Path) -> list[Path]:
    """The safetensors files of a model directory; ModelError if one is missing or outside of it."""
    if (path / SINGLE).exists():
        return [path / SINGLE]
    if not (path / INDEX).exists():
        raise ModelError(
            f"{path} has neither {SINGLE} nor {INDEX}; only safetensors checkpoints are read"
        )
    files = sorted({path / file for file in _weight_map(path).values()})
    for file in files:
        if file.parent != path:
            raise ModelError(f"{path / INDEX} names {file}, which is outside the model directory")
        if not os.path.exists(file):
            raise ModelError(f"{file} is missing, but {INDEX} names it; download the model again")
    return files


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor name -> file name, as the index has it; ModelError if it is malformed."""
    index = _json_object(path / INDEX, "it says which file holds which tensor")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{path / INDEX} has no `weight_map`; download the model again")
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise ModelError(
                f"{path / INDEX} places tensor {name} in {file!r}, which is no name of a file"
            )
    return weight_map


def _json_object(file: Path, why: str) -> dict[str, Any]:
    """Read a JSON object; ModelError if there is none. why: what the file is needed for."""
    if not os.path.isfile(file):
        raise ModelError(f"{file} is missing; {why}")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{file} cannot be read ({error.strerror})") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file} does not hold a JSON object")
    return value


def _read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file; ModelError if it is cut short or damaged.

    A file is the header's length (8 bytes, little-endian), the header (JSON), and the data.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            # Checked before reading: a damaged length may be of any size.
            if size < 8 or length > size - 8:
                needed = f"its header needs {8 + (length if size >= 8 else 0)} bytes"
                raise ModelError(f"{file} is cut short or damaged: {needed}, the file has {size}")
            text = stream.read(length)
    except OSError as error:
        raise ModelError(f"{file} cannot be read ({error.strerror})") from error
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        tensors = {name: _tensor_info(file, entry, 8 + length) for name, entry in header.items()}
        data = max((info.stop for info in tensors.values()), default=8 + length)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(
            f"{file} is not a safetensors file: its header does not parse ({error})"
        ) from error
    if size != data:
        raise ModelError(f"{file} is cut short or damaged: expected {data} bytes, found {size}")
    _check_bytes(file, tensors, 8 + length)
    return tensors


def _tensor_info(file: Path, entry: Mapping[str, Any], data: int) -> TensorInfo:
    """Read one entry of a header, which counts bytes from `data`, where the file's data begin.

    Raises whatever a malformed entry leads to; `_read_header` makes one sentence of it.
    """
    start, stop = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(type(number) is int and number >= 0 for number in (start, stop, *shape)):
        raise ValueError(f"it says {entry}")
    return TensorInfo(file, str(entry["dtype"]), shape, data + start, data + stop)


def _check_bytes(file: Path, tensors: Mapping[str, TensorInfo], data: int) -> None:
    """Raise ModelError naming a tensor whose bytes do not fit its shape, dtype or neighbours.

    The tensors of a file must follow each other without gap or overlap.
    """
    end = data
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        # Types that are not ours (such as I64 of a buffer) are not measured.
        width = BYTES[SAFETENSORS[info.dtype]] if info.dtype in SAFETENSORS else None
        nbytes = info.stop - info.start
        if info.start != end or (width is not None and nbytes != prod(info.shape) * width):
            raise ModelError(
                f"{file} is damaged: its header gives tensor {name} ({info.dtype}, shape "
                f"{list(info.shape)}) the bytes {info.start} to {info.stop}"
            )
        end = info.stop


def _same_bytes(a: TensorInfo, b: TensorInfo, block: int = 2**24) -> bool:
    """Whether two tensors are the same, bit for bit; `block` bytes of each are read at a time."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    with a.file.open("rb") as file_a, b.file.open("rb") as file_b:
        file_a.seek(a.start)
        file_b.seek(b.start)
        for start in range(a.start, a.stop, block):
            length = min(block, a.stop - start)
            if file_a.read(length) != file_b.read(length):
                return False
    return True
