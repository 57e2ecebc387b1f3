"""Advantage methods: one file a method, pure functions on CPU tensors, chosen by `algorithm.name`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_policysplit.advantages import grpo, policy_split
from megatron_policysplit.advantages.batch import AdvantageBatch, TokenStatistics, make_batch
from megatron_policysplit.config import AlgorithmConfig
from megatron_policysplit.rows import MODES, Mode

__all__ = ["METHODS", "AdvantageBatch", "Method", "TokenStatistics", "make_batch"]


@dataclass(frozen=True)
class Method:
    """A method and what it needs from the trainer.

    sampling_modes: modes that sample, in equal shares. training_modes: prompts each response is trained
    under. zero_reward_advantage_is_zero: a row whose correctness advantage is 0 has a zero advantage at
    every token, so it cannot change the weights and need not be trained.
    """

    advantages: Callable[[AdvantageBatch, AlgorithmConfig], Tensor]
    sampling_modes: Sequence[Mode]
    training_modes: Sequence[Mode]
    zero_reward_advantage_is_zero: bool

    def samples_per_mode(self, samples_per_question: int) -> Mapping[Mode, int]:
        return {mode: samples_per_question // len(self.sampling_modes) for mode in self.sampling_modes}


METHODS: Mapping[str, Method] = {
    "grpo": Method(grpo.advantages, (Mode.NORMAL,), (Mode.NORMAL,), zero_reward_advantage_is_zero=True),
    "policy_split": Method(policy_split.advantages, MODES, MODES, zero_reward_advantage_is_zero=True),
}
