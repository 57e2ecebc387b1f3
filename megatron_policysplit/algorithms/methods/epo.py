"""EPO, entropy-regularised policy optimisation with smoothing (arXiv 2509.22576), for responses of
a single turn.

GRPO with an entropy bonus and a penalty on tokens whose entropy leaves a band around the run's own
past. At optimizer step k, with H_t a token's entropy and H^ the mean over the steps before k of the
batches' mean entropies,

    loss - coef (mean_t H_t - smoothing w_k mean_t P_t) P_t = d_t^2,  d_t = how far H_t lies outside
    [kappa_low H^, kappa_high H^];  no penalty at the first step w_k = 1 - 0.2 (1 - exp(-2 k / h))
    for k <= h = decay_steps / 2, then 0.8 exp(-3 (k - h) / (decay_steps - h))

In the released code P_t is a constant outside the band and 0 within. That depends on no weight, so
there the smoothing term has no gradient and the plain bonus alone acts: `penalty: released` trains
just so. `penalty: squared`, the default, is not the authors' formula but what the term is for: a
penalty that draws entropies back to the band, by dP/dH_t = 2 (H_t - kappa_high H^) above it, 2 (H_t
- kappa_low H^) below. With H_t of the score pass the derivative of the whole term is a number a
token, and the loss has that gradient as the weight of the differentiable entropy: entropy_coef_t =
coef (1 - smoothing w_k dP/dH_t).

H^ and k are state. The authors train agents of many turns: they keep a history for each turn, count
w in epochs of rollouts, and leave the first turns without the term. Here a response is one turn and
a step is an optimizer step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_policysplit.algorithms.advantages import (
    AdvantageBatch,
    Method,
    State,
    TokenSignals,
    all_rows,
    zscore,
)
from megatron_policysplit.config import key


@dataclass(frozen=True)
class Options:
    coef: float = key(0.001, "Weight of the bonus and, with it, of the penalty.", minimum=0.0)
    smoothing: float = key(1.0, "Weight of the penalty within them.", minimum=0.0)
    kappa_low: float = key(
        0.0, "Lower end of the band, times the mean entropy of the steps before.", minimum=0.0
    )
    kappa_high: float = key(2.0, "Upper end of the band, likewise.", minimum=0.0)
    decay_steps: int = key(
        150, "Optimizer steps until the penalty's weight ends its fall.", minimum=2
    )
    penalty: str = key(
        "squared",
        "Squared distance to the band; `released`: a constant, as published, which has no "
        "gradient.",
        choices=("squared", "released"),
    )


def smoothing_weight(step: int, decay_steps: int) -> float:
    """w of optimizer step `step`, counted from 0."""
    step, half = min(step, decay_steps), decay_steps // 2
    if step <= half:
        return 1 - 0.2 * (1 - math.exp(-2 * step / half))
    return 0.8 * math.exp(-3 * (step - half) / (decay_steps - half))


def penalty_slope(entropy: Tensor, history: float, options: Options) -> Tensor:
    """dP/dH [T] of the squared penalty, at entropies [T] and the mean entropy of earlier steps
    (nats).
    """
    low, high = options.kappa_low * history, options.kappa_high * history
    return 2 * (entropy - high).clamp(min=0) - 2 * (low - entropy).clamp(min=0)


@torch.no_grad()
def signals(batch: AdvantageBatch, options: Options, state: State) -> TokenSignals:
    advantages = batch.on_tokens(zscore(batch.rewards, batch.group))
    coef = torch.full_like(advantages, options.coef)
    if options.penalty == "squared" and state["steps"] > 0:
        weight = options.smoothing * smoothing_weight(int(state["steps"]), options.decay_steps)
        coef = coef * (1 - weight * penalty_slope(batch.entropy, state["history"], options))
    return TokenSignals(advantages, entropy_coef=coef)


def next_state(state: State, batch: AdvantageBatch, options: Options) -> State:
    """The mean takes in the step's mean entropy; a batch without trained tokens leaves it as it is."""
    if not batch.mask.any():
        return state
    steps = state["steps"] + 1
    return {
        "steps": steps,
        "history": state["history"] + (batch.mean_entropy() - state["history"]) / steps,
    }


METHOD = Method(
    signals,
    source="arXiv 2509.22576",
    options=Options,
    live=all_rows,
    begin=lambda options: {"steps": 0.0, "history": 0.0},
    next_state=next_state,
)
