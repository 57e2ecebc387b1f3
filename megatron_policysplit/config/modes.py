"""The modes of a run as its configuration names them: the two of Policy Split, and those of
`modes.others`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from megatron_policysplit.config.keys import read_keys
from megatron_policysplit.config.schema import Config, ModesConfig, OtherModeConfig, SamplingConfig
from megatron_policysplit.errors import ConfigError
from megatron_policysplit.rows import MODES, Mode

if TYPE_CHECKING:
    pass

# The two modes, and what metrics of another kind begin with.
RESERVED = (
    *(mode.value for mode in MODES),
    "actor",
    "agreement",
    "auxiliary",
    "dynamic",
    "eval",
    "importance",
    "kl",
    "memory",
    "method",
    "reward",
    "rollout",
    "sync",
    "throughput",
    "time",
)


def other_modes(config: ModesConfig) -> dict[Mode, OtherModeConfig]:
    """`modes.others`, checked. Raises ConfigError for a name or a setting that cannot be used."""
    found = {}
    for name, given in config.others.items():
        key = f"modes.others.{name}"
        if not re.fullmatch(r"[a-z][a-z0-9_]*", str(name)) or name in RESERVED:
            raise ConfigError(
                f"{key} cannot be a mode's name in the logs; use lower-case letters, digits and "
                f"'_', and none of {', '.join(RESERVED)}"
            )
        if not isinstance(given, Mapping):
            raise ConfigError(
                f"{key}={given} is not a mapping; give {{prompt: TEXT}} or {{prompt_file: PATH}}"
            )
        found[Mode(name)] = read_keys(OtherModeConfig, given, f"{key}.", "a mode")
    return found


def modes_of(config: ModesConfig) -> tuple[Mode, ...]:
    """Every mode that has a prompt, normal first."""
    return (*MODES, *other_modes(config))


def sampling_by_mode(config: Config) -> dict[Mode, SamplingConfig]:
    """How each mode samples."""
    rollout = config.rollout
    return {
        Mode.NORMAL: rollout.normal,
        Mode.HIGH_ENTROPY: rollout.high_entropy,
        **other_modes(config.modes),
    }


def temperatures_by_mode(config: Config) -> dict[Mode, float]:
    """At which each mode samples, and at which its log-probs are taken."""
    return {mode: sampling.temperature for mode, sampling in sampling_by_mode(config).items()}


def temperature_key(mode: Mode) -> str:
    """The configuration key of its temperature."""
    return f"{'rollout' if mode in MODES else 'modes.others'}.{mode.value}.temperature"


def shared_out(samples: int, shares: Mapping[Mode, int]) -> dict[Mode, int]:
    """`samples` by `shares`. Raises ConfigError where that does not come out even."""
    total = sum(shares.values())
    if total == 0 or samples % total:
        listed = ", ".join(f"{mode.value} {share}" for mode, share in shares.items())
        remedy = f"use a multiple of {total}" if total else "give one of them a share above 0"
        raise ConfigError(
            f"rollout.samples_per_question={samples} cannot be shared out among the modes (shares: "
            f"{listed}); {remedy}"
        )
    return {mode: samples // total * share for mode, share in shares.items() if share}


MODE_LABELS = {
    "normal": "normal",
    "high_entropy": "high-entropy",
}  # further modes are called as they are named


def mode_label(mode: str) -> str:
    return MODE_LABELS.get(mode, mode)
