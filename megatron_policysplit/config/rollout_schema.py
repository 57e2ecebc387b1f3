"""Configuration keys of sampling, engines, weight sync and their agreement with the actor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_policysplit.config.keys import LARGEST_SECONDS, key


@dataclass
class SamplingConfig:
    """How a mode samples: `rollout.normal`, `rollout.high_entropy`."""

    temperature: float = key(
        1.0, "Sampling temperature; log-probs of this mode are taken at it.", minimum=1e-6
    )
    top_p: float = key(
        1.0,
        "Nucleus mass; below 1 the log-probs are no longer those of the sampling.",
        minimum=1e-6,
    )
    top_k: int = key(-1, "Keep only the k most likely tokens; -1 keeps all.", minimum=-1)
    share: int = key(
        1,
        "Share of this mode in a question's samples, by proportion to the other modes'.",
        minimum=0,
    )


@dataclass
class OtherModeConfig(SamplingConfig):
    """An entry of `modes.others`."""

    prompt: str | None = key(None, "System prompt of the mode.")
    prompt_file: str | None = key(None, "Read the prompt from this UTF-8 file instead.", path=True)


@dataclass
class ServerConfig:
    """SGLang servers that the run starts itself: `rollout.server`."""

    python: str | None = key(
        None,
        "Interpreter of the environment that has SGLang; null is the run's own.",
        path=True,
    )
    count: int | None = key(
        None,
        "SGLang servers to start, several behind sglang-router; null: one, or what fits if "
        "colocated.",
        minimum=1,
        maximum=4096,
    )
    tensor: int = key(1, "Tensor-parallel size of one server.", minimum=1, maximum=4096)
    dtype: str | None = key(
        None,
        "Precision of the served weights; null is model.dtype.",
        choices=("float32", "bfloat16"),
    )
    host: str = key(
        "127.0.0.1",
        "Address the servers listen on; anything but loopback needs rollout.api_key_variable.",
    )
    port: int = key(
        0,
        "Port of the first server; the others and the router follow it. 0 takes free ports.",
        minimum=0,
        maximum=65535,
    )
    devices: list[int] = key(
        list, "GPUs of the servers, in order; empty: the actor's if colocated, else the next."
    )
    arguments: dict[str, Any] = key(
        dict,
        "Further flags of sglang.launch_server, such as {mem-fraction-static: 0.6}; true is a flag "
        "alone. Numbers reach it as they are written.",
        verbatim=True,
        secret=True,
    )
    environment: dict[str, Any] = key(
        dict,
        "Environment variables of the servers, as they are written; true and false are 1 and 0, "
        "null unsets one.",
        verbatim=True,
        secret=True,
    )
    start_seconds: float = key(
        900.0,
        "Time a server has to answer its first request.",
        above=0.0,
        maximum=LARGEST_SECONDS,
    )
    health_seconds: float = key(
        120.0,
        "A server that makes no token for so long while asked for one hangs.",
        above=0.0,
        maximum=LARGEST_SECONDS,
    )
    restarts: int = key(
        3, "How often one server is started again in a run before the run ends.", minimum=0
    )


@dataclass
class RolloutConfig:
    """Generation: `rollout`."""

    engine: str = key(
        "local",
        "Where responses come from: transformers in process, SGLang servers, or a dump of an "
        "earlier run.",
        choices=("local", "sglang", "replay"),
    )
    samples_per_question: int = key(
        8,
        "Responses per question over all sampling modes (Policy Split takes them by the modes' "
        "shares).",
        minimum=2,
    )
    max_response_tokens: int = key(
        1024, "Longest response, end-of-sequence token included.", minimum=1
    )
    normal: SamplingConfig = key(SamplingConfig, "Sampling of the normal mode.")
    high_entropy: SamplingConfig = key(SamplingConfig, "Sampling of the high-entropy mode.")
    lot_questions: int = key(
        16, "Questions a replica's leader takes from the queue at a time.", minimum=1
    )
    max_batch_samples: int = key(256, "Samples the local engine generates together.", minimum=1)
    replay_dir: str | None = key(
        None, "Directory of rollout dumps (`rollouts/` of a run) for engine=replay.", path=True
    )
    addresses: list[str] = key(
        list,
        "SGLang servers that run already, such as http://node1:30000; empty: the run starts "
        "rollout.server.count.",
    )
    api_key_variable: str | None = key(
        None, "Environment variable that holds the API key of the SGLang servers."
    )
    concurrency: int = key(
        64,
        "Requests in flight per leader; one holds all samples of a question in a mode.",
        minimum=1,
    )
    request_seconds: float = key(
        1800.0,
        "Time limit of one request; past it, it is sent again.",
        above=0.0,
        maximum=LARGEST_SECONDS,
    )
    retries: int = key(
        4, "How often a request is sent again after a time limit or a damaged answer.", minimum=0
    )
    unavailable_seconds: float = key(
        1200.0,
        "How long requests wait for a server that is down or starting before the run ends.",
        above=0.0,
        maximum=LARGEST_SECONDS,
    )
    colocated: bool = key(
        False, "Servers on the actor's own GPUs: each side frees its memory while the other works."
    )
    overlap: bool = key(
        False, "Generate the next batch while this one is trained (one step off-policy)."
    )
    max_staleness: int = key(
        1,
        "With overlap: optimizer batches a sample's weights may be behind; older samples end the "
        "run.",
        minimum=1,
    )
    server: ServerConfig = key(ServerConfig, "Servers that the run starts itself.")


@dataclass
class WeightSyncConfig:
    """How new weights reach SGLang servers: `weight_sync`."""

    transport: str = key(
        "tensor",
        "How weights reach SGLang: shared memory on one machine, a broadcast between nodes, or "
        "files that both see.",
        choices=("tensor", "distributed", "disk"),
    )
    bucket_mib: int = key(
        512, "Weights sent with one request; a larger tensor goes alone.", minimum=1
    )
    timeout_seconds: float = key(
        300.0,
        "Time limit of one request or broadcast of a weight sync.",
        above=0.0,
        maximum=LARGEST_SECONDS,
    )
    directory: str | None = key(
        None, "Where transport=disk writes snapshots; null is weights/ in run.dir.", path=True
    )
    master_address: str | None = key(
        None,
        "Address of the sending nodes for transport=distributed; null: each one's own, loopback "
        "where all is.",
    )


@dataclass
class AgreementConfig:
    """The comparison of engine and actor log-probs: `agreement`."""

    every: int = key(
        10,
        "Compare engine and actor log-probs after the first sync and every so many steps; 0 is "
        "off.",
        minimum=0,
    )
    max_difference: float | None = key(
        None,
        "Bound of the mean |difference| in nats; null follows the precisions (docs/sglang.md).",
        above=0.0,
    )
    max_k3: float | None = key(
        None,
        "Bound of the mean k3 KL in nats; null follows the precisions (docs/sglang.md).",
        above=0.0,
    )
    breaches: int = key(
        2, "Stop after so many comparisons in a row past a bound; the earlier ones warn.", minimum=1
    )
