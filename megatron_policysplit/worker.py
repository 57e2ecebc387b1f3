"""One rank of a training run: `python -m megatron_policysplit.worker CONFIG [key=value ...]`.

Started by `policysplit train`, torchrun or srun. Imports stay inside `main`: reward workers are
spawned processes that import this module again.
"""

from __future__ import annotations

import os
import sys
import traceback

FAILED, BAD_INPUT, STOPPED = 1, 2, 75


def main(argv: list[str]) -> int:
    """Run this rank; returns the exit code (see `policysplit train --help`)."""
    from megatron_policysplit.stopping import StopRequested, StopSignal

    stop = StopSignal().install()
    import warnings

    # Megatron-Core says once a rank what it falls back to without a GPU; docs/architecture.md says it too.
    for text in (".*Apex (is|are) not installed.*", ".*full scope is deprecated.*", ".*CUDA_DEVICE_MAX_CONNECTIONS.*"):
        warnings.filterwarnings("ignore", message=text)
    from megatron_policysplit.config_load import load_config
    from megatron_policysplit.errors import TrainingError, UserError

    try:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        from megatron_policysplit.trainer import Trainer

        return Trainer(load_config(argv[0], argv[1:]), stop).train()
    except StopRequested:  # before the first weights were loaded: there is nothing to save
        return STOPPED
    except TrainingError as error:
        _report(f"error: {error}")
        return FAILED
    except UserError as error:
        _report(f"error: {error}")
        return BAD_INPUT
    except RuntimeError as error:
        # A collective whose peer is gone fails with a RuntimeError of the backend's own wording.
        from megatron_policysplit.control import missing_ranks

        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        traceback.print_exc()
        _report(f"error: rank {rank} failed ({_first_line(error)}); {missing_ranks(rank, world_size)}")
        return FAILED


def _report(text: str) -> None:
    """To stderr, once for all ranks that say the same."""
    import torch.distributed as dist

    if dist.is_initialized() and dist.get_world_size() > 1:
        try:
            first = dist.distributed_c10d._get_default_store().add(f"policysplit/said/{hash_of(text)}", 1) == 1
        except RuntimeError:  # the rank that hosts the store is gone; saying it twice beats not saying it
            first = True
        if not first:
            return
    print(text, file=sys.stderr, flush=True)


def hash_of(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300]


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: a peer that is gone must not keep this process in a backend's atexit handler.
    os._exit(code)
