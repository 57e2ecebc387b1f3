"""Which modes a method samples and trains in, and how many responses each gives to a question."""

from __future__ import annotations

from megatron_policysplit.algorithms.advantages import Method
from megatron_policysplit.config import ModesConfig, RolloutConfig
from megatron_policysplit.config.modes import other_modes, sampling_by_mode, shared_out
from megatron_policysplit.rows import Mode


def training_modes(modes: ModesConfig, method: Method) -> tuple[Mode, ...]:
    """The modes under whose prompts every response is trained."""
    return (*method.training_modes, *_further_modes(modes, method))


def samples_per_mode(rollout: RolloutConfig, modes: ModesConfig, method: Method) -> dict[Mode, int]:
    """Responses to a question by sampling mode, by the modes' shares.

    Modes that sample none are left out. Raises ConfigError where the shares do not come out even.
    """
    sampling_modes = (*method.sampling_modes, *_further_modes(modes, method))
    if len(sampling_modes) == 1:
        return {sampling_modes[0]: rollout.samples_per_question}
    sampling = sampling_by_mode(rollout, modes)
    shares = {mode: sampling[mode].share for mode in sampling_modes}
    return shared_out(rollout.samples_per_question, shares)


def _further_modes(modes: ModesConfig, method: Method) -> tuple[Mode, ...]:
    """Those of modes.others, for a method that takes them."""
    return tuple(other_modes(modes)) if method.other_modes else ()
