"""Conversion of a Hugging Face directory to Megatron-Core's torch_dist, tensor by tensor."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints_conv.architectures import find_architecture
from checkpoints_conv.dtypes import check_cast, torch_dtype, widest
from checkpoints_conv.nearby import COMPANIONS
from checkpoints_conv.output import check_free, written_beside
from checkpoints_conv.progress import Progress, silent
from checkpoints_conv.ranks import Ranks
from checkpoints_conv.reader import (
    SafetensorsReader,
    check_safetensors,
    model_dtypes,
    read_hf_config,
)
from checkpoints_conv.stored import Chunk, extra_state_keys, list_parameters
from checkpoints_conv.writer import copy_companions, write_config

if TYPE_CHECKING:
    import torch

# metadata.json, as Megatron-Core's dist_checkpointing writes it for torch_dist.
BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
# The forms in which tensors are stored, as Megatron-Core says them in common.pt.
CONTENT = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}


def hf_to_megatron(
    hf: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    allow_downcast: bool = False,
    progress: Progress = silent,
    ranks: Ranks = Ranks(),  # noqa: B008 (frozen)
) -> None:
    """Write the model of directory `hf` to `out`, which Megatron-Core loads at any TP x PP x EP.

    Collective over `ranks`, which share the writing. One tensor is held at a time, no model is
    built. `out` is complete or does not exist. Raises ModelError for a damaged or unsupported model
    (see `check_safetensors`), and as the arguments below say.

    hf: a Hugging Face model directory.
    out: the checkpoint's directory; ModelError if it is taken or its disk has no room.
    dtype: float32, bfloat16 or float16; None keeps each tensor's own.
    allow_downcast: whether `dtype` may round; ModelError if it would and this is not set.
    progress: shows the bytes that this rank has written.
    """
    hf, out = Path(hf), Path(out)
    headers = ranks.together(lambda: check_safetensors(hf))
    hf_config = read_hf_config(hf)
    dtypes = model_dtypes(hf_config, headers)
    chunks = list_chunks(hf_config, dtypes, dtype)

    def check() -> None:
        check_cast(dtypes, dtype, allow_downcast)
        check_free(out, sum(chunk.nbytes for chunk in chunks))

    ranks.together(check)
    local_chunks = ranks.share(chunks, lambda chunk: chunk.nbytes)
    with written_beside(out, ranks) as partial, SafetensorsReader(hf) as reader:
        with progress(sum(chunk.nbytes for chunk in local_chunks)) as advance:
            _save(partial, local_chunks, extra_state_keys(hf_config), reader, advance, ranks)
        ranks.first(lambda: _write_companions(partial, hf, hf_config, dtype))


def list_chunks(
    hf_config: Mapping[str, Any], dtypes: Mapping[str, str], dtype: str | None
) -> list[Chunk]:
    """List the chunks of a checkpoint in the model's order.

    A parameter whose sources lie in it one after the other is written in as many chunks; a fused
    QKV in one. All layers (and experts) of a parameter are stored under one key and so in one type,
    the widest among them.

    dtypes: Hugging Face tensor name -> its dtype.
    dtype: what to cast all tensors to; None keeps theirs.
    """
    sizes = find_architecture(hf_config).sizes(hf_config)
    parameters = list_parameters(hf_config)
    dtypes_by_key: dict[str, set[str]] = {}
    for parameter in parameters:
        dtypes_by_key.setdefault(parameter.place.key, set()).update(
            dtypes[src.name] for src in parameter.mapping.sources
        )
    chunks = []
    for parameter in parameters:
        stored = dtype or widest(dtypes_by_key[parameter.place.key])
        pieces = parameter.mapping.pieces(sizes, 0, 1)  # of one rank of one: the whole parameter
        if len(pieces) == len(parameter.mapping.sources) > 1:
            chunks += [Chunk(parameter, p.offset, p.stop - p.start, (p,), stored) for p in pieces]
        else:
            chunks.append(Chunk(parameter, 0, parameter.shape[0], tuple(pieces), stored))
    return chunks


def read_chunk(chunk: Chunk, reader: SafetensorsReader) -> torch.Tensor:
    """Read the values of a chunk from the Hugging Face tensors: [*chunk.shape], in its dtype."""
    import torch

    first = chunk.pieces[0]
    if len(chunk.pieces) == 1:
        return reader.get(first.source).to(torch_dtype(chunk.dtype))
    sources = {piece.source: reader.get(piece.source) for piece in chunk.pieces}
    values = torch.empty(chunk.shape, dtype=torch_dtype(chunk.dtype))
    for piece in chunk.pieces:
        length = piece.stop - piece.start
        values.narrow(piece.dim, piece.offset, length).copy_(
            sources[piece.source].narrow(piece.dim, piece.start, length)
        )
    return values


def _save(
    directory: Path, chunks: list[Chunk], extra_states: list[str], reader, advance, ranks: Ranks
) -> None:
    """Write this rank's chunks and, with all ranks', the metadata (collective)."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    from checkpoints_conv.torch_dist import StreamingPlanner, StreamingWriter

    items = {chunk_index(chunk): chunk for chunk in chunks}
    states = extra_states if ranks.rank == 0 else []
    planner = StreamingPlanner(items, states, lambda chunk: read_chunk(chunk, reader))
    try:
        with warnings.catch_warnings():
            # dcp.save warns when it runs in one process, as here with a single rank.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.save(
                {},
                storage_writer=StreamingWriter(directory, advance),
                planner=planner,
                no_dist=ranks.size == 1,
            )
    except CheckpointException as error:  # every rank has it, with the errors of all
        raise next(iter(error.failures.values()))[0] from error


def chunk_index(chunk: Chunk) -> tuple[str, tuple[int, ...]]:
    """Key and offsets of a chunk in the stored tensor."""
    place = chunk.parameter.place
    return place.key, (*place.index, chunk.offset, *(0 for _ in chunk.parameter.shape[1:]))


def _write_companions(
    directory: Path, hf: Path, hf_config: Mapping[str, Any], dtype: str | None
) -> None:
    """Write all but the tensors: config, tokenizer, and what makes the directory a checkpoint."""
    import torch

    torch.save({"content_metadata": CONTENT}, directory / "common.pt")
    companions = directory / COMPANIONS
    companions.mkdir()
    copy_companions(hf, companions)
    write_config(companions, hf_config, dtype)
    # Last: it is what makes the directory a checkpoint for Megatron-Core.
    (directory / "metadata.json").write_text(json.dumps(BACKEND), encoding="utf-8")
