"""Reward functions by name: the built-in ones, and `package.module:function` of users' own."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable

from megatron_policysplit.data.questions import Question
from megatron_policysplit.errors import ConfigError

Reward = Callable[[str, Question], float]  # (response, question) -> reward

_BUILT_IN = {
    "math": "megatron_policysplit.rewards.math:reward",
    "reasoning_gym": "megatron_policysplit.rewards.reasoning_gym:reward",
    "exact": "megatron_policysplit.rewards.exact:reward",
}


def load_reward(function: str) -> Reward:
    """Load the reward function of a name; modules of the current directory can be imported, too.

    function: as the key `reward.function`. Raises ConfigError if it cannot be imported or called.
    """
    module_name, colon, name = _BUILT_IN.get(function, function).partition(":")
    if not (module_name and colon and name):
        raise ConfigError(
            f"reward.function={function} is not one of {', '.join(_BUILT_IN)} and not of the form "
            "package.module:function"
        )
    # The command `policysplit` does not have the current directory on its path, as `python -m` has.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises when it is imported
        raise ConfigError(
            f"reward.function={function} cannot be imported: {type(error).__name__}: {error}; run "
            "in the directory of the module, or install it"
        ) from error
    if not hasattr(module, name):
        raise ConfigError(f"reward.function={function}: the module {module_name} has no `{name}`")
    reward = getattr(module, name)
    if not callable(reward):
        raise ConfigError(
            f"reward.function={function} is a {type(reward).__name__}, which cannot be called"
        )
    _check_signature(function, reward)
    return reward


def _check_signature(function: str, reward: Callable) -> None:
    """Raise ConfigError if a function cannot be called as (response, question), or is async."""
    if inspect.iscoroutinefunction(reward) or inspect.isgeneratorfunction(reward):
        raise ConfigError(
            f"reward.function={function} returns no number when it is called, because it is async "
            "or a generator; give a plain function"
        )
    try:
        signature = inspect.signature(reward)
    except ValueError:  # a function in C that does not tell
        return
    try:
        signature.bind("", None)
    except TypeError as error:
        raise ConfigError(
            f"reward.function={function} cannot be called as f(response, question): it is "
            f"f{signature} ({error}); see docs/new_dataset_and_reward.md"
        ) from error
