"""Checks of the keys about SGLang engines, weight sync and overlap against each other; touches no
file, no network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from megatron_policysplit.config.keys import show
from megatron_policysplit.config.load import check_values
from megatron_policysplit.config.modes import sampling_by_mode, shared_out
from megatron_policysplit.config.schema import Config, JudgeConfig, SamplingConfig
from megatron_policysplit.errors import ConfigError
from megatron_policysplit.rows import MODES

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def is_loopback(address: str) -> bool:
    """Whether a host name, or the host of an http address, is this machine's loopback."""
    host = urlsplit(address).hostname if "//" in address else address
    return host in LOOPBACK


def check_engines(config: Config) -> None:
    """Raises ConfigError naming the keys, their values and the remedy."""
    _check_addresses(config)
    _check_servers(config)
    _check_weight_sync(config)
    _check_old_logprobs(config)
    _check_overlap(config)


def _check_addresses(config: Config) -> None:
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
    if len(set(rollout.addresses)) < len(rollout.addresses):
        raise ConfigError(
            f"rollout.addresses={rollout.addresses} names a server twice; name each once"
        )


def _check_servers(config: Config) -> None:
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
    rollout, transport = config.rollout, config.weight_sync.transport
    if rollout.engine != "sglang":
        return
    elsewhere = [address for address in rollout.addresses if not is_loopback(address)]
    if transport == "tensor" and elsewhere:
        raise ConfigError(
            f"weight_sync.transport=tensor works within one machine, but {elsewhere[0]} may be "
            "another; use weight_sync.transport=distributed"
        )
    if transport == "distributed" and rollout.colocated:
        raise ConfigError(
            "weight_sync.transport=distributed cannot reach engines on the actor's own GPUs "
            "(rollout.colocated=true); use weight_sync.transport=tensor"
        )


def _check_overlap(config: Config) -> None:
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
    if config.algorithm.importance_cap is None:
        raise ConfigError(
            "rollout.overlap=true trains on samples of older weights; set "
            "algorithm.importance_cap, for example 2.0, for the importance weights that correct it"
        )


def _check_old_logprobs(config: Config) -> None:
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


def check_config(config: Config) -> list[str]:
    """Checks keys against each other, without touching a file; returns warnings to show once.

    Raises ConfigError naming the keys, their values and the remedy.
    """
    check_values(config)
    rollout, train, modes, algorithm = config.rollout, config.train, config.modes, config.algorithm
    samples, sampling = rollout.samples_per_question, sampling_by_mode(config)
    if algorithm.name == "policy_split":
        shared_out(samples, {mode: plan.share for mode, plan in sampling.items()})
    responses = config.data.batch_questions * samples
    if responses % train.optimizer_steps_per_batch:
        raise ConfigError(
            f"train.optimizer_steps_per_batch={train.optimizer_steps_per_batch} does not divide "
            f"the {responses} responses of a batch (data.batch_questions x "
            "rollout.samples_per_question); use one of "
            f"{_divisors_near(responses, train.optimizer_steps_per_batch)}"
        )
    if modes.high_entropy_prompt is not None and modes.high_entropy_prompt_file is not None:
        raise ConfigError(
            "modes.high_entropy_prompt and modes.high_entropy_prompt_file are both set; keep one "
            "of them"
        )
    if rollout.engine == "replay" and not rollout.replay_dir:
        raise ConfigError(
            "rollout.engine=replay needs rollout.replay_dir, the rollouts/ directory of a run"
        )
    if rollout.engine == "replay" and config.eval.path is not None:
        raise ConfigError(
            "rollout.engine=replay holds no responses to the questions of "
            f"eval.path={config.eval.path}; set eval.path=null"
        )
    check_engines(config)
    check_judge(config)
    if config.parallel.sequence and config.parallel.tensor == 1:
        raise ConfigError(
            "parallel.sequence=true splits tokens over tensor-parallel ranks; raise parallel.tensor"
        )
    if config.parallel.data % config.parallel.expert:
        raise ConfigError(
            f"parallel.expert={config.parallel.expert} does not divide "
            f"parallel.data={config.parallel.data}, over whose replicas the experts are shared "
            "out; change one of them"
        )
    optimizer_steps = train.steps * train.optimizer_steps_per_batch
    if train.warmup_steps > optimizer_steps:
        raise ConfigError(
            f"train.warmup_steps={train.warmup_steps} is more than the {optimizer_steps} optimizer "
            "steps of the run (train.steps x train.optimizer_steps_per_batch); use at most "
            f"{optimizer_steps}"
        )
    longest = config.data.max_prompt_tokens + rollout.max_response_tokens
    if train.max_tokens_per_micro_batch < longest:
        raise ConfigError(
            f"train.max_tokens_per_micro_batch={train.max_tokens_per_micro_batch} cannot hold one "
            f"row of data.max_prompt_tokens={config.data.max_prompt_tokens} + "
            f"rollout.max_response_tokens={rollout.max_response_tokens} tokens; use at least "
            f"{longest}"
        )
    if algorithm.clip_low is not None and algorithm.clip_low > 1:
        raise ConfigError(
            f"algorithm.clip_low={show(algorithm.clip_low)} is more than a ratio can fall; use 1 "
            "at most"
        )
    for name in ("adam_beta1", "adam_beta2"):
        if getattr(train, name) >= 1:
            raise ConfigError(
                f"train.{name}={show(getattr(train, name))} is not allowed; use a value below 1"
            )
    if train.min_learning_rate > train.learning_rate:
        raise ConfigError(
            f"train.min_learning_rate={train.min_learning_rate} is above "
            f"train.learning_rate={train.learning_rate}; use a smaller one"
        )
    groups = {mode: "rollout" if mode in MODES else "modes.others" for mode in sampling}
    return [
        w
        for mode, plan in sampling.items()
        for w in _sampling_warnings(f"{groups[mode]}.{mode.value}", plan)
    ]


