"""Reading torch_dist checkpoints, converted ones and those of training, without Megatron."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

from checkpoints_conv.architectures import find_architecture, in_hf_order
from checkpoints_conv.dtypes import BYTES, dtype_name, torch_dtype, widest
from checkpoints_conv.errors import CheckpointError
from checkpoints_conv.hf_to_megatron import BACKEND, COMPANIONS
from checkpoints_conv.metadata import read_metadata
from checkpoints_conv.nearby import is_megatron, megatron_remedy
from checkpoints_conv.output import is_partial
from checkpoints_conv.reader import listed, read_hf_config
from checkpoints_conv.stored import Parameter, Place, list_parameters

if TYPE_CHECKING:
    import torch

# What torch raises for bytes that are no tensor, or one of another shape.
_DAMAGED = (
    BadZipFile,
    RuntimeError,
    AssertionError,
    ValueError,
    TypeError,
    AttributeError,
    IndexError,
    EOFError,
    UnpicklingError,
)
OPTIMIZER = ("optimizer.", "chained_")  # Megatron-Core's prefixes of optimizer state


class MegatronCheckpoint:
    """The model in a torch_dist directory, read on one CPU in whatever layout it was saved.

    Raises CheckpointError if the directory is not complete, cannot be read, or does not hold what
    the model needs: tensors missing, unknown, of another shape or type, with gaps, or in files that
    are cut short. No tensor is read for that. Optimizer state is never read, and of pickles only
    `.metadata`, by a restricted unpickler.

    path: the checkpoint's directory.
    hf: the Hugging Face directory that belongs to it (config.json, tokenizer). None finds it: `hf/`
    in a converted checkpoint, model.path of the run's config.yaml for a training checkpoint.
    """

    def __init__(self, path: str | Path, hf: str | Path | None = None):
        self.path = Path(path)
        _check_kind(self.path)
        self._metadata = read_metadata(self.path / ".metadata")
        self.hf = Path(hf) if hf is not None else _companion_directory(self.path)
        self.hf_config = read_hf_config(self.hf)
        self._stored = {
            key: value
            for key, value in self._metadata.state_dict_metadata.items()
            if _is_tensor(value)
        }
        self._chunks: dict[str, dict[tuple[int, ...], list]] = {}  # by key and place.index
        self.parameters: list[Parameter] = []
        self.copies: list[Parameter] = []  # of some of them, stored once more
        # A copy follows its original in the list. A checkpoint may hold either or both of them,
        # depending on the kind of layers that it was saved from.
        for parameter in list_parameters(self.hf_config):
            if not parameter.copy:
                self.parameters.append(parameter)
            elif self._is_stored(parameter) and self._is_stored(self.parameters[-1]):
                self.copies.append(parameter)
            elif self._is_stored(parameter):
                self.parameters[-1] = parameter
        self._check()

    @property
    def has_optimizer(self) -> bool:
        """Whether the checkpoint has optimizer state beside the model."""
        return any(key.startswith(OPTIMIZER) for key in self._stored)

    @property
    def vocabulary_padding(self) -> int:
        """The number of padding rows in the stored embedding."""
        embedding = next(parameter for parameter in self.parameters if parameter.is_vocabulary)
        return self._stored[embedding.place.key].size[0] - embedding.shape[0]

    def dtype(self, parameter: Parameter) -> str:
        """The dtype of a parameter: float32, bfloat16 or float16; the widest of its places."""
        return widest(
            {
                dtype_name(self._stored[place.key].properties.dtype)
                for place in self._places(parameter)
            }
        )

    def nbytes(self, parameter: Parameter) -> int:
        """The stored bytes of a parameter, without padding."""
        return parameter.numel * BYTES[self.dtype(parameter)]

    def hf_dtypes(self) -> dict[str, str]:
        """Hugging Face tensor name -> its stored dtype, in transformers' order."""
        dtypes = {src.name: self.dtype(p) for p in self.parameters for src in p.mapping.sources}
        return {
            name: dtypes[name]
            for name in find_architecture(self.hf_config).hf_tensors(self.hf_config)
        }

    def hf_tensors(
        self, parameter: Parameter, dtypes: Mapping[str, str] | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the Hugging Face tensors of one parameter by name.

        dtypes: Hugging Face tensor name -> the dtype to cast to; None keeps the stored one.
        """
        import torch

        sizes = find_architecture(self.hf_config).sizes(self.hf_config)
        sources = parameter.mapping.sources
        pieces = parameter.mapping.pieces(sizes, 0, 1)  # of one rank of one: the whole parameter
        dtypes = dtypes or dict.fromkeys((src.name for src in sources), self.dtype(parameter))
        if len(pieces) == len(sources):
            # Each source lies in one block: read that alone.
            for piece in pieces:
                shape = list(parameter.shape)
                shape[piece.dim] = piece.stop - piece.start
                offsets = [0] * len(shape)
                offsets[piece.dim] = piece.offset
                yield piece.source, self.read(parameter, offsets, shape, dtypes[piece.source])
            return
        fused = self.read(
            parameter, [0] * len(parameter.shape), parameter.shape, self.dtype(parameter)
        )
        for src in in_hf_order([parameter.mapping]):
            tensor = torch.empty(src.shape(sizes), dtype=torch_dtype(dtypes[src.name]))
            for piece in (piece for piece in pieces if piece.source == src.name):
                length = piece.stop - piece.start
                block = fused.narrow(piece.dim, piece.offset, length)
                tensor.narrow(piece.dim, piece.start, length).copy_(block)
            yield src.name, tensor

    def read(self, parameter: Parameter, offsets: Any, shape: Any, dtype: str) -> torch.Tensor:
        """Read a block of a parameter: [*shape], from `offsets` on, cast to `dtype`.

        Only the stored chunks that overlap the block are read.
        """
        import torch

        target = torch.empty(tuple(shape), dtype=torch_dtype(dtype))
        for place in self._places(parameter):
            start, stop = max(offsets[0], place.start), min(offsets[0] + shape[0], place.stop)
            if start < stop:
                rows = target.narrow(0, start - offsets[0], stop - start)
                self._read(place, (start - place.start, *offsets[1:]), rows)
        return target

    def _read(self, place: Place, offsets: tuple[int, ...], target: torch.Tensor) -> None:
        """Fill `target` with a block of what is stored at `place`, from `offsets` on."""
        import torch
        from torch.distributed.checkpoint import FileSystemReader, LoadPlan
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
        from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

        from checkpoints_conv.saved_tensor import read_into
        from checkpoints_conv.torch_dist import Into

        key, sizes = place.key, torch.Size([*(1 for _ in place.index), *target.shape])
        block = ChunkStorageMetadata(torch.Size([*place.index, *offsets]), sizes)
        reader = FileSystemReader(self.path)
        reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        stored = replace(self._stored[key], chunks=self._chunks_at(place))
        into = Into(target.view(sizes))
        try:
            for item in create_read_items_for_chunk_list(key, stored, [block]):
                info = self._metadata.storage_data[item.storage_index]
                span = (self.path / info.relative_path, info.offset, info.length)
                # Straight into the target where the bytes allow it; else through a copy.
                if not read_into(*span, item.storage_offsets, into.resolve_tensor(item)):
                    reader.read_data(LoadPlan([item]), into)
        except OSError as error:
            raise CheckpointError(
                f"tensor {key} in {self.path} cannot be read ({error})"
            ) from error
        except _DAMAGED as error:
            raise CheckpointError(
                f"tensor {key} in {self.path} cannot be read: its bytes are damaged"
            ) from error

    def _chunks_at(self, place: Place) -> list:
        """The stored chunks that hold a place's layer and expert."""
        # An index by layer and expert: with many experts a key has thousands of chunks, and torch's
        # planner would compare each block with all of them.
        if place.key not in self._chunks:
            by_index = self._chunks[place.key] = defaultdict(list)
            for chunk in self._stored[place.key].chunks:
                spans = zip(chunk.offsets, chunk.sizes, place.axes, strict=False)
                for index in product(*(range(offset, offset + size) for offset, size, _ in spans)):
                    by_index[index].append(chunk)
        return self._chunks[place.key][place.index]

    def _places(self, parameter: Parameter) -> tuple[Place, ...]:
        """The places of a parameter in the first of its forms that the checkpoint has.

        If it has none, those of the form in which it should have been written.
        """
        stored = (
            form for form in parameter.forms if any(place.key in self._stored for place in form)
        )
        return next(stored, parameter.forms[0])

    def _is_stored(self, parameter: Parameter) -> bool:
        return any(place.key in self._stored for place in self._places(parameter))

    def _check(self) -> None:
        """Raise CheckpointError unless the files hold exactly what the model needs."""
        places = {
            parameter: self._places(parameter) for parameter in (*self.parameters, *self.copies)
        }
        name = find_architecture(self.hf_config).name
        used = {place.key for form in places.values() for place in form}
        missing = sorted(used - self._stored.keys())
        if missing:
            raise CheckpointError(f"{self.path} lacks {listed(missing)} that {name} needs")
        extra = sorted(
            key for key in self._stored if key not in used and not key.startswith(OPTIMIZER)
        )
        if extra:
            raise CheckpointError(
                f"{self.path} has {listed(extra)} that {name} (see {self.hf}) does not know"
            )
        for parameter, form in places.items():
            for place in form:
                self._check_shape(parameter, place)
        for key in sorted(used):
            self._check_chunks(key)

    def _check_shape(self, parameter: Parameter, place: Place) -> None:
        key = place.key
        shape = tuple(self._stored[key].size)
        expected = (*place.axes, place.stop - place.start, *parameter.shape[1:])
        if shape == expected:
            return
        padded = shape[1:] == expected[1:] and shape[0] >= expected[0]
        if not (parameter.is_vocabulary and padded):
            raise CheckpointError(
                f"tensor {key} in {self.path} has shape {list(shape)}, but config.json of "
                f"{self.hf} makes it {list(expected)}"
            )

    def _check_chunks(self, key: str) -> None:
        """Raise CheckpointError unless the chunks of a tensor fill it and its files hold them."""
        from torch.distributed.checkpoint.metadata import MetadataIndex

        stored = self._stored[key]
        dtype = dtype_name(stored.properties.dtype)
        if dtype not in BYTES:
            raise CheckpointError(
                f"tensor {key} in {self.path} has dtype {dtype}; supported are {', '.join(BYTES)}"
            )
        if sum(prod(chunk.sizes) for chunk in stored.chunks) != prod(stored.size):
            raise CheckpointError(
                f"tensor {key} in {self.path} has gaps: its chunks do not fill it"
            )
        for chunk in stored.chunks:
            place = self._metadata.storage_data.get(MetadataIndex(key, chunk.offsets))
            if place is None:
                raise CheckpointError(
                    f"{self.path / '.metadata'} does not say where a part of tensor {key} is"
                )
            file = self.path / place.relative_path
            if file.parent != self.path:  # a path with `..`, or an absolute one
                raise CheckpointError(
                    f"{self.path / '.metadata'} names {file}, which is outside the checkpoint"
                )
            size = file.stat().st_size if file.is_file() else -1
            if size < 0:
                raise CheckpointError(f"{file} is missing, but holds a part of tensor {key}")
            if size < place.offset + place.length:
                raise CheckpointError(
                    f"{file} is cut short: tensor {key} ends at byte "
                    f"{place.offset + place.length}, the file has {size}"
                )


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; CheckpointError naming the file if it does not hold one."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}); the checkpoint is not complete"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} does not hold a JSON object; the checkpoint is damaged")
    return value


