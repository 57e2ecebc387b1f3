"""What a configuration asks of this machine, in numbers: `Needs`."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from checkpoints_conv import check_safetensors
from megatron_policysplit.config import Config
from megatron_policysplit.config.load import world_size
from megatron_policysplit.serving.interpreter import server_count


@dataclass(frozen=True)
class Needs:
    """What a run needs here. All sizes are of one node.

    The numbers of bytes are those of weights, gradients, optimizer and buckets. What a run needs
    beside them (activations, engines, libraries) is not counted.
    """

    ranks: int = 1  # of the whole run
    local_ranks: int = 1  # on this node
    nodes: int = 1
    tensor: int = 1  # parallel.tensor
    pipeline: int = 1
    replicas: int = 1  # parallel.data
    distributed_optimizer: bool = False
    deterministic: bool = False
    layers: str = "auto"  # model.layers
    dtype: str = "bfloat16"
    parameters: int | None = None  # of the model; None where its files cannot be read
    largest_tensor: int = 0  # parameters of the largest one
    reference: bool = False  # algorithm.kl_coef: a second copy of the weights, on the host
    sglang: bool = False
    colocated: bool = False
    own_servers: int = 0  # servers that the run starts itself, and how many GPUs each takes
    server_tensor: int = 1
    server_python: str | None = None  # None: the trainer's
    server_environment: Mapping[str, object] = field(default_factory=dict)
    server_host: str = "127.0.0.1"
    server_port: int = 0
    devices: tuple[int, ...] = ()  # rollout.server.devices
    addresses: tuple[str, ...] = ()  # rollout.addresses
    concurrency: int = 64
    transport: str = "tensor"
    bucket_bytes: int = 512 << 20
    master_address: str | None = None
    judge: str | None = None  # eval.judge.url
    wandb: bool = False
    reward_workers: int = 2
    run_dir: str | None = None
    checkpoints_kept: int = 2
    exports: bool = True  # checkpoint.hugging_face

    @property
    def itemsize(self) -> int:
        """Bytes of a weight."""
        return 2 if self.dtype == "bfloat16" else 4

    @property
    def rank_parameters(self) -> int:
        """Parameters of one rank. Experts that replicas share are counted as if they did not."""
        return math.ceil((self.parameters or 0) / (self.tensor * self.pipeline))

    @property
    def optimizer_bytes(self) -> float:
        """Bytes of optimizer state and master weights, a parameter of one rank.

        AdamW has two moments in fp32, and weights in fp32 beside bf16 ones.
        """
        per_parameter = 12 if self.dtype == "bfloat16" else 8
        return per_parameter / (self.replicas if self.distributed_optimizer else 1)

    @property
    def rank_bytes(self) -> int:
        """Bytes of one rank's weights, gradients (fp32) and optimizer."""
        return int(self.rank_parameters * (self.itemsize + 4 + self.optimizer_bytes))

    @property
    def offload_bytes(self) -> int:
        """Bytes of host memory that the actors of a node take while colocated engines generate."""
        if not self.colocated:
            return 0
        return int(self.local_ranks * self.rank_parameters * (self.itemsize + self.optimizer_bytes))

    @property
    def reference_bytes(self) -> int:
        """Bytes of host memory for the reference policy of a node's ranks."""
        if not self.reference:
            return 0
        return self.local_ranks * self.rank_parameters * self.itemsize

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory that a weight sync takes here: two buckets, on the host."""
        if not self.sglang or self.transport != "tensor":
            return 0
        return 2 * max(self.bucket_bytes, self.largest_tensor * self.itemsize)

    @property
    def export_bytes(self) -> int:
        """Bytes of the model as a Hugging Face directory."""
        return (self.parameters or 0) * self.itemsize

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of one checkpoint: weights, and the whole optimizer."""
        optimizer = 12 if self.dtype == "bfloat16" else 8
        return (self.parameters or 0) * (self.itemsize + optimizer)

    @property
    def gpus(self) -> int:
        """GPUs of this node that actors, and servers beside them, take."""
        beside = 0 if self.colocated else self.own_servers * self.server_tensor
        return self.local_ranks + beside

    @property
    def local_servers(self) -> int:
        """Servers on this node; those beside the actor are on the node of rank 0."""
        return math.ceil(self.own_servers / self.nodes) if self.colocated else self.own_servers

    @property
    def fixed_ports(self) -> list[int]:
        """Ports that the configuration names: one for each own server, one for their router."""
        if not self.server_port or not self.own_servers:
            return []
        count = self.own_servers + (self.own_servers > 1)
        return list(range(self.server_port, self.server_port + count))

    @property
    def has_other_python(self) -> bool:
        """Whether servers run by another interpreter than the trainer's."""
        return self.server_python is not None and self.server_python != sys.executable


def needs_of(config: Config, nodes: int) -> Needs:
    """Take what a machine is asked for out of a configuration. nodes: over which the run goes.

    The model's files are read (their headers, no weights); where that fails, sizes are unknown.
    """
    rollout, parallel, server = config.rollout, config.parallel, config.rollout.server
    ranks = world_size(config)
    sglang = rollout.engine == "sglang"
    own = 0
    if sglang and not rollout.addresses:
        own = server_count(config)
    parameters, largest = model_size(config.model.path)
    return Needs(
        ranks=ranks,
        local_ranks=math.ceil(ranks / nodes),
        nodes=nodes,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        replicas=parallel.data,
        distributed_optimizer=config.train.distributed_optimizer,
        deterministic=config.train.deterministic,
        layers=config.model.layers,
        dtype=config.model.dtype,
        parameters=parameters,
        largest_tensor=largest,
        reference=config.algorithm.kl_coef > 0,
        sglang=sglang,
        colocated=rollout.colocated,
        own_servers=own,
        server_tensor=server.tensor,
        server_python=server.python if own else None,
        server_environment=server.environment,
        server_host=server.host,
        server_port=server.port,
        devices=tuple(server.devices),
        addresses=tuple(rollout.addresses),
        concurrency=rollout.concurrency,
        transport=config.weight_sync.transport,
        bucket_bytes=config.weight_sync.bucket_mib << 20,
        master_address=config.weight_sync.master_address,
        judge=config.eval.judge.url,
        wandb=config.log.wandb_project is not None,
        reward_workers=config.reward.workers,
        run_dir=config.run.dir,
        checkpoints_kept=config.checkpoint.keep,
        exports=config.checkpoint.hugging_face,
    )


def model_size(path: str) -> tuple[int | None, int]:
    """Parameters of a Hugging Face directory, and of its largest tensor.

    (None, 0) where its safetensors cannot be read: `policysplit config` says what is wrong there.
    """
    if not Path(path).is_dir():
        return None, 0
    from megatron_policysplit.errors import UserError

    try:
        sizes = [math.prod(tensor.shape) for tensor in check_safetensors(path).values()]
    except UserError:
        return None, 0
    return sum(sizes), max(sizes, default=0)
