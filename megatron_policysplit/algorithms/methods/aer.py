"""AER, adaptive entropy regularisation: a bonus for hard questions holds the entropy at a target.

UNVERIFIED RECONSTRUCTION after arXiv 2510.10959, whose equations were not found. Summaries of the
paper say that a question's coefficient follows from its difficulty, that the target is a ratio tau
of the initial entropy (about 0.4), and that a global scale moves at every step to stay there. The
formulas below and the other defaults are ours. GRPO's advantages, and at optimizer step k:

    loss    = L_GRPO - c_k w_q H_t                  for each token t of question q
    w_q     = max(0, rho - p_q) / rho
    c_{k+1} = c_k + rate (tau H_0 - H_k)            within [0, coef_max], from c_0 = 0

- p_q is the share of right answers in the question's group.
- H_t is the token's entropy, differentiable.
- H_k is the mean entropy at step k, H_0 that of the run's first batch, both over all trained tokens
  and in nats. c and H_0 are the method's state.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_policysplit.algorithms.advantages import (
    RIGHT,
    AdvantageBatch,
    Method,
    State,
    TokenSignals,
    group_sums,
    with_advantage,
    zscore,
)
from megatron_policysplit.config import key


@dataclass(frozen=True)
class Options:
    tau: float = key(
        0.4,
        "Target entropy, as a share of that of the run's first batch.",
        above=0.0,
    )
    rho: float = key(
        0.5, "Share of right answers from which on a question gets no bonus (a guess).", above=0.0
    )
    rate: float = key(
        0.005,
        "Step of the scale c per nat of distance to the target (a guess).",
        above=0.0,
    )
    coef_max: float = key(0.05, "Upper bound of the scale c (a guess).", above=0.0)


def difficulty(rewards: Tensor, group: Tensor, options: Options) -> Tensor:
    """w_q of each row's question, [R] fp32; 0 where at least `rho` of its answers are right."""
    rights, count = group_sums(rewards > RIGHT, group)
    return ((options.rho - rights / count).clamp(min=0) / options.rho).float()


def signals(batch: AdvantageBatch, options: Options, state: State) -> TokenSignals:
    advantages = batch.on_tokens(zscore(batch.rewards, batch.group))
    weight = batch.on_tokens(difficulty(batch.rewards, batch.group, options))
    return TokenSignals(advantages, entropy_coef=state["coef"] * weight)


def next_state(state: State, batch: AdvantageBatch, options: Options) -> State:
    """c after this optimizer step, and H_0 as `initial`.

    A batch without trained tokens changes nothing; H_0 is that of the first batch with some.
    """
    if not batch.mask.any():
        return state
    entropy = batch.mean_entropy()
    initial = state.get("initial", entropy)
    coef = state["coef"] + options.rate * (options.tau * initial - entropy)
    return {"coef": min(max(coef, 0.0), options.coef_max), "initial": initial}


def live(rewards: Tensor, group: Tensor, options: Options) -> Tensor:
    """[R] bool: rows with an advantage, and those of questions that get a bonus."""
    return with_advantage(rewards, group, options) | (difficulty(rewards, group, options) > 0)


METHOD = Method(
    signals,
    source="after arXiv 2510.10959 (reconstruction, unverified)",
    options=Options,
    live=live,
    begin=lambda options: {"coef": 0.0},
    next_state=next_state,
)