def _check_kind(path: Path) -> None:
    """Raise CheckpointError unless the directory is a complete torch_dist checkpoint."""
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is not a directory; give a checkpoint of Megatron-Core in the torch_dist "
            "format"
        )
    if is_partial(path):
        raise CheckpointError(f"{path} is the rest of a write that was interrupted; remove it")
    if not is_megatron(path):
        if (remedy := megatron_remedy(path)) is not None:
            raise CheckpointError(remedy)
        if (path / "latest_checkpointed_iteration.txt").is_file():
            raise CheckpointError(
                f"{path} holds checkpoints of several iterations; give one of its iter_* "
                "directories"
            )
        tip = ""
        if any(path.rglob("*.pt")) or any(path.rglob("*.bin")) or any(path.rglob("*.pth")):
            tip = (
                "; pickled checkpoints (.pt, .pth, .bin) are not read, save it again with "
                "--ckpt-format torch_dist"
            )
        raise CheckpointError(f"{path} has no metadata.json of a torch_dist checkpoint{tip}")
    if not (path / "common.pt").is_file():
        raise CheckpointError(f"{path / 'common.pt'} is missing; the checkpoint is not complete")
    backend = read_json(path / "metadata.json").get("sharded_backend")
    if backend != BACKEND["sharded_backend"]:
        raise CheckpointError(
            f"{path / 'metadata.json'}: sharded_backend={backend!r}; only 'torch_dist' is supported"
        )


def _companion_directory(path: Path) -> Path:
    """Find the Hugging Face directory that belongs to a checkpoint."""
    if (path / COMPANIONS).is_dir():
        return path / COMPANIONS
    config = path.absolute().parent.parent / "config.yaml"  # RUN/checkpoints/step_NNNNNN
    if not (path / "trainer.json").is_file() or not config.is_file():
        raise CheckpointError(
            f"{path} has no {COMPANIONS}/config.json and is in no run; name the model with --hf"
        )
    import yaml

    try:
        model = yaml.safe_load(config.read_text(encoding="utf-8"))["model"]["path"]
    except (OSError, yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{config} has no model.path ({error}); name the model with --hf"
        ) from error
    if not Path(model).is_dir():
        raise CheckpointError(
            f"{config}: model.path={model} is not a directory here; name the model with --hf"
        )
    return Path(model)


def _is_tensor(value: Any) -> bool:
    """Whether an entry of the metadata is a tensor; the others are bytes, such as extra states."""
    return hasattr(value, "chunks")
