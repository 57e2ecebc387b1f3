"""All checks of `policysplit doctor`, in order."""

from __future__ import annotations

import math
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_policysplit.config import Config
from megatron_policysplit.config.load import world_size
from megatron_policysplit.doctor import machine, network, run_directory, variables, versions
from megatron_policysplit.doctor.finding import FAIL, Finding, guarded
from megatron_policysplit.doctor.machine import Space
from megatron_policysplit.doctor.versions import Torch, Trainer
from megatron_policysplit.errors import UserError

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


def examine(
    config: Config | None, *, hosts: Sequence[str] = (), asks_nodes: bool = False
) -> Iterable[Finding]:
    """Examine this machine, and with `hosts` or `asks_nodes` what lies between nodes.

    config: the run that is to start here; None: what every run needs. Each check is guarded: one
    that fails itself is a WARN.
    """
    torch, trainer = Torch(""), Trainer()

    def ask() -> list[Finding]:
        nonlocal torch, trainer
        torch, trainer = versions.ask_torch(sys.executable), versions.ask_trainer()
        return versions.check_torch(torch, trainer)

    yield from guarded("packages", versions.check_requirements)
    yield from guarded("torch", ask)
    layers = "auto" if config is None else config.model.layers
    yield from guarded("GPU packages", lambda: versions.check_gpu_packages(trainer, layers))
    yield from guarded("packages", lambda: versions.check_wanted_packages(config))
    size = None
    if config is not None:
        try:
            size = Size.of(config)
        except UserError as error:
            yield Finding("model", FAIL, str(error))
        yield from guarded("SGLang", lambda: versions.check_servers(config, torch))
    has_gpu = trainer.gpus > 0
    for name, check in _of_machine(config, size, has_gpu):
        yield from guarded(name, check)
    several = bool(hosts) or asks_nodes
    own = socket.gethostname()
    yield from guarded("host name", lambda: network.check_own_name(own, several))
    yield from guarded("ports", lambda: network.check_ports(config, os.environ))
    yield from guarded("variables", lambda: variables.check_variables(os.environ, config, has_gpu))
    if config is not None:
        directory, keep = Path(config.run.dir), config.checkpoint.keep
        nbytes = 0 if size is None else size.checkpoint
        yield from guarded(
            "run directory",
            lambda: run_directory.check_run_directory(directory, nbytes, keep),
        )
    if several:
        yield from _between_nodes(hosts, asks_nodes)


def _of_machine(
    config: Config | None, size: Size | None, has_gpu: bool
) -> list[tuple[str, Callable[[], list[Finding]]]]:
    wanted = None if config is None else gpus_wanted(config)
    shared = 0 if size is None else size.shared_memory
    pinned = 0 if size is None else size.pinned
    temporary = tempfile.gettempdir()
    return [
        ("GPUs", lambda: machine.check_gpus(machine.list_gpus(), wanted)),
        ("shared memory", lambda: machine.check_shared_memory(Space.of("/dev/shm"), shared)),
        (
            "temporary files",
            lambda: machine.check_temporary(Space.of(temporary), temporary),
        ),
        (
            "host memory",
            lambda: machine.check_host_memory(machine.available_memory(), pinned),
        ),
        ("limits", lambda: machine.check_limits(machine.soft_limits(), has_gpu)),
        ("compiler", lambda: machine.check_compiler(*machine.find_compiler(), has_gpu)),
    ]


def _between_nodes(hosts: Sequence[str], asks_nodes: bool) -> Iterable[Finding]:
    named = list(hosts)
    if asks_nodes and not named:
        found: list[str] = []
        yield from guarded("nodes", partial(_collect, found))
        named = found
    yield from guarded("nodes", lambda: network.check_hosts(named))
    if asks_nodes:
        yield from guarded("nodes", lambda: network.check_nodes(named))


def _collect(found: list[str]) -> list[Finding]:
    found += network.slurm_hosts(os.environ)
    return []


def gpus_wanted(config: Config) -> int:
    """GPUs of the whole run: its ranks, and the servers that it starts beside them."""
    rollout, servers = config.rollout, 0
    if rollout.engine == "sglang" and not rollout.addresses and not rollout.colocated:
        servers = (rollout.server.count or 1) * rollout.server.tensor
    return world_size(config) + servers


@dataclass(frozen=True)
class Size:
    """What a run takes of this machine, in bytes, by the model's number of parameters."""

    checkpoint: int  # one of them: weights, and 12 bytes a parameter of optimizer state
    pinned: int  # of the actor in host memory while colocated engines generate, on one node
    shared_memory: int  # in /dev/shm on the way to servers: two buckets

    @classmethod
    def of(cls, config: Config) -> Size:
        """Raises a UserError for a model that cannot be read."""
        from checkpoints_conv import check_safetensors

        tensors = check_safetensors(config.model.path)
        sizes = [math.prod(tensor.shape) for tensor in tensors.values()]
        parameters, width = sum(sizes), _DTYPE_BYTES[config.model.dtype]
        rollout, parallel = config.rollout, config.parallel
        pinned = shared = 0
        if rollout.colocated:
            # Weights and optimizer state leave the GPUs of every replica on this node.
            sharded = parallel.data if config.train.distributed_optimizer else 1
            ranks = int(os.environ.get("LOCAL_WORLD_SIZE", world_size(config)))
            of_rank = parameters * (width + 12 / sharded) / (parallel.tensor * parallel.pipeline)
            pinned = round(of_rank * ranks)
        elif rollout.engine == "sglang" and config.weight_sync.transport == "tensor":
            shared = 2 * width * max(sizes)
        return cls(parameters * (width + 12), pinned, shared)
