"""What a method is: a pure function from a batch to what each token is trained with, and what it
needs for that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_policysplit.algorithms.advantages.batch import AdvantageBatch
from megatron_policysplit.algorithms.advantages.groups import group_extremes, zscore
from megatron_policysplit.rows import Mode, SecondRollout

State = dict[str, float]


@dataclass
class TokenSignals:
    """What the loss of each response token is made of, [T] fp32 each, nothing with a gradient;
    None: none of it.

    advantages: 0 outside the mask. scale: multiplies the policy term (None: 1), importance weight
    included.
    entropy_coef: weight of the token's differentiable entropy, besides algorithm.entropy_coef.
    drift_coef: weight of |log pi - log pi_old|. nucleus_coef: weight of the token's differentiable
    nucleus entropy in the mean over the step's rows of the sums over their tokens, whatever the
    loss aggregation (`Method.nucleus`).
    """

    advantages: Tensor
    scale: Tensor | None = None
    entropy_coef: Tensor | None = None
    drift_coef: Tensor | None = None
    nucleus_coef: Tensor | None = None


@dataclass(frozen=True)
class NoOptions:
    """Of a method without any."""


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
    """Dynamic sampling: which questions a batch is made of.

    keeps(rewards): whether a question is trained, from the rewards of all its responses, in
    whatever mode. max_rounds: how many times data.batch_questions questions are drawn, until as
    many are kept.
    """

    keeps: Callable[[Sequence[float]], bool]
    max_rounds: int


@dataclass(frozen=True)
class Method:
    """A method and what it needs from the trainer.

    signals(batch, options, state): one TokenSignals. `batch` is of the whole rollout batch; which
    tokens its statistics are over, and how fresh they are, is `algorithm.scope` and
    `algorithm.statistics`, and no affair of the function.
    options: dataclass of the keys under algorithm.options, made with `config.key`, with the paper's
    defaults.
    source: where it comes from. loss: the method's defaults of keys of `algorithm` that the
    configuration leaves null.
    sampling_modes: modes that sample, by their shares. training_modes: prompts each response is
    trained under.
    other_modes: whether those of `modes.others` sample and train too.
    check(options, modes): raises ConfigError for options that do not fit a run whose modes have
    these names.
    length_reward(lengths, longest, options): [R] fp32, added to the rewards of responses of
    `lengths` [R] tokens, of at most `longest`, before anything else is made of them. None: nothing
    is.
    selection(options): which questions are trained; None: those that are drawn.
    second_rollout(options, state, questions, samples): what to sample besides a batch of
    `questions` questions with `samples` responses each, by the state after the batch trained last.
    Its right responses, at most `most`, become auxiliary rows (`AdvantageBatch.auxiliary`); the
    others are forgotten.
    auxiliary_aggregation: of the loss of auxiliary rows, over the number of *other* rows; None:
    they are aggregated with the others, as `algorithm.loss_aggregation` says.
    live(rewards, group, options): [R] bool, rows that can change the weights; the others have a
    zero loss at every token whatever their statistics, and are not trained. It is not asked about
    auxiliary rows, which are all trained.
    within_questions: whether the signals of a token come from the rows of its question alone, so
    that a question whose rows are all dead needs no statistics.
    engine_logprobs(options): whether the engine's log-probs of what it sampled can take the place
    of the actor's (algorithm.old_logprobs): signals and state read nothing else of the policy, and
    no term of the loss has a kink where the two are equal. begin(options), next_state(state, batch,
    options): state that the method carries from one optimizer step to the next, and through
    checkpoints; `batch` holds the statistics that the step's signals were made from.
    prompt_logprobs: whether score passes take the log-probs of prompts too, for
    `AdvantageBatch.prompt_logprob`.
    nucleus(options): the probability mass of the nuclei whose entropies score passes take too, for
    `AdvantageBatch.nucleus_entropy` and `TokenSignals.nucleus_coef`; None: of none.
    """

    signals: Callable[[AdvantageBatch, Any, State], TokenSignals]
    source: str
    options: type = NoOptions
    loss: Mapping[str, Any] = field(default_factory=dict)
    sampling_modes: Sequence[Mode] = (Mode.NORMAL,)
    training_modes: Sequence[Mode] = (Mode.NORMAL,)
    other_modes: bool = False
    check: Callable[[Any, Sequence[str]], None] = lambda options, modes: None
    length_reward: Callable[[Tensor, int, Any], Tensor] | None = None
    selection: Callable[[Any], Selection | None] = lambda options: None
    second_rollout: Callable[[Any, State, int, int], SecondRollout | None] = lambda *given: None
    auxiliary_aggregation: str | None = None
    live: Callable[[Tensor, Tensor, Any], Tensor] = with_advantage
    within_questions: bool = False
    engine_logprobs: Callable[[Any], bool] = lambda options: False
    begin: Callable[[Any], State] = lambda options: {}
    next_state: Callable[[State, AdvantageBatch, Any], State] = lambda state, batch, options: state
    prompt_logprobs: bool = False
    nucleus: Callable[[Any], float | None] = lambda options: None
