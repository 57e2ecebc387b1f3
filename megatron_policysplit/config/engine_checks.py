"""Checks of the keys about engines, weight sync and overlap against each other.

They touch no file and no network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from megatron_policysplit.config.schema import Config
from megatron_policysplit.errors import ConfigError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def is_loopback(address: str) -> bool:
    """Whether a host name, or the host of an http address, is this machine's loopback."""
    host = urlsplit(address).hostname if "//" in address else address
    return host in LOOPBACK


def check_engines(config: Config) -> None:
    """Check the keys about engines, weight sync and overlap against each other.

    Raises ConfigError naming the keys, their values and the remedy.
    """
    _check_addresses(config)
    _check_servers(config)
    _check_weight_sync(config)
    _check_old_logprobs(config)
    _check_overlap(config)


def _check_addresses(config: Config) -> None:
    """Check `rollout.addresses`, the servers that run already."""
    rollout = config.rollout
    if not rollout.addresses:
        return
    if rollout.engine != "sglang":
        raise ConfigError(
            f"rollout.addresses is set but rollout.engine={rollout.engine}; set "
            "rollout.engine=sglang or addresses=[]"
        )
    if rollout.colocated:
        raise ConfigError(
            "rollout.colocated=true needs servers that the run starts itself; set "
            "rollout.addresses=[] or rollout.colocated=false"
        )
    for address in rollout.addresses:
        parts = urlsplit(str(address))
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/"):
            raise ConfigError(
                f"rollout.addresses has {address!r}; an address is of the form http://host:port"
            )
        if parts.username is not None:  # not repeated: a password may follow it
            raise ConfigError(
                "rollout.addresses has an address with a user name; use http://host:port, and "
                "rollout.api_key_variable for a key"
            )
    if len(set(rollout.addresses)) < len(rollout.addresses):
        raise ConfigError(
            f"rollout.addresses={rollout.addresses} names a server twice; name each once"
        )


def _check_servers(config: Config) -> None:
    """Check the servers that the run starts itself: who can reach them, and their GPUs."""
    rollout, server = config.rollout, config.rollout.server
    if rollout.engine != "sglang":
        if rollout.colocated:
            raise ConfigError(
                f"rollout.colocated=true is for rollout.engine=sglang, not {rollout.engine}; set "
                "it to false"
            )
        return
    if rollout.colocated:
        check_allocator(server.environment)
        # The actor comes back once no engine is starting; the other ranks wait in a collective.
        if server.start_seconds >= config.parallel.timeout_seconds:
            raise ConfigError(
                f"parallel.timeout_seconds={config.parallel.timeout_seconds:g} must be above "
                f"rollout.server.start_seconds={server.start_seconds:g}, for which ranks may wait "
                "for a colocated engine; raise the one or lower the other"
            )
    # Whoever reaches a server can load weights into it.
    if not rollout.addresses and not is_loopback(server.host) and rollout.api_key_variable is None:
        raise ConfigError(
            f"rollout.server.host={server.host} can be reached from other machines; set "
            "rollout.api_key_variable to the name of an environment variable that holds an API "
            "key, or listen on 127.0.0.1"
        )
    count = server.count or 1
    needed = count * server.tensor
    if server.devices and not rollout.colocated and len(server.devices) != needed:
        raise ConfigError(
            f"rollout.server.devices={server.devices} names {len(server.devices)} GPUs, but "
            f"rollout.server.count={count} x rollout.server.tensor={server.tensor} servers need "
            f"{needed}"
        )


def _check_weight_sync(config: Config) -> None:
    """Check that the transport of weights reaches every server."""
    rollout, transport = config.rollout, config.weight_sync.transport
    if rollout.engine != "sglang":
        return
    remote = [address for address in rollout.addresses if not is_loopback(address)]
    if transport == "tensor" and remote:
        raise ConfigError(
            f"weight_sync.transport=tensor works within one machine, but {remote[0]} may be "
            "another; use weight_sync.transport=distributed"
        )
    if transport == "distributed" and rollout.colocated:
        raise ConfigError(
            "weight_sync.transport=distributed cannot reach engines on the actor's own GPUs "
            "(rollout.colocated=true); use weight_sync.transport=tensor"
        )


