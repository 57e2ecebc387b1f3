"""The methods, one file each; `algorithm.name` names the file, and there is no other list.

A file has a `METHOD` (`advantages.Method`), its options as a dataclass, and pure functions of an
`AdvantageBatch` that can be called from anywhere. docs/new_method.md shows how to add one.
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

# What a null key of `algorithm` means for a method that has no default of its own (`Method.loss`).
DEFAULTS = {"clip_low": 0.2, "clip_high": 0.2, "loss_aggregation": "token_mean"}


@dataclass(frozen=True)
class Algorithm:
    """A method ready to use. Made by `build_algorithm`."""

    method: Method
    options: Any  # the method's options dataclass, with the configured values
    config: AlgorithmConfig  # the `algorithm` group, its nulls replaced by the method's defaults


def method_named(name: str) -> Method:
    """The `METHOD` of file `name`.py. Raises ModuleNotFoundError if there is no such file."""
    return import_module(f"{__name__}.{name}").METHOD


def build_algorithm(config: AlgorithmConfig) -> Algorithm:
    """The method that `config` names, with its options and defaults.

    Raises ConfigError for options that a method does not have, or of a wrong type. Options of the
    other methods are checked too: they take effect when algorithm.name changes.
    """
    method = method_named(config.name)
    for name, values in config.options.items():
        if name not in METHOD_NAMES:
            raise ConfigError(
                f"unknown key algorithm.options.{name}; it holds options by method, as in "
                f"algorithm.options.{config.name}.KEY=VALUE, and the methods are "
                f"{', '.join(METHOD_NAMES)}"
            )
        if not isinstance(values, dict):
            raise ConfigError(
                f"algorithm.options.{name}={values} is not a mapping of the method's keys to values"
            )
        read_options(method_named(name).options, values, name)
    options = read_options(method.options, config.options.get(config.name, {}), config.name)
    unset = {
        key: value
        for key, value in (DEFAULTS | method.loss).items()
        if getattr(config, key) is None
    }
    return Algorithm(method, options, replace(config, **unset))
