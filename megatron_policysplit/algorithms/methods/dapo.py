"""DAPO (arXiv 2503.14476): GRPO with a higher upper clip, token mean, dynamic sampling and overlong
punishment.

Clip-higher: the ratio counts between 0.8 and 1.28. Dynamic sampling: a question whose responses are
all graded alike has no advantage and is dropped; further questions are drawn, a whole batch at a
time, until data.batch_questions mixed ones are there. The paper sets no bound on that; `max_rounds`
is ours. The rule sees the grades, without the punishment

    0                                   where |o| <= L_max - L_cache
    (L_max - L_cache - |o|) / L_cache   where it is longer, down to -1 at L_max

that is added to them before A_i = (r_i - mean r) / (std r + 1e-6). L_max is
rollout.max_response_tokens. The paper grades +1 and -1, where ours are 1 and 0: `punishment: 0.5`
is the paper's against the difference of right and wrong. It has no KL term; algorithm.kl_coef is 0
by default. With dynamic sampling the logged rewards are those of the questions kept; dynamic/* says
how many were dropped, and the mean reward of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_policysplit.algorithms.advantages import (
    AdvantageBatch,
    Method,
    Selection,
    State,
    TokenSignals,
    zscore,
)
from megatron_policysplit.config import key

CACHE_SHARE = 4096 / 20480  # of the paper's L_max


@dataclass(frozen=True)
class Options:
    dynamic_sampling: bool = key(
        True, "Train questions with mixed grades only, and draw others for the rest."
    )
    max_rounds: int = key(
        10, "Batches of questions drawn for one that is trained, at most.", minimum=1
    )
    cache_tokens: int | None = key(
        None,
        "L_cache; null: 0.2 of rollout.max_response_tokens, as in the paper. 0: no punishment.",
        minimum=0,
    )
    punishment: float = key(1.0, "Of a response of rollout.max_response_tokens.", minimum=0.0)


def signals(batch: AdvantageBatch, options: Options, state: State) -> TokenSignals:
    return TokenSignals(batch.on_tokens(zscore(batch.rewards, batch.group)))


def length_reward(lengths: Tensor, longest: int, options: Options) -> Tensor:
    """[R] fp32, 0 down to -punishment: Eq. 13, for responses of `lengths` [R] int64 tokens of at
    most `longest`.
    """
    cache = longest * CACHE_SHARE if options.cache_tokens is None else options.cache_tokens
    if cache == 0:
        return torch.zeros(len(lengths))
    return -options.punishment * ((lengths - (longest - cache)) / cache).clamp(0, 1).float()


def mixed(rewards: Sequence[float]) -> bool:
    return len(set(rewards)) > 1


METHOD = Method(
    signals,
    source="arXiv 2503.14476",
    options=Options,
    loss={"clip_high": 0.28},
    length_reward=length_reward,
    engine_logprobs=lambda options: True,
    selection=lambda options: (
        Selection(mixed, options.max_rounds) if options.dynamic_sampling else None
    ),
)
