"""Which modes a method samples and trains in, and how many responses each gives to a question."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_policysplit.algorithms.advantages import Method
from megatron_policysplit.config import Config
from megatron_policysplit.config.modes import other_modes, sampling_by_mode, shared_out
from megatron_policysplit.rows import Mode


def training_modes(config: Config, method: Method) -> tuple[Mode, ...]:
    """The modes under whose prompts every response is trained."""
    return _modes_of_method(config, method, method.training_modes)


def samples_per_mode(config: Config, method: Method) -> dict[Mode, int]:
    """Responses to a question by sampling mode, by the modes' shares; modes that sample none are
    left out.
    """
    sampling, modes = (
        sampling_by_mode(config),
        _modes_of_method(config, method, method.sampling_modes),
    )
    if len(modes) == 1:
        return {modes[0]: config.rollout.samples_per_question}
    return shared_out(
        config.rollout.samples_per_question, {mode: sampling[mode].share for mode in modes}
    )


def _modes_of_method(config: Config, method: Method, own: Sequence[Mode]) -> tuple[Mode, ...]:
    return (*own, *(other_modes(config.modes) if method.other_modes else ()))
