"""SGLang servers that a run starts itself: from the configuration to a command to a first token."""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_policysplit.config import Config
from megatron_policysplit.config.engine_checks import is_loopback
from megatron_policysplit.config.secrets import read_api_key
from megatron_policysplit.errors import ConfigError, EngineError
from megatron_policysplit.rollout.sglang_http import EngineRefused, EngineUnreachable, SglangClient
from megatron_policysplit.serving.members import Placement
from megatron_policysplit.serving.placement import devices
from megatron_policysplit.serving.processes import (
    POLL_SECONDS,
    Process,
    flags,
    inherited_environment,
)

MODULE = "sglang.launch_server"
ASK_SECONDS = 10.0  # time limit of one question whether it answers
DYING_SECONDS = 10.0  # SGLang takes 5 s from a crash of its scheduler to its end
# Flags that have a key of their own. Two of them would put a secret where everybody can read it.
_OWN_KEY = {
    "model": "model.path",
    "model-path": "model.path",
    "dtype": "rollout.server.dtype",
    "tp": "rollout.server.tensor",
    "tp-size": "rollout.server.tensor",
    "tensor-parallel-size": "rollout.server.tensor",
    "host": "rollout.server.host",
    "port": "rollout.server.port",
    "api-key": "rollout.api_key_variable",
    "admin-api-key": "rollout.api_key_variable",
}
_SET_BY_THE_RUN = ("weight-version", "nccl-port")


@dataclass(frozen=True)
class ServerSpec:
    """All that one server is started with. Made by `server_spec`."""

    index: int
    python: str  # the interpreter that has SGLang
    model: str  # a Hugging Face directory
    dtype: str
    tensor: int  # tensor-parallel size
    host: str
    port: int  # 0 takes a free one
    seed: int  # of SGLang's sampler at the first start
    log: Path
    start_seconds: float  # time limit of the first token
    colocated: bool = False  # with the actor, so that it must be able to release its memory
    devices: tuple[str, ...] | None = None  # for CUDA_VISIBLE_DEVICES; None leaves it as it is
    api_key: str | None = field(default=None, repr=False)
    arguments: Mapping[str, Any] = field(default_factory=dict)  # flag without dashes -> value
    environment: Mapping[str, Any] = field(default_factory=dict)  # variable -> value, null unsets


def server_spec(
    config: Config,
    index: int,
    *,
    local_gpus: Sequence[int] = (),
    name: str | None = None,
    seed: int | None = None,
) -> ServerSpec:
    """Build the spec of server `index` of the configuration; raises ConfigError.

    local_gpus: of a colocated server, the GPUs of the actor ranks it stands on, in order.
    name: of its log file; sglang_<index> if None.
    seed: instead of the run's.
    """
    server = config.rollout.server
    key = read_api_key(config.rollout.api_key_variable, os.environ)
    if key is None and not is_loopback(server.host):
        raise ConfigError(
            f"rollout.server.host={server.host} can be reached from other machines; set "
            "rollout.api_key_variable to the name of an environment variable that holds an API "
            "key, or listen on 127.0.0.1"
        )
    return ServerSpec(
        index=index,
        python=server.python or sys.executable,
        model=config.model.path,
        dtype=server.dtype or config.model.dtype,
        tensor=server.tensor,
        host=server.host,
        port=server.port + index if server.port else 0,
        seed=(config.run.seed if seed is None else seed) + index,  # another for each server
        log=Path(config.run.dir) / "logs" / f"{name or f'sglang_{index}'}.log",
        start_seconds=server.start_seconds,
        colocated=config.rollout.colocated,
        devices=_visible(config, index, local_gpus),
        api_key=key,
        arguments=_arguments(server.arguments),
        environment=server.environment,
    )


