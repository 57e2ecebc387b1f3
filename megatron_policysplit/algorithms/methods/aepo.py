"""AEPO (arXiv 2510.08141 v1-v6): right answers sampled hotter or colder push the entropy to a
target.

GRPO's gradient plus alpha E[grad log pi(o|q) R(q, o)] over responses o of a second rollout at the
temperature

    T = high if H <= target, low otherwise

with H the exact entropy of the batch trained last, in nats, over all trained tokens of its ordinary
rollouts; before the first batch H counts as 0. The first quarter of the questions (`questions`) is
answered again, as often as before. Right answers get the advantage 1, at most the share `alpha` of
the ordinary responses (60 of 512 x 5 in the authors' code), half as many above the target, and at
least one. They are in the token mean with the others, and nowhere else: not in a group's
statistics, in H, or in the logged rewards. Their old log-probs are the mode's own (T = 1 there) and
their ratio begins at 1, without a correction from T, as in the authors' code; they have no
importance weight actor/engine either, and engine and actor are not compared on them.

Where this differs from that code: rows are added and displace none; right is a reward of 1 and not
GRPO's advantage above 0.05, so that questions with nothing but right answers count; H is exact, and
of ordinary rollouts only; a batch without a right answer is trained without. The authors sample
with top_p = 0.99. With rollout.overlap H is one batch older.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_policysplit.algorithms.advantages import (
    AdvantageBatch,
    Method,
    SecondRollout,
    State,
    TokenSignals,
    zscore,
)
from megatron_policysplit.config import key


@dataclass(frozen=True)
class Options:
    target: float = key(0.5, "H_target in nats.", above=0.0)
    high: float = key(1.2, "Temperature up to the target, times the mode's.", above=0.0)
    low: float = key(0.8, "Temperature above the target, times the mode's.", above=0.0)
    questions: float = key(
        0.25, "Share of a batch's questions that are answered again; 1 is all.", above=0.0
    )
    alpha: float = key(
        60 / 2560, "Right answers trained, as a share of the ordinary responses.", above=0.0
    )


def signals(batch: AdvantageBatch, options: object, state: State) -> TokenSignals:
    """GRPO's z-score, and 1 for auxiliary rows."""
    return TokenSignals(
        batch.on_tokens(zscore(batch.rewards, batch.group).masked_fill(batch.auxiliary, 1.0))
    )


def second_rollout(options: Options, state: State, questions: int, samples: int) -> SecondRollout:
    warm = state["entropy"] <= options.target
    most = int(options.alpha * questions * samples)
    return SecondRollout(
        temperature=options.high if warm else options.low,
        questions=min(questions, math.ceil(options.questions * questions)),
        samples=samples,
        most=max(1, most if warm else most // 2),
    )


def measured(state: State, batch: AdvantageBatch, options: object) -> State:
    """H of this batch; the last one if none of its ordinary tokens is trained."""
    return {"entropy": batch.mean_entropy()} if batch.ordinary.any() else state


METHOD = Method(
    signals,
    source="arXiv 2510.08141 v1-v6",
    options=Options,
    loss={"dual_clip": 3.0},
    second_rollout=second_rollout,
    begin=lambda options: {"entropy": 0.0},
    next_state=measured,
)
