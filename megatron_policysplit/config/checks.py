"""Checks of configuration keys against each other: `check_config`, and those of the judge.

They touch no file and no network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import isqrt
from urllib.parse import urlsplit

from megatron_policysplit.config.engine_checks import check_engines
from megatron_policysplit.config.keys import show
from megatron_policysplit.config.load import check_values
from megatron_policysplit.config.modes import sampling_by_mode, shared_out
from megatron_policysplit.config.rollout_schema import SamplingConfig
from megatron_policysplit.config.schema import Config, JudgeConfig
from megatron_policysplit.errors import ConfigError
from megatron_policysplit.rows import MODES, Mode


def check_config(config: Config) -> list[str]:
    """Check every value, and keys against each other; return warnings to show once.

    Raises ConfigError naming the keys, their values and the remedy.
    """
    check_values(config)
    sampling = sampling_by_mode(config.rollout, config.modes)
    _check_batch(config, sampling)
    _check_prompts_and_replay(config)
    check_engines(config)
    check_judge(config)
    _check_parallel(config)
    _check_training(config)
    return list(_sampling_warnings(sampling))


def _check_batch(config: Config, sampling: Mapping[Mode, SamplingConfig]) -> None:
    """Check that samples can be divided among the modes, and a batch among its optimizer steps."""
    steps, samples = config.train.optimizer_steps_per_batch, config.rollout.samples_per_question
    if config.algorithm.name == "policy_split":
        shared_out(samples, {mode: settings.share for mode, settings in sampling.items()})
    responses = config.data.batch_questions * samples
    if responses % steps:
        raise ConfigError(
            f"train.optimizer_steps_per_batch={steps} does not divide "
            f"the {responses} responses of a batch (data.batch_questions x "
            "rollout.samples_per_question); use one of "
            f"{_divisors_near((config.data.batch_questions, samples), steps)}"
        )


def _check_prompts_and_replay(config: Config) -> None:
    """Check the high-entropy prompt, and what rollouts of an earlier run can serve."""
    rollout, modes = config.rollout, config.modes
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


def _check_parallel(config: Config) -> None:
    """Check the parallel sizes against each other; `model_layout` checks them against the model."""
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


def _check_training(config: Config) -> None:
    """Check the schedule, the micro-batch's size and the bounds of the loss and the optimizer."""
    rollout, train, algorithm = config.rollout, config.train, config.algorithm
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


def _sampling_warnings(sampling: Mapping[Mode, SamplingConfig]) -> Iterator[str]:
    """Warn of a mode whose samples are not of the distribution that log-probs are taken of.

    Raises ConfigError for a filter that keeps nothing or makes no sense.
    """
    for mode, settings in sampling.items():
        group = "rollout" if mode in MODES else "modes.others"
        filters = _sampling_filters(f"{group}.{mode.value}", settings)
        if filters:
            yield (
                f"{' and '.join(filters)} cut the sampling, but log-probs are those of the whole "
                "distribution"
            )


def _sampling_filters(name: str, sampling: SamplingConfig) -> list[str]:
    """The keys of a mode that cut its sampling, with their values. Raises ConfigError."""
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
    return filters


def _divisors_near(factors: tuple[int, int], target: int) -> str:
    """The three divisors of the product that are nearest to `target`, in words: `2, 4, 8`."""
    one, other = map(_divisors, factors)
    divisors = {a * b for a in one for b in other}
    nearest = sorted(sorted(divisors, key=lambda divisor: abs(divisor - target))[:3])
    return ", ".join(map(str, nearest))


def _divisors(number: int) -> list[int]:
    """The divisors of a number, found in the time of its square root."""
    smaller = [divisor for divisor in range(1, isqrt(number) + 1) if number % divisor == 0]
    return smaller + [number // divisor for divisor in smaller]


def check_judge(config: Config) -> None:
    """Check the keys of the judge and of the evaluation it belongs to.

    Raises ConfigError naming the keys, their values and the remedy.
    """
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
    """Check the keys of a judge whose url is set, but not the evaluation. Raises ConfigError."""
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
    """Raise ConfigError unless `url` is the base of a server, without user name, query or path end.

    A url that may hold a secret is not repeated in the error.
    """
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