def _sampling_warnings(name: str, sampling: SamplingConfig) -> list[str]:
    if sampling.top_p > 1:
        raise ConfigError(
            f"{name}.top_p={show(sampling.top_p)} is a probability mass; use a value up to 1"
        )
    if sampling.top_k == 0:
        raise ConfigError(f"{name}.top_k=0 keeps no token; use -1 to keep all, or at least 1")
    filters = []
    if sampling.top_p < 1:
        filters.append(f"{name}.top_p={sampling.top_p}")
    if sampling.top_k != -1:
        filters.append(f"{name}.top_k={sampling.top_k}")
    if not filters:
        return []
    return [
        f"{' and '.join(filters)} cut the sampling, but log-probs are those of the whole "
        "distribution"
    ]


def _divisors_near(number: int, wanted: int) -> str:
    divisors = [divisor for divisor in range(1, number + 1) if number % divisor == 0]
    nearest = sorted(sorted(divisors, key=lambda divisor: abs(divisor - wanted))[:3])
    return ", ".join(map(str, nearest))


def check_judge(config: Config) -> None:
    """Raises ConfigError naming the keys, their values and the remedy; touches no file, no network."""
    judge = config.eval.judge
    if judge.url is None:
        return
    check_judge_keys(judge)
    if config.eval.path is None:
        raise ConfigError(
            "eval.judge.url is set but there is no evaluation; set eval.path to its questions, or "
            "eval.judge.url=null"
        )
    if judge.samples > config.eval.samples:
        raise ConfigError(
            f"eval.judge.samples={judge.samples} is more than the "
            f"eval.samples={config.eval.samples} responses to a question; lower the one or raise "
            "the other"
        )


def check_judge_keys(judge: JudgeConfig) -> None:
    """Of a judge whose url is set, without the evaluation around it. Raises ConfigError."""
    _check_url(judge.url)
    if not judge.model:
        raise ConfigError(
            "eval.judge.url is set but not eval.judge.model; give the name of a model on that "
            "server"
        )
    if judge.prompt is not None and judge.prompt_file is not None:
        raise ConfigError(
            "eval.judge.prompt and eval.judge.prompt_file are both set; keep one of them"
        )


def _check_url(url: str) -> None:
    """Of what might hold a secret nothing is repeated."""
    try:
        parts = urlsplit(url)
        has_host = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets without an address, a port that is no number
        raise ConfigError(
            "eval.judge.url is not an address; it is of the form http://host:port/v1"
        ) from None
    if parts.username is not None or parts.query or parts.fragment:
        raise ConfigError(
            "eval.judge.url must hold neither a user name nor a query; use http://host:port/v1, "
            "and eval.judge.api_key_variable for a key"
        )
    if not has_host:
        raise ConfigError(
            f"eval.judge.url={url} is not an address; it is of the form http://host:port/v1"
        )
    if parts.path.rstrip("/").endswith("/chat/completions"):
        raise ConfigError(f"eval.judge.url={url} is not the base; leave /chat/completions out")


def check_allocator(environment: Mapping[str, Any]) -> None:
    """Raises ConfigError if rollout.server.environment turns torch's expandable segments on for
    colocated servers.

    SGLang's memory saver, by which they give memory back, does not work with them. What the actor
    itself has set is not handed on to servers.
    """
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        value = str(environment.get(name) or "")
        settings = dict(part.partition(":")[::2] for part in value.replace(" ", "").split(","))
        if settings.get("expandable_segments", "").lower() == "true":
            raise ConfigError(
                f"rollout.server.environment has {name}={value}, but with expandable_segments "
                "servers cannot give memory back, which rollout.colocated=true needs; take that "
                "setting out"
            )