def _check_overlap(config: Config) -> None:
    """Check what training on samples of older weights needs."""
    rollout = config.rollout
    if not rollout.overlap:
        return
    if rollout.engine == "replay":
        raise ConfigError(
            "rollout.overlap=true has nothing to overlap with rollout.engine=replay; set it to "
            "false"
        )
    if rollout.colocated:
        raise ConfigError(
            "rollout.overlap=true needs engines beside the actor, but rollout.colocated=true "
            "shares its GPUs; set one of them to false"
        )
    if rollout.engine == "local" and config.train.deterministic:
        raise ConfigError(
            "train.deterministic=true allows deterministic kernels alone while it trains, but with "
            "rollout.overlap=true and rollout.engine=local the same process samples meanwhile, "
            "for which torch has none on a GPU; set one of the two to false"
        )
    if config.algorithm.importance_cap is None:
        raise ConfigError(
            "rollout.overlap=true trains on samples of older weights; set "
            "algorithm.importance_cap, for example 2.0, for the importance weights that correct it"
        )


def _check_old_logprobs(config: Config) -> None:
    """Check what training with the engine's log-probs excludes."""
    algorithm = config.algorithm
    if algorithm.old_logprobs == "actor":
        return
    if config.rollout.overlap:
        raise ConfigError(
            "algorithm.old_logprobs=engine corrects a stale sample behind the prompt it was "
            "sampled with alone; with rollout.overlap=true set algorithm.old_logprobs=actor and "
            "algorithm.importance_cap"
        )
    if algorithm.statistics == "step":
        raise ConfigError(
            "algorithm.statistics=step takes the actor's log-probs before every optimizer step; "
            "set algorithm.statistics=batch or algorithm.old_logprobs=actor"
        )
    if algorithm.importance_cap is not None:
        raise ConfigError(
            f"algorithm.importance_cap={algorithm.importance_cap} and "
            "algorithm.old_logprobs=engine both correct for the engine that sampled; set "
            "importance_cap=null or old_logprobs=actor"
        )


def check_allocator(environment: Mapping[str, Any]) -> None:
    """Raise ConfigError if the environment of colocated servers turns expandable segments on.

    SGLang's memory saver, by which servers give memory back, does not work with this setting of
    torch's allocator. What the actor itself has set is not handed on to servers.
    """
    if (setting := _expandable_segments(environment)) is not None:
        raise ConfigError(
            f"rollout.server.environment has {setting}, but with expandable_segments servers "
            "cannot give memory back, which rollout.colocated=true needs; take that setting out"
        )


def check_actor_allocator(config: Config, environ: Mapping[str, str]) -> None:
    """Raise ConfigError if this process could not hand GPU memory to colocated engines.

    CUDA IPC has no handle for torch's expandable segments. environ: that of a rank.
    """
    if not (config.rollout.colocated and config.weight_sync.transport == "tensor"):
        return
    if (setting := _expandable_segments(environ)) is not None:
        raise ConfigError(
            f"{setting} is set in the environment, but memory of expandable_segments cannot be "
            "handed to engines, which rollout.colocated=true with weight_sync.transport=tensor "
            "does; unset it, or set weight_sync.transport=disk"
        )


def _expandable_segments(environment: Mapping[str, Any]) -> str | None:
    """The variable, with its value, that turns torch's expandable segments on; None if none."""
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        value = str(environment.get(name) or "")
        settings = dict(part.partition(":")[::2] for part in value.replace(" ", "").split(","))
        if settings.get("expandable_segments", "").lower() == "true":
            return f"{name}={value}"
    return None
