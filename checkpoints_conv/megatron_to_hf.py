"""Conversion of a torch_dist checkpoint to a Hugging Face directory, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from checkpoints_conv.architectures import find_architecture
from checkpoints_conv.dtypes import check_cast
from checkpoints_conv.megatron_reader import MegatronCheckpoint
from checkpoints_conv.output import check_free, written_beside
from checkpoints_conv.progress import Progress, silent
from checkpoints_conv.ranks import Ranks
from checkpoints_conv.stored import Parameter
from checkpoints_conv.writer import HfFiles, Planned, copy_companions, write_config

MAX_SHARD_BYTES = 5 * 10**9
Item = TypeVar("Item")


def megatron_to_hf(
    megatron: str | Path,
    out: str | Path,
    *,
    hf: str | Path | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    allow_downcast: bool = False,
    progress: Progress = silent,
    ranks: Ranks = Ranks(),  # noqa: B008 (frozen)
) -> None:
    """Write the model in the torch_dist directory `megatron` to the Hugging Face directory `out`.

    Collective over `ranks`, which share the work; two tensors are held at a time, and no model is
    built. Optimizer state is not read. `out` is complete or does not exist. Raises CheckpointError
    or ModelError for a checkpoint that is damaged or of another model, and as the arguments say.

    megatron: a converted checkpoint, or one of training.
    out: the model directory; ModelError if it is taken or its disk has no room.
    hf: where config.json, tokenizer and the like come from; see `MegatronCheckpoint`.
    dtype: float32, bfloat16 or float16; None keeps each tensor's stored one.
    max_shard_bytes: the largest file's bytes of data; a larger tensor gets its own file.
    allow_downcast: whether `dtype` may round; ModelError if it would and this is not set.
    progress: shows the bytes that this rank has written.
    """
    out = Path(out)
    checkpoint = ranks.together(lambda: MegatronCheckpoint(megatron, hf))
    stored = checkpoint.hf_dtypes()
    dtypes = {name: dtype or stored_dtype for name, stored_dtype in stored.items()}
    shapes = find_architecture(checkpoint.hf_config).hf_tensors(checkpoint.hf_config)
    plan = {name: Planned(shape, dtypes[name]) for name, shape in shapes.items()}

    def check() -> None:
        check_cast(stored, dtype, allow_downcast)
        check_free(out, sum(planned.nbytes for planned in plan.values()))

    ranks.together(check)
    local_parameters = ranks.share(checkpoint.parameters, checkpoint.nbytes)
    with written_beside(out, ranks) as partial:
        files = HfFiles(partial, plan, max_shard_bytes)
        ranks.first(files.create)

        def write() -> None:
            _write(checkpoint, local_parameters, dtypes, files, plan, progress)

        def finish() -> None:
            copy_companions(checkpoint.hf, partial)
            kinds = set(dtypes.values())
            write_config(partial, checkpoint.hf_config, kinds.pop() if len(kinds) == 1 else None)

        try:
            ranks.together(write)
            # Each rank misses what the others wrote; a tensor is missing if all ranks miss it.
            missing = set.intersection(*map(set, ranks.gathered(files.missing)))
            files.check_complete([name for name in plan if name in missing])
        finally:
            files.close()
        ranks.first(finish)


def _write(
    checkpoint: MegatronCheckpoint,
    parameters: Sequence[Parameter],
    dtypes: Mapping[str, str],
    files: HfFiles,
    plan: Mapping[str, Planned],
    progress: Progress,
) -> None:
    """Write the Hugging Face tensors of these parameters, reading one ahead."""
    sources = [src for parameter in parameters for src in parameter.mapping.sources]
    with progress(sum(plan[src.name].nbytes for src in sources)) as advance:
        tensors = (
            named_tensor
            for parameter in parameters
            for named_tensor in checkpoint.hf_tensors(parameter, dtypes)
        )
        for name, tensor in read_ahead(tensors):
            files.write(name, tensor)
            del tensor  # a third one is being made as soon as the next is taken
            advance(plan[name].nbytes)


def read_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """Yield the same items, each made by a thread while the one before is used.

    Two are held at a time. None must not be among them: it marks the end.
    """
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, items, None)
        while (item := following.result()) is not None:
            following = pool.submit(next, items, None)
            yield item
            del item  # not held while the next one is awaited