def _arguments(configured: Mapping[str, Any]) -> dict[str, Any]:
    """rollout.server.arguments by flag; ConfigError for a flag that is not the user's to set."""
    arguments = {}
    for key, value in configured.items():
        name = str(key).lstrip("-").replace("_", "-")
        if name in _OWN_KEY:
            raise ConfigError(
                f"rollout.server.arguments.{key} has a key of its own; set {_OWN_KEY[name]}"
            )
        if name in _SET_BY_THE_RUN:
            raise ConfigError(
                f"rollout.server.arguments.{key} is set by the run itself; leave it out"
            )
        if name in arguments:
            raise ConfigError(f"rollout.server.arguments.{key} is given twice; keep one of them")
        arguments[name] = value
    return arguments


def _visible(config: Config, index: int, local_gpus: Sequence[int]) -> tuple[str, ...] | None:
    """The GPUs of a server in the words of CUDA_VISIBLE_DEVICES; None without a GPU."""
    from megatron_policysplit.distributed.device import gpu_count

    server, count, colocated = config.rollout.server, gpu_count(), config.rollout.colocated
    if count == 0 and server.devices:
        raise ConfigError(
            f"rollout.server.devices={server.devices}, but this machine shows no GPU; leave it "
            "empty"
        )
    if count == 0:
        return None
    # `devices` maps ranks to their GPUs; here the GPUs are known, so they are numbered instead.
    placement = Placement(index, 0, tuple(range(len(local_gpus))) if colocated else (0,))
    gpus = devices(placement, server.devices, local_gpus, tensor=server.tensor, colocated=colocated)
    if max(gpus) >= count:
        raise ConfigError(
            f"rollout.server.count={server.count or 1} servers of "
            f"rollout.server.tensor={server.tensor} need GPU {max(gpus)}, but this machine shows "
            f"{count}, numbered from 0; lower the one or the other, or list others in "
            "rollout.server.devices"
        )
    # The numbers count what this process sees, which may be a part of the machine itself.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(count)]
    return tuple(names[number].strip() for number in gpus)


def server_command(
    spec: ServerSpec, port: int, nccl_port: int, version: str, seed: int
) -> list[str]:
    """Return the arguments of sglang.launch_server, without the API key.

    What the user sets wins over our defaults. version: the weight version that the server is to
    serve at first. seed: of its sampler.
    """
    arguments: dict[str, Any] = {
        "model-path": spec.model,
        "dtype": spec.dtype,
        "tp-size": spec.tensor,
        "host": spec.host,
        "port": port,
        "nccl-port": nccl_port,
        "weight-version": version,
        "random-seed": seed,
        "skip-server-warmup": True,  # `Server.ready` asks for a token itself
        "log-level-http": "warning",  # requests are not logged one by one
        "enable-memory-saver": spec.colocated,
    }
    arguments |= server_options(spec.arguments.get("device"), spec.tensor)[0]
    return flags(arguments | dict(spec.arguments))


