"""AER, adaptive entropy regularisation (after arXiv 2510.10959): a bonus for hard questions that
holds a set entropy.

UNVERIFIED RECONSTRUCTION. The paper's equations were not found. That a question's coefficient comes
from its difficulty, that the target is a ratio tau of the initial entropy, about 0.4, and that a
global scale is moved at every step to stay there, is told of it; the formulas and the other
defaults are ours:

    p_q  = share of right answers in the question's group       w_q = max(0, rho - p_q) / rho loss -
    c_k w_q H_t for each token of question q             c_0 = 0, H_0 = mean entropy of the run's
    first batch c_{k+1} = c_k + rate (tau H_0 - H_k), within [0, coef_max]   H_k = mean entropy at
    optimizer step k

Means of entropies are over all trained tokens, in nats; c and H_0 are state.
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
    tau: float = key(0.4, "Target entropy, as a share of that of the run's first batch.", above=0.0)
    rho: float = key(
        0.5, "Share of right answers from which a question gets no bonus (a guess).", above=0.0
    )
    rate: float = key(
        0.005,
        "How fast the scale follows the distance to the target, per nat (a guess).",
        above=0.0,
    )
    coef_max: float = key(0.05, "Bound of the scale (a guess).", above=0.0)


def difficulty(rewards: Tensor, group: Tensor, options: Options) -> Tensor:
    """w [R] fp32, of the question of each row; 0 where at least `rho` of the answers are right."""
    right, count = group_sums(rewards > RIGHT, group)
    return ((options.rho - right / count).clamp(min=0) / options.rho).float()


def signals(batch: AdvantageBatch, options: Options, state: State) -> TokenSignals:
    advantages = batch.on_tokens(zscore(batch.rewards, batch.group))
    weight = batch.on_tokens(difficulty(batch.rewards, batch.group, options))
    return TokenSignals(advantages, entropy_coef=state["coef"] * weight)


def next_state(state: State, batch: AdvantageBatch, options: Options) -> State:
    """`initial` is there from the first batch with trained tokens on."""
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
