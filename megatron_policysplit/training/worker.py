"""One rank of a training run.

`policysplit train` starts `python -m megatron_policysplit.training.worker CONFIG [key=value ...]`
for each local rank; with one rank, or under torchrun or srun, it calls `main` itself. Imports stay
inside `main`: reward workers are spawned processes that import this module again.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_policysplit.errors import BAD_INPUT, FAILED, STOPPED, machine_hint
from megatron_policysplit.files import disk_error, write_error
from megatron_policysplit.logs.streams import outlive_console

if TYPE_CHECKING:
    from megatron_policysplit.config import Config


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

    config = refusal = None
    is_starting = True
    try:
        config = load_config(argv[0], argv[1:])
        # Before anything imports torch, as the watch of the ranks does.
        _set_environment(config)
    except UserError as error:
        refusal = error  # raised below, where every error is told
    from megatron_policysplit.distributed.rank_watch import Failure, RankWatch

    def describe(error: BaseException) -> Failure:
        if isinstance(error, UserError):
            goes_on = isinstance(error, TrainingError | EngineLost | WriteError)
            return Failure(f"error: {error}", FAILED if goes_on else BAD_INPUT)
        # A file that one rank cannot write ends that rank alone; the others say what the disk says
        # (torch's CheckpointException is not even an Exception).
        return Failure(
            f"error: rank {os.environ.get('RANK', 0)} failed ({_first_sentence(error)})",
            FAILED,
            names_others=True,
            remark=_disk(error, config) + (machine_hint(error) if is_starting else ""),
            is_of_a_peer=_is_of_a_peer(error),
            traceback="".join(traceback.format_exception(error)),
        )

    watch = RankWatch(describe, int(os.environ.get("WORLD_SIZE", 1)))
    try:
        if refusal is not None:
            raise refusal
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        from megatron_policysplit.actor.megatron_on_cpu import import_megatron

        import_megatron()
        from megatron_policysplit.training.build import build_run
        from megatron_policysplit.training.trainer import Trainer

        run = build_run(config, stop, watch)
        is_starting = False
        return watch.end(Trainer(run).train())
    except StopRequested:  # before the first weights were loaded: there is nothing to save
        return watch.end(STOPPED)
    except BaseException as error:
        return watch.fail(error)


def _is_of_a_peer(error: BaseException) -> bool:
    """Whether a collective or the store failed because of another rank.

    gloo raises a RuntimeError in its own wording, the store and NCCL a DistError.
    """
    import torch.distributed as dist

    lost = "closed by peer|reset by peer|timed out|broken pipe|connection refused"
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and re.search(lost, str(error).lower()) is not None
    )


def _disk(error: BaseException, config: Config | None) -> str:
    """`; ...` where the disk of run.dir takes no more, which may be why this rank failed."""
    if config is None or (refusal := disk_error(error, Path(config.run.dir))) is None:
        return ""
    return f"; {write_error(config.run.dir, refusal)}"


def _set_environment(config: Config) -> None:
    """Set what torch, CUDA, NCCL and Transformer Engine read when they are first used."""
    from megatron_policysplit.distributed.environment import (
        compute_capability,
        engines_nccl,
        set_defaults,
    )

    joined = config.rollout.engine == "sglang" and config.weight_sync.transport == "distributed"
    set_defaults(
        os.environ,
        tensor=config.parallel.tensor,
        deterministic=config.train.deterministic,
        capability=compute_capability(),
        nccl=engines_nccl(config.rollout.server.arguments) if joined else None,
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
