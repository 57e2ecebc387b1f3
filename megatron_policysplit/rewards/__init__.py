"""Rewards: `reward(response: str, question: Question) -> float`, graded in worker processes.

`math`, `reasoning_gym` and `exact` are built in; `package.module:function` names one of the user's
own.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable

from megatron_policysplit.data.questions import Question
from megatron_policysplit.errors import ConfigError
from megatron_policysplit.rewards.pool import Graded, RewardPool

__all__ = ["Graded", "Reward", "RewardPool", "load_reward"]

Reward = Callable[[str, Question], float]

_BUILT_IN = {
    "math": "megatron_policysplit.rewards.math:reward",
    "reasoning_gym": "megatron_policysplit.rewards.reasoning_gym:reward",
    "exact": "megatron_policysplit.rewards.exact:reward",
}


def load_reward(function: str) -> Reward:
    """The reward of that name; modules of the current directory can be imported too.

    Raises ConfigError naming `reward.function` if it is not importable or cannot be called.
    """
    module_name, colon, name = _BUILT_IN.get(function, function).partition(":")
    if not (module_name and colon and name):
        raise ConfigError(
            f"reward.function={function} is not one of {', '.join(_BUILT_IN)} and not of the form "
            "package.module:function"
        )
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
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
    return reward
