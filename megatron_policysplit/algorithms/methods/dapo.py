"""DAPO: GRPO with a higher upper clip, a token mean, dynamic sampling and an overlong punishment.

Source: arXiv 2503.14476.

- Clip-higher: the ratio is clipped to [0.8, 1.28].
- Dynamic sampling: a question whose responses all have the same grade has no advantage and is
  dropped. Further questions are drawn, a whole batch at a time, until there are
  data.batch_questions questions with mixed grades. The paper sets no bound on the number of
  batches; `max_rounds` is ours. The rule looks at the grades without the punishment. The logged
  rewards are those of the trained questions; dynamic/* says how many were dropped, and the mean
  reward of all.
- Overlong punishment: a response of |o| tokens has this added to its reward, before
  A_i = (r_i - mean r) / (std r + 1e-6) is computed:

      0                                   where |o| <= L_max - L_cache
      (L_max - L_cache - |o|) / L_cache   where it is longer, down to -1 at L_max

  L_max is rollout.max_response_tokens and L_cache is `cache_tokens`. The paper grades right and
  wrong +1 and -1, this project 1 and 0. `punishment: 0.5` is therefore as strong as the paper's.

The paper has no KL term; algorithm.kl_coef is 0 by default.
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
        True, "Train questions with mixed grades only, and draw others in place of the rest."
    )
    max_rounds: int = key(
        10, "Batches of questions drawn for one that is trained, at most.", minimum=1
    )
    cache_tokens: int | None = key(
        None,
        "L_cache in tokens. null is 0.2 of rollout.max_response_tokens, as in the paper; 0 is no "
        "punishment.",
        minimum=0,
    )
    punishment: float = key(
        1.0, "Punishment of a response of rollout.max_response_tokens tokens.", minimum=0.0
    )


def signals(batch: AdvantageBatch, options: Options, state: State) -> TokenSignals:
    return TokenSignals(batch.on_tokens(zscore(batch.rewards, batch.group)))


def length_reward(lengths: Tensor, longest: int, options: Options) -> Tensor:
    """The overlong punishment (Eq. 13) of every response, [R] fp32 from 0 down to -punishment.

    lengths: [R] int64, tokens of the responses. longest: L_max in tokens.
    """
    cache = longest * CACHE_SHARE if options.cache_tokens is None else options.cache_tokens
    if cache == 0:
        return torch.zeros(len(lengths))
    return -options.punishment * ((lengths - (longest - cache)) / cache).clamp(0, 1).float()


def mixed(rewards: Sequence[float]) -> bool:
    """Whether the responses to a question have more than one grade."""
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
