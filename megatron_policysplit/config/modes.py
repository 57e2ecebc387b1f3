"""The modes of a run by its configuration: the two of Policy Split, and those of `modes.others`."""

from __future__ import annotations

import re
from collections.abc import Mapping

from megatron_policysplit.config.keys import read_keys
from megatron_policysplit.config.rollout_schema import (
    OtherModeConfig,
    RolloutConfig,
    SamplingConfig,
)
from megatron_policysplit.config.schema import ModesConfig
from megatron_policysplit.errors import ConfigError
from megatron_policysplit.rows import MODES, Mode

# Names that a mode cannot have: the two modes', and what metrics of another kind begin with.
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
    """Read `modes.others`. Raises ConfigError for a name or a setting that cannot be used."""
    modes = {}
    for name, entry in config.others.items():
        key = f"modes.others.{name}"
        if not re.fullmatch(r"[a-z][a-z0-9_]*", str(name)) or name in RESERVED:
            raise ConfigError(
                f"{key} cannot be a mode's name in the logs; use lower-case letters, digits and "
                f"'_', and none of {', '.join(RESERVED)}"
            )
        if not isinstance(entry, Mapping):
            raise ConfigError(
                f"{key}={entry} is not a mapping; give {{prompt: TEXT}} or {{prompt_file: PATH}}"
            )
        modes[Mode(name)] = read_keys(OtherModeConfig, entry, f"{key}.", "a mode")
    return modes


def modes_of(config: ModesConfig) -> tuple[Mode, ...]:
    """Every mode that has a prompt, normal first."""
    return (*MODES, *other_modes(config))


def sampling_by_mode(rollout: RolloutConfig, modes: ModesConfig) -> dict[Mode, SamplingConfig]:
    """The sampling settings of each mode, normal first."""
    return {
        Mode.NORMAL: rollout.normal,
        Mode.HIGH_ENTROPY: rollout.high_entropy,
        **other_modes(modes),
    }


def temperatures_by_mode(rollout: RolloutConfig, modes: ModesConfig) -> dict[Mode, float]:
    """The temperature of each mode, at which it samples and its log-probs are taken."""
    sampling = sampling_by_mode(rollout, modes)
    return {mode: settings.temperature for mode, settings in sampling.items()}


def temperature_key(mode: Mode) -> str:
    """The configuration key of a mode's temperature."""
    return f"{'rollout' if mode in MODES else 'modes.others'}.{mode.value}.temperature"


def shared_out(samples: int, shares: Mapping[Mode, int]) -> dict[Mode, int]:
    """Divide a question's `samples` among the modes in proportion to their `shares`.

    A mode without a share is left out. Raises ConfigError where that does not come out even.
    """
    total = sum(shares.values())
    if total == 0 or samples % total:
        listed = ", ".join(f"{mode.value} {share}" for mode, share in shares.items())
        remedy = f"use a multiple of {total}" if total else "give one of them a share above 0"
        raise ConfigError(
            f"rollout.samples_per_question={samples} cannot be shared out among the modes (shares: "
            f"{listed}); {remedy}"
        )
    return {mode: samples // total * share for mode, share in shares.items() if share}


# In prose and charts; further modes are called as they are named.
MODE_LABELS = {"normal": "normal", "high_entropy": "high-entropy"}


def mode_label(mode: str) -> str:
    """The name of a mode in prose and charts."""
    return MODE_LABELS.get(mode, mode)
