"""The methods, one file each, chosen by `algorithm.name`: a file here is a method, and there is no
other list.

A file has a `METHOD` (`advantages.Method`), its options as a dataclass, and pure functions of an
`AdvantageBatch` that can be called from anywhere. docs/new_method.md shows how one is added.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

from megatron_policysplit.algorithms.advantages.method import Method
from megatron_policysplit.config import METHOD_NAMES, AlgorithmConfig
from megatron_policysplit.config.load import read_options
from megatron_policysplit.errors import ConfigError

__all__ = ["METHOD_NAMES", "Algorithm", "build_algorithm", "method_named"]

DEFAULTS = {"clip_low": 0.2, "clip_high": 0.2, "loss_aggregation": "token_mean"}


@dataclass(frozen=True)
class Algorithm:
    """A method with its options, and the configuration whose nulls it has filled."""

    method: Method
    options: Any
    config: AlgorithmConfig


def method_named(name: str) -> Method:
    """The method of file `name`.py; ModuleNotFoundError if there is none (the configuration is
    checked before).
    """
    return import_module(f"{__name__}.{name}").METHOD


def build_algorithm(config: AlgorithmConfig) -> Algorithm:
    """What `config` chooses. Raises ConfigError for options that a method does not have, or of a
    wrong kind.

    Options of other methods are checked too: they wait for algorithm.name to change.
    """
    method = method_named(config.name)
    for name, given in config.options.items():
        if name not in METHOD_NAMES:
            raise ConfigError(
                f"unknown key algorithm.options.{name}; it holds options by method, as in "
                f"algorithm.options.{config.name}.KEY=VALUE, and the methods are "
                f"{', '.join(METHOD_NAMES)}"
            )
        if not isinstance(given, dict):
            raise ConfigError(
                f"algorithm.options.{name}={given} is not a mapping of the method's keys to values"
            )
        read_options(method_named(name).options, given, name)
    options = read_options(method.options, config.options.get(config.name, {}), config.name)
    unset = {
        key: value
        for key, value in (DEFAULTS | method.loss).items()
        if getattr(config, key) is None
    }
    return Algorithm(method, options, replace(config, **unset))
