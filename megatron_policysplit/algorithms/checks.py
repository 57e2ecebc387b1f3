"""Checks of a method's options against the rest of a configuration."""

from __future__ import annotations

from megatron_policysplit.config import Config
from megatron_policysplit.config.modes import modes_of
from megatron_policysplit.errors import ConfigError


def check_method(config: Config) -> None:
    """Raises ConfigError for wrong options, or for what the method does not go with."""
    replayed, engine = config.rollout.engine == "replay", config.algorithm.old_logprobs == "engine"
    if not config.algorithm.options and not replayed and not engine:
        return
    from megatron_policysplit.algorithms.methods import build_algorithm

    algorithm = build_algorithm(config.algorithm)
    algorithm.method.check(algorithm.options, [mode.value for mode in modes_of(config.modes)])
    if engine and not algorithm.method.engine_logprobs(algorithm.options):
        raise ConfigError(
            "algorithm.old_logprobs=engine leaves rows unscored, but "
            f"algorithm.name={config.algorithm.name} with "
            "these options needs more of them than the engine's log-probs; set "
            "algorithm.old_logprobs=actor"
        )
    if replayed and algorithm.method.selection(algorithm.options) is not None:
        raise ConfigError(
            f"rollout.engine=replay cannot serve algorithm.name={config.algorithm.name} with "
            "dynamic sampling, because "
            "a dump holds no responses to questions that were dropped; replay with a method "
            "without, or use another "
            "engine"
        )
