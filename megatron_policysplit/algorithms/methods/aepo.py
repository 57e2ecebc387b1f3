"""AEPO: auxiliary right answers, sampled hotter or colder, move the entropy to a target.

Source: arXiv 2510.08141 v1-v6. GRPO's gradient plus alpha E[grad log pi(o|q) R(q, o)] over the
responses o of a second rollout at the temperature

    T = high where H <= target, low otherwise

- H is the exact entropy of the batch trained last, in nats, over all trained tokens of its ordinary
  rollouts. It is the method's state. Before the first batch it counts as 0. With rollout.overlap it
  is one batch older.
- The second rollout samples the first quarter of the batch's questions again (`questions`), with as
  many responses to each as before.
- Its right answers become auxiliary rows with the advantage 1. Their number is at most the share
  `alpha` of the ordinary responses (60 of 512 x 5 in the authors' code), half of that where H is
  above the target, and at least one.
- Auxiliary rows are in the token mean with the other rows and nowhere else: not in a group's
  statistics, in H, or in the logged rewards.
- Their old log-probs are at the mode's own temperature and their ratio begins at 1, without a
  correction for T, as in the authors' code. They have no importance weight actor/engine, and engine
  and actor are not compared on them.

Differences from the authors' code: auxiliary rows are added and displace none. A right answer has a
reward above 0.5; the authors ask for a GRPO advantage above 0.05 instead, which leaves out
questions with nothing but right answers. H is exact and of ordinary rollouts only. A batch without
a right auxiliary answer is trained without auxiliary rows. The authors sample with top_p = 0.99.
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
    target: float = key(0.5, "Target of the mean entropy, in nats.", above=0.0)
    high: float = key(
        1.2,
        "Temperature where the entropy is at most the target, as a multiple of the mode's.",
        above=0.0,
    )
    low: float = key(
        0.8,
        "Temperature where the entropy is above the target, as a multiple of the mode's.",
        above=0.0,
    )
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
    """What to sample besides a batch of `questions` questions with `samples` responses each."""
    is_low = state["entropy"] <= options.target
    most = int(options.alpha * questions * samples)
    return SecondRollout(
        temperature=options.high if is_low else options.low,
        questions=min(questions, math.ceil(options.questions * questions)),
        samples=samples,
        most=max(1, most if is_low else most // 2),
    )


def entropy_state(state: State, batch: AdvantageBatch, options: object) -> State:
    """H of this batch; that of the batch before if no ordinary token of this one is trained."""
    return {"entropy": batch.mean_entropy()} if batch.ordinary.any() else state


METHOD = Method(
    signals,
    source="arXiv 2510.08141 v1-v6",
    options=Options,
    loss={"dual_clip": 3.0},
    second_rollout=second_rollout,
    begin=lambda options: {"entropy": 0.0},
    next_state=entropy_state,
)
