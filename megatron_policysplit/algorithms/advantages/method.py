"""What a method is: a pure function of a batch, and what it needs from the trainer for that."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_policysplit.algorithms.advantages.batch import AdvantageBatch
from megatron_policysplit.algorithms.advantages.groups import group_extremes, zscore
from megatron_policysplit.algorithms.token_signals import TokenSignals
from megatron_policysplit.rows import Mode, SecondRollout

State = dict[str, float]


@dataclass(frozen=True)
class NoOptions:
    """The options of a method that has none."""


def with_advantage(rewards: Tensor, group: Tensor, options: Any) -> Tensor:
    """[R] bool: rows whose reward differs from the mean of their group."""
    return zscore(rewards, group) != 0


def in_mixed_groups(rewards: Tensor, group: Tensor, options: Any) -> Tensor:
    """[R] bool: rows of groups whose rewards are not all equal."""
    highest, lowest = group_extremes(rewards, group)
    return highest > lowest


def all_rows(rewards: Tensor, group: Tensor, options: Any) -> Tensor:
    """[R] bool: every row, where the loss has a term besides the advantage."""
    return torch.ones(len(rewards), dtype=torch.bool)


@dataclass(frozen=True)
class Selection:
    """Dynamic sampling: which questions a batch is made of."""

    # Whether a question is trained, from the rewards of all its responses, in whatever mode.
    keeps: Callable[[Sequence[float]], bool]
    # How many times data.batch_questions questions are drawn, until as many are kept.
    max_rounds: int


@dataclass(frozen=True)
class Method:
    """A method and what it needs from the trainer.

    Every file in `methods/` ends with one. `signals` is what the method computes; everything else
    has a default that fits a method like GRPO. Functions take the method's options, an instance of
    the dataclass `options`.
    """

    # signals(batch, options, state): what each token of a whole rollout batch is trained with. Over
    # which tokens its statistics are, and how fresh, is the trainer's affair (algorithm.scope and
    # algorithm.statistics).
    signals: Callable[[AdvantageBatch, Any, State], TokenSignals]
    source: str  # the paper or the code it follows

    # Options and defaults.
    options: type = NoOptions  # dataclass of the keys under algorithm.options, made by `config.key`
    # Values of the `algorithm` keys that the configuration leaves null.
    loss: Mapping[str, Any] = field(default_factory=dict)
    # check(options, modes): raises ConfigError for options that do not fit a run of these modes.
    check: Callable[[Any, Sequence[str]], None] = lambda options, modes: None

    # Modes and questions.
    sampling_modes: Sequence[Mode] = (Mode.NORMAL,)  # the modes that sample, by their shares
    training_modes: Sequence[Mode] = (Mode.NORMAL,)  # the prompts a response is trained under
    other_modes: bool = False  # whether those of `modes.others` sample and train too
    # Which questions are trained; None: all that are drawn.
    selection: Callable[[Any], Selection | None] = lambda options: None
    # second_rollout(options, state, questions, samples): what to sample besides a batch of
    # `questions` questions with `samples` responses each. Its right responses, at most `most`,
    # become auxiliary rows (`AdvantageBatch.auxiliary`); the others are forgotten.
    second_rollout: Callable[[Any, State, int, int], SecondRollout | None] = lambda *context: None
    # How the loss of auxiliary rows is aggregated, over the number of the *other* rows; None: with
    # the others, as algorithm.loss_aggregation says.
    auxiliary_aggregation: str | None = None

    # Rewards and rows.
    # length_reward(lengths, longest, options): [R] fp32, added to the rewards of responses of
    # `lengths` [R] tokens, `longest` at most, before anything else is made of them; None: nothing.
    length_reward: Callable[[Tensor, int, Any], Tensor] | None = None
    # live(rewards, group, options): [R] bool, rows that can change the weights. The others have a
    # zero loss at every token whatever their statistics, and are not trained. Auxiliary rows are
    # all trained.
    live: Callable[[Tensor, Tensor, Any], Tensor] = with_advantage
    # Whether the signals of a token come from the rows of its question alone, so that a question
    # whose rows are all dead needs no statistics.
    within_questions: bool = False
    # Whether the engine's log-probs of what it sampled can take the place of the actor's
    # (algorithm.old_logprobs): signals and state read nothing else of the policy, and no term of
    # the loss has a kink where the two are equal.
    engine_logprobs: Callable[[Any], bool] = lambda options: False

    # State, carried from one optimizer step to the next and through checkpoints.
    begin: Callable[[Any], State] = lambda options: {}
    # next_state(state, batch, options): `batch` has the statistics that the signals were made from.
    next_state: Callable[[State, AdvantageBatch, Any], State] = lambda state, batch, options: state

    # Statistics that score passes take besides log-probs and entropies.
    prompt_logprobs: bool = False  # log-probs of prompts, for `AdvantageBatch.prompt_logprob`
    # The probability mass of the nuclei whose entropies are taken, for
    # `AdvantageBatch.nucleus_entropy` and `TokenSignals.nucleus_coef`; None: no nuclei.
    nucleus: Callable[[Any], float | None] = lambda options: None
