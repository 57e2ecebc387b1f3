"""Whether the trainer's NCCL and the servers' can be in one group (transport=distributed)."""

from __future__ import annotations

import subprocess
import sys

from megatron_policysplit.distributed.device import nccl_version
from megatron_policysplit.errors import ConfigError
from megatron_policysplit.weight_sync.transport import SyncSettings

_QUESTION = "import torch; print('.'.join(map(str, torch.cuda.nccl.version())))"
ASK_SECONDS = 180.0  # to import torch, for the first time from a cluster's file system


def check_nccl(settings: SyncSettings) -> None:
    """Raise ConfigError if servers that the run starts have another NCCL than the trainer.

    NCCL refuses peers of another version when it makes a communicator. Of servers that run already
    (rollout.addresses) it is not known; they answer with NCCL's own error. Without a GPU the groups
    are gloo's, whose versions go together.
    """
    python, version = settings.server_python, nccl_version()
    if version is None or settings.external_servers or python in (None, sys.executable):
        return
    try:
        done = subprocess.run(
            [python, "-c", _QUESTION], capture_output=True, text=True, timeout=ASK_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"rollout.server.python={python} cannot be run ({error})") from error
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(f"rollout.server.python={python} cannot say its NCCL ({reason})")
    if done.stdout.strip() != version:
        raise ConfigError(
            f"weight_sync.transport=distributed needs one NCCL on both sides, but the torch of "
            f"rollout.server.python={python} has {done.stdout.strip()} and the trainer's "
            f"{version}; install torch releases with the same NCCL, or set "
            "weight_sync.transport=disk"
        )