def server_environment(spec: ServerSpec, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a server: ours without the actor's, offline, and the user's.

    Of the user's variables null unsets one; true and false are 1 and 0.
    """
    environment: dict[str, str] = inherited_environment(environ, spec.python)
    environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if spec.colocated:
        # CUDA graphs are released with the other memory.
        environment["SGLANG_MEMORY_SAVER_CUDA_GRAPH"] = "1"
    if spec.devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(spec.devices)
    environment |= server_options(spec.arguments.get("device"), spec.tensor)[1]
    for name, value in spec.environment.items():
        if value is None:
            environment.pop(name, None)
        else:
            environment[name] = str(int(value)) if isinstance(value, bool) else str(value)
    return environment


class Server(Process):
    """One SGLang server.

    `initial_version` is the weight version it says it serves until a sync sets another: drawn anew
    at every start, so that it tells this very process from any other server and from its own
    predecessor.
    """

    def __init__(self, spec: ServerSpec):
        super().__init__(
            f"SGLang server {spec.index}", spec.python, spec.host, spec.port, spec.api_key, spec.log
        )
        self.spec = spec
        self.initial_version = ""
        self._started_at = 0.0

    def start(self) -> None:
        """Start it, or start it again on the same port after its end.

        Call it from a thread that lives as long as the run: the server dies with the thread.
        Raises EngineError if its port is taken, ConfigError if the interpreter cannot be run.
        """
        self.kill()
        (nccl_port,) = self.hold_ports(1)
        self.initial_version = f"start-{secrets.token_hex(6)}"
        # A server that comes back draws other samples.
        seed = (self.spec.seed + 7919 * self.starts) % 2**31
        command = server_command(self.spec, self.port, nccl_port, self.initial_version, seed)
        self.launch(MODULE, command, server_environment(self.spec, os.environ))
        self._started_at = time.monotonic()

    async def ready(self, client: SglangClient) -> None:
        """Wait until it has generated a token.

        Raises EngineError, with the end of its log, if it dies first or if start_seconds pass; the
        caller stops it then. Also if something else answers at its address.
        """
        while not await self._is_answering(client):
            await asyncio.sleep(POLL_SECONDS)
        request = {"input_ids": [0], "sampling_params": {"max_new_tokens": 1, "temperature": 0.0}}
        # Kernels are compiled for the first token, which may take as long as loading the weights.
        generation = asyncio.ensure_future(
            client.generate(request, timeout_seconds=self.spec.start_seconds)
        )
        # A task of its own, so that a server that dies meanwhile is noticed at once.
        try:
            while not (await asyncio.wait({generation}, timeout=POLL_SECONDS))[0]:
                self._check_time()
        finally:
            generation.cancel()
        try:
            answer = generation.result()
        except EngineError as error:
            # Its end says more than the failed request, and comes later.
            deadline = time.monotonic() + DYING_SECONDS
            while self.alive() and time.monotonic() < deadline:
                await asyncio.sleep(POLL_SECONDS)
            if not self.alive():
                raise self.death() from error
            raise self.error(f"did not generate its first token ({error})") from error
        meta = answer.get("meta_info", {}) if isinstance(answer, Mapping) else {}
        if meta.get("completion_tokens") != 1 or meta.get("weight_version") != self.initial_version:
            raise self._stranger(f"its first token came with {meta}")

    async def _is_answering(self, client: SglangClient) -> bool:
        self._check_time()
        try:
            info = await client.call("GET", "/model_info", timeout_seconds=ASK_SECONDS)
        except EngineUnreachable:
            return False
        except EngineRefused as error:
            raise self._stranger(str(error)) from error
        version = info.get("weight_version") if isinstance(info, Mapping) else None
        if version != self.initial_version:
            raise self._stranger(f"it serves weight version {version!r}")
        return True

    def _check_time(self) -> None:
        if not self.alive():
            raise self.death()
        if time.monotonic() - self._started_at > self.spec.start_seconds:
            raise self.error(
                f"at {self.address} did not answer its first request within "
                f"rollout.server.start_seconds={self.spec.start_seconds:g}"
            )

    def _stranger(self, evidence: str) -> EngineError:
        return EngineError(
            f"{self.address} is answered by something other than the server that this run started "
            f"({evidence}); set rollout.server.port to a free port, or to 0"
        )


def server_options(device: str | None, tensor: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the flags and environment variables that SGLang needs on the CPU; none on a GPU.

    device: as the user asks for it; None is what this machine has.
    tensor: tensor-parallel size of the server.
    """
    from megatron_policysplit.distributed.device import gpu_count

    if device != "cpu" and (device is not None or gpu_count() > 0):
        return {}, {}
    arguments = {
        "device": "cpu",
        # PyPI has no compiled CPU kernels, so the compute is plain torch.
        "attention-backend": "torch_native",
        "sampling-backend": "pytorch",
        "grammar-backend": "none",
        "cuda-graph-backend-decode": "disabled",
        "disable-overlap-schedule": True,
        "sleep-on-idle": True,
        "enable-memory-saver": False,
        "max-total-tokens": 16384,  # else the key-value cache takes most of the memory there is
    }
    # The threads of an idle pool must sleep, or decoding single requests is several times slower.
    environment = {"SGLANG_USE_CPU_ENGINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    if tensor > 1:  # else SGLang wants a NUMA node for each rank
        cores = sorted(os.sched_getaffinity(0))
        shares = [cores[rank::tensor] or [cores[rank % len(cores)]] for rank in range(tensor)]
        environment["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(
            ",".join(map(str, share)) for share in shares
        )
    return arguments, environment
