"""SCOPE-RL: AEPO with a sampling temperature in proportion to the entropy's distance to its target.

Source: arXiv 2510.08141 v7. The objective adds to GRPO's a mean over the responses o_i of a second
rollout (i = 1..G' for a question) at temperature T:

    T = clip(1 + target - H, low, high)
    J = J_GRPO + alpha E[1/G' sum_i 1[R_i = 1] 1/|o_i| sum_t min(r_t, clip(r_t, 1 - eps, 1 + eps))]

- r_t is the ratio at the mode's own temperature, while the response is sampled at T times that.
- alpha is the number of auxiliary samples over that of ordinary ones, with at least one sample a
  batch. Each is of a question of its own as far as there are questions.
- A right auxiliary row weighs 1 / (ordinary rows x |o_i|), whatever algorithm.loss_aggregation is
  for the other rows, and is in no denominator.
- H is measured, and auxiliary rows are left out of everything else, as in `aepo`.

The formulas come from notes on the paper, not from its text, and its code was not found.
UNVERIFIED: H before the first batch (0 here, as in v1-v6), G' (the samples of a question), eps
(algorithm.clip_low and clip_high, 0.2).
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_policysplit.algorithms.advantages import Method, SecondRollout, State
from megatron_policysplit.algorithms.methods.aepo import entropy_state, signals
from megatron_policysplit.config import key


@dataclass(frozen=True)
class Options:
    target: float = key(0.5, "Target of the mean entropy, in nats (H_0 in the paper).", above=0.0)
    low: float = key(0.8, "Lowest temperature, as a multiple of the mode's.", above=0.0)
    high: float = key(1.2, "Highest temperature, as a multiple of the mode's.", above=0.0)
    alpha: float = key(1 / 64, "Auxiliary samples as a share of the ordinary ones.", above=0.0)


def second_rollout(options: Options, state: State, questions: int, samples: int) -> SecondRollout:
    """What to sample besides a batch of `questions` questions with `samples` responses each."""
    total = max(1, round(options.alpha * questions * samples))
    # One sample a question as far as the questions reach, then as many more of each (rounded up).
    answered_again = min(questions, total)
    temperature = min(max(1 + options.target - state["entropy"], options.low), options.high)
    return SecondRollout(temperature, answered_again, -(-total // answered_again))


METHOD = Method(
    signals,
    source="arXiv 2510.08141 v7 (from notes)",
    options=Options,
    second_rollout=second_rollout,
    auxiliary_aggregation="sequence_mean_token_mean",
    begin=lambda options: {"entropy": 0.0},
    next_state=entropy_state,
)
