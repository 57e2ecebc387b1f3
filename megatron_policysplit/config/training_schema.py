"""Configuration keys of rewards, the method with its loss, and optimisation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_policysplit.config.keys import LARGEST_RATE, LARGEST_SECONDS, key


@dataclass
class RewardConfig:
    """Grading: `reward`."""

    function: str = key(
        "math", "`math`, `reasoning_gym`, `exact`, or the path `package.module:function`."
    )
    workers: int = key(2, "Processes that grade responses.", minimum=1, maximum=1024)
    timeout_seconds: float = key(
        10.0,
        "Time limit for one response; past it the reward is 0.",
        above=0.0,
        maximum=LARGEST_SECONDS,
    )


# The names of the files, because importing the methods themselves would import torch.
METHOD_NAMES = tuple(
    sorted(
        file.stem
        for file in (Path(__file__).parents[1] / "algorithms" / "methods").glob("[a-z]*.py")
    )
)


@dataclass
class AlgorithmConfig:
    """The method and its loss: `algorithm`."""

    name: str = key("policy_split", "The method (docs/methods.md).", choices=METHOD_NAMES)
    options: dict[str, Any] = key(
        dict,
        "Each method's own keys, `METHOD: {KEY: VALUE}` (docs/methods.md); left out, the defaults "
        "of its paper.",
    )
    statistics: str = key(
        "batch",
        "What a method's statistics are of: the weights before the batch, or before each optimizer "
        "step, for which every one but the first costs a pass of its own.",
        choices=("batch", "step"),
    )
    scope: str = key(
        "global",
        "Which tokens a method's quantiles, covariances and means are over: all that are trained, "
        "or those of a micro-batch, as in some authors' code.",
        choices=("global", "micro"),
    )
    clip_low: float | None = key(
        None,
        "PPO clip: the ratio counts down to 1 - clip_low; null: the method's, or 0.2.",
        above=0.0,
    )
    clip_high: float | None = key(
        None,
        "PPO clip: the ratio counts up to 1 + clip_high; null: the method's, or 0.2.",
        above=0.0,
    )
    dual_clip: float | None = key(
        None,
        "Bound of a negative advantage's loss, times |A|; null: the method's, or none.",
        above=1.0,
    )
    loss_aggregation: str | None = key(
        None,
        "How token losses become one number; null: the method's, or token_mean.",
        choices=("token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum_norm"),
    )
    kl_coef: float = key(
        0.0, "Weight of the k3 KL to the initial policy; 0 keeps no reference weights.", minimum=0.0
    )
    entropy_coef: float = key(
        0.0, "Weight of a differentiable entropy bonus; 0 is off.", minimum=0.0
    )
    old_logprobs: str = key(
        "actor",
        "Denominator of the ratio where a response was sampled behind the row's own prompt: the "
        "actor's log-probs, or those that the engine returned; then such rows are scored for the "
        "logs alone (log.kl_tokens).",
        choices=("actor", "engine"),
    )
    importance_cap: float | None = key(
        None,
        "Truncation of the actor/engine importance weights; null takes no such weights.",
        above=0.0,
    )
    importance_level: str = key(
        "token",
        "Importance weights per token, or their product per response.",
        choices=("token", "sequence"),
    )


@dataclass
class TrainConfig:
    """Optimisation: `train`."""

    steps: int = key(100, "Rollout batches to train on.", minimum=1)
    optimizer_steps_per_batch: int = key(
        1, "Optimizer steps a rollout batch is split into.", minimum=1
    )
    max_tokens_per_micro_batch: int = key(
        8192, "Bound of a micro-batch, padding included.", minimum=1
    )
    head_chunk_tokens: int | None = key(
        None, "Tokens whose logits exist at a time; null takes 256, on a GPU 1024.", minimum=1
    )
    learning_rate: float = key(
        1e-6, "Peak learning rate of AdamW.", minimum=0.0, maximum=LARGEST_RATE
    )
    min_learning_rate: float = key(
        0.0, "Learning rate at the end of a decay.", minimum=0.0, maximum=LARGEST_RATE
    )
    lr_decay: str = key(
        "constant",
        "Learning-rate schedule after warm-up.",
        choices=("constant", "linear", "cosine"),
    )
    warmup_steps: int = key(0, "Optimizer steps of linear warm-up.", minimum=0)
    weight_decay: float = key(0.01, "AdamW weight decay.", minimum=0.0, maximum=LARGEST_RATE)
    adam_beta1: float = key(0.9, "AdamW beta1.", minimum=0.0)
    adam_beta2: float = key(0.999, "AdamW beta2.", minimum=0.0)
    adam_eps: float = key(1e-8, "AdamW epsilon.", above=0.0)
    clip_grad: float = key(1.0, "Bound of the global gradient norm; 0 is off.", minimum=0.0)
    distributed_optimizer: bool = key(False, "Shard optimizer state over data-parallel replicas.")
    deterministic: bool = key(
        False,
        "Take kernels and collectives on a GPU whose gradients have the same bits in every run, "
        "though they are slower; on the CPU they have them anyway (docs/reliability.md).",
    )
    overlong: str = key(
        "grade",
        "A response cut at max_response_tokens: grade it as it is, or mask it out of the loss.",
        choices=("grade", "mask"),
    )
    max_bad_steps: int = key(
        3, "Stop after so many batches in a row with a loss or gradient not finite.", minimum=1
    )
