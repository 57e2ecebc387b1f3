"""Checks of a method's options against the rest of a configuration."""

from __future__ import annotations

from megatron_policysplit.config import Config
from megatron_policysplit.config.modes import modes_of
from megatron_policysplit.errors import ConfigError


def check_method(config: Config) -> None:
    """Raises ConfigError for wrong options, or for keys that the method does not go with."""
    is_replay = config.rollout.engine == "replay"
    uses_engine_logprobs = config.algorithm.old_logprobs == "engine"
    if not config.algorithm.options and not is_replay and not uses_engine_logprobs:
        return
    # Imported only where it is needed: methods import torch, which takes seconds.
    from megatron_policysplit.algorithms.methods import build_algorithm

    algorithm = build_algorithm(config.algorithm)
    algorithm.method.check(algorithm.options, [mode.value for mode in modes_of(config.modes)])
    if uses_engine_logprobs and not algorithm.method.engine_logprobs(algorithm.options):
        raise ConfigError(
            "algorithm.old_logprobs=engine leaves rows unscored, but "
            f"algorithm.name={config.algorithm.name} with these options needs more of them than "
            "the engine's log-probs; set algorithm.old_logprobs=actor"
        )
    if is_replay and algorithm.method.selection(algorithm.options) is not None:
        raise ConfigError(
            f"rollout.engine=replay cannot serve algorithm.name={config.algorithm.name} with "
            "dynamic sampling, because a dump holds no responses to questions that were dropped; "
            "replay with a method without, or use another engine"
        )
