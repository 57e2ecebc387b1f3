"""SCOPE-RL (arXiv 2510.08141 v7): AEPO with a temperature in proportion to how far the entropy is
from its target.

    T = clip(1 + target - H, low, high)
    J = J_GRPO + alpha E[1/G' sum_i 1[R_i = 1] 1/|o_i| sum_t min(r_t, clip(r_t, 1 - eps, 1 + eps))]

over responses of a second rollout at temperature T; r_t is the ratio at the mode's own temperature
(T = 1 there). alpha is the number of auxiliary samples over that of ordinary ones, at least one
sample a batch; each is of a question of its own as far as there are questions. A right one weighs 1
/ (ordinary rows x |o_i|), whatever algorithm.loss_aggregation is for the others, and is in no
denominator. H is measured, and auxiliary rows are kept out of everything else, as in `aepo`.

The formulas are known to us from notes on the paper, not from its text, and its code was not found.
UNVERIFIED: H before the first batch (0 here, as in v1-v6), G' (the samples of a question), eps
(algorithm.clip_low, clip_high: 0.2).
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_policysplit.algorithms.advantages import Method, SecondRollout, State
from megatron_policysplit.algorithms.methods.aepo import measured, signals
from megatron_policysplit.config import key


@dataclass(frozen=True)
class Options:
    target: float = key(0.5, "H_0 in nats.", above=0.0)
    low: float = key(0.8, "Lowest temperature, times the mode's.", above=0.0)
    high: float = key(1.2, "Highest temperature, times the mode's.", above=0.0)
    alpha: float = key(1 / 64, "Auxiliary samples as a share of the ordinary ones.", above=0.0)


def second_rollout(options: Options, state: State, questions: int, samples: int) -> SecondRollout:
    wanted = max(1, round(options.alpha * questions * samples))
    asked = min(questions, wanted)
    temperature = min(max(1 + options.target - state["entropy"], options.low), options.high)
    return SecondRollout(temperature, asked, -(-wanted // asked))


METHOD = Method(
    signals,
    source="arXiv 2510.08141 v7 (from notes)",
    options=Options,
    second_rollout=second_rollout,
    auxiliary_aggregation="sequence_mean_token_mean",
    begin=lambda options: {"entropy": 0.0},
    next_state=measured,
)
