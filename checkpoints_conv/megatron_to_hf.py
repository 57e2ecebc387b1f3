"""A torch_dist checkpoint becomes a complete Hugging Face directory, tensor by tensor, without a
model.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from checkpoints_conv.architectures import find_architecture
from checkpoints_conv.dtypes import check_cast
from checkpoints_conv.megatron_reader import MegatronCheckpoint
from checkpoints_conv.output import check_free, written_beside
from checkpoints_conv.progress import Progress, silent
from checkpoints_conv.ranks import Ranks
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
    """Write the model in the torch_dist directory `megatron` (optimizer state is not read) to
    `out`.

    hf: where config.json, tokenizer and the like come from; see `MegatronCheckpoint`. dtype:
    float32, bfloat16 or float16; None keeps each tensor's stored one. Collective over `ranks`,
    which share the work; one parameter is held at a time. Raises CheckpointError or ModelError for
    a checkpoint that is damaged or of another model, for an `out` that is taken or has no room, and
    for a dtype that would round unless `allow_downcast`. `out` is complete or not there.
    """
    out = Path(out)
    checkpoint = ranks.together(lambda: MegatronCheckpoint(megatron, hf))
    stored = checkpoint.hf_dtypes()
    dtypes = {name: dtype or found for name, found in stored.items()}
    shapes = find_architecture(checkpoint.hf_config).hf_tensors(checkpoint.hf_config)
    plan = {name: Planned(shape, dtypes[name]) for name, shape in shapes.items()}

    def check() -> None:
        check_cast(stored, dtype, allow_downcast)
        check_free(out, sum(planned.nbytes for planned in plan.values()))

    ranks.together(check)
    mine = ranks.share(checkpoint.parameters, checkpoint.nbytes)
    with written_beside(out, ranks) as partial:
        files = HfFiles(partial, plan, max_shard_bytes)
        ranks.first(files.create)

        def write() -> None:
            with progress(
                sum(plan[src.name].nbytes for p in mine for src in p.mapping.sources)
            ) as advance:
                tensors = (
                    mapping
                    for parameter in mine
                    for mapping in checkpoint.hf_tensors(parameter, dtypes)
                )
                for name, tensor in read_ahead(tensors):
                    files.write(name, tensor)
                    advance(plan[name].nbytes)

        def finish() -> None:
            copy_companions(checkpoint.hf, partial)
            kinds = set(dtypes.values())
            write_config(partial, checkpoint.hf_config, kinds.pop() if len(kinds) == 1 else None)

        try:
            ranks.together(write)
            nowhere = set.intersection(*map(set, ranks.gathered(files.missing)))
            files.check_complete([name for name in plan if name in nowhere])
        finally:
            files.close()
        ranks.first(finish)


def read_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, each made by a thread while the one before is used; two are held at a time."""
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, items, None)
        while (item := following.result()) is not None:
            following = pool.submit(next, items, None)
            yield item
            del item
