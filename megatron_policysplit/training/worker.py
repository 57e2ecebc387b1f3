"""One rank of a training run.

`policysplit train` starts `python -m megatron_policysplit.training.worker CONFIG [key=value ...]`
for each local rank; with one rank, or under torchrun or srun, it calls `main` itself. Imports stay
inside `main`: reward workers are spawned processes that import this module again.
"""

from __future__ import annotations

import os
import re
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_policysplit.errors import BAD_INPUT, FAILED, STOPPED, machine_hint
from megatron_policysplit.files import disk_error, write_error
from megatron_policysplit.logs.streams import outlive_console

if TYPE_CHECKING:
    from megatron_policysplit.config import Config

SAME_ERROR_SECONDS = 3.0  # how long rank 0 waits for others with the same error


def main(argv: list[str]) -> int:
    """Run this rank; returns the exit code (see `policysplit train --help`)."""
    from megatron_policysplit.distributed.stop_signal import StopRequested, StopSignal

    # Before the slow imports: a signal during them must not end this rank without its exit code.
    stop = StopSignal().install()
    from megatron_policysplit.distributed.launch import forks_die_with_us

    forks_die_with_us()
    outlive_console()
    _silence_warnings()
    from megatron_policysplit.config.load import load_config
    from megatron_policysplit.errors import EngineLost, TrainingError, UserError, WriteError

    config, is_starting = None, True
    try:
        config = load_config(argv[0], argv[1:])
        _set_environment(config)
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        from megatron_policysplit.actor.megatron_on_cpu import import_megatron

        import_megatron()
        from megatron_policysplit.training.build import build_run
        from megatron_policysplit.training.trainer import Trainer

        run = build_run(config, stop)
        is_starting = False
        return Trainer(run).train()
    except StopRequested:  # before the first weights were loaded: there is nothing to save
        return STOPPED
    except (TrainingError, EngineLost, WriteError) as error:
        _report(f"error: {error}")
        return FAILED
    except UserError as error:
        _report(f"error: {error}")
        return BAD_INPUT
    except BaseException as error:
        # A collective whose peer is gone fails with a RuntimeError in the wording of its backend. A
        # file that one rank cannot write ends that rank alone; the others learn of it when it
        # leaves, and say what the disk says (torch's CheckpointException is not even an Exception).
        from megatron_policysplit.distributed.control import missing_ranks

        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        traceback.print_exc()
        _report(
            f"error: rank {rank} failed ({_first_sentence(error)}); "
            f"{missing_ranks(rank, world_size)}{_disk(error, config)}"
            f"{machine_hint(error) if is_starting else ''}"
        )
        return FAILED


def _disk(error: BaseException, config: Config | None) -> str:
    """`; ...` where the disk of run.dir takes no more, which may be why this rank failed."""
    if config is None or (refusal := disk_error(error, Path(config.run.dir))) is None:
        return ""
    return f"; {write_error(config.run.dir, refusal)}"


def _set_environment(config: Config) -> None:
    """Set what torch, CUDA, NCCL and Transformer Engine read when they are first used."""
    from megatron_policysplit.distributed.environment import compute_capability, set_defaults

    set_defaults(
        os.environ,
        tensor=config.parallel.tensor,
        deterministic=config.train.deterministic,
        capability=compute_capability(),
    )


def _silence_warnings() -> None:
    """Megatron-Core says once a rank what it falls back to without a GPU, as our docs do."""
    import warnings

    for text in (
        ".*Apex (is|are) not installed.*",
        ".*full scope is deprecated.*",
        ".*CUDA_DEVICE_MAX_CONNECTIONS.*",
        ".*use DTensor instead.*",
        "`load_state_dict` is deprecated.*",
    ):
        warnings.filterwarnings("ignore", message=text)


def _report(text: str) -> None:
    """Print to stderr, once for all ranks that report the same text.

    Every rank with the text counts itself in the process group's store, and the first one prints.
    Rank 0, which hosts the store, waits up to SAME_ERROR_SECONDS for the others to count.
    """
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        print(text, file=sys.stderr, flush=True)
        return
    store, key = dist.distributed_c10d._get_default_store(), f"policysplit/said/{text_hash(text)}"
    try:
        is_first = store.add(key, 1) == 1
    except RuntimeError:
        is_first = True  # the rank that hosts the store is gone; better twice than not at all
    if is_first:
        print(text, file=sys.stderr, flush=True)
    if dist.get_rank() == 0:
        deadline = time.monotonic() + SAME_ERROR_SECONDS
        while store.add(key, 0) < dist.get_world_size() and time.monotonic() < deadline:
            time.sleep(0.05)


def text_hash(text: str) -> str:
    """A short name for a text, the same on every rank (Python's own hash is not)."""
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _first_sentence(error: BaseException) -> str:
    """The first sentence of an error, without the place in gloo's or NCCL's sources."""
    line = str(error).strip().split("\n")[0]
    return re.sub(r"^\[\S+\] ", "", line).split(". ")[0][:300]


def leave(code: int) -> None:
    """End this rank at once with an exit code.

    Not by sys.exit: a peer that is gone must not keep this rank in a backend's atexit handler.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
