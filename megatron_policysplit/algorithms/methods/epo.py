"""EPO: GRPO with an entropy bonus and a penalty on entropies far from those of earlier steps.

Source: arXiv 2509.22576, entropy-regularised policy optimisation with smoothing, here for responses
of a single turn. At optimizer step k, with h = decay_steps / 2:

    loss = L_GRPO - coef (mean_t H_t - smoothing w_k mean_t P_t)
    P_t  = d_t^2
    w_k  = 1 - 0.2 (1 - exp(-2 k / h))              for k <= h
         = 0.8 exp(-3 (k - h) / (decay_steps - h))  after that

- H_t is the token's entropy in nats, and H^ the mean of the batches' mean entropies over the steps
  before k. H^ and k are the method's state.
- d_t is how far H_t lies outside the band [kappa_low H^, kappa_high H^]. At the first step there is
  no band and no penalty.

Differences from the authors' code:

- Its P_t is a constant outside the band and 0 within. That depends on no weight, so the smoothing
  term has no gradient there and the plain bonus alone acts. `penalty: released` trains in that way.
- `penalty: squared`, the default, is not the authors' formula but what the term is meant for: it
  draws entropies back to the band. Its derivative dP/dH_t is 2 (H_t - kappa_high H^) above the
  band, 2 (H_t - kappa_low H^) below it. With H_t of the score pass the derivative of the whole term
  is a number for each token, and the loss has it as the weight of the differentiable entropy:
  entropy_coef_t = coef (1 - smoothing w_k dP/dH_t).
- The authors train agents of many turns. They keep a history for each turn, count w in epochs of
  rollouts, and leave the first turns without the term. Here a response is one turn, and k counts
  optimizer steps.
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
    coef: float = key(
        0.001, "Weight of the entropy bonus, and of the penalty with it.", minimum=0.0
    )
    smoothing: float = key(1.0, "Weight of the penalty relative to the bonus.", minimum=0.0)
    kappa_low: float = key(
        0.0,
        "Lower end of the band, as a multiple of the mean entropy of earlier steps.",
        minimum=0.0,
    )
    kappa_high: float = key(
        2.0,
        "Upper end of the band, as a multiple of the mean entropy of earlier steps.",
        minimum=0.0,
    )
    decay_steps: int = key(
        150, "Optimizer steps over which the penalty's weight w falls.", minimum=2
    )
    penalty: str = key(
        "squared",
        "`squared` is the squared distance to the band; `released` is the constant of the "
        "authors' code, which has no gradient.",
        choices=("squared", "released"),
    )


def smoothing_weight(step: int, decay_steps: int) -> float:
    """w_k of optimizer step `step`, counted from 0; constant from `decay_steps` on."""
    step, half = min(step, decay_steps), decay_steps // 2
    if step <= half:
        return 1 - 0.2 * (1 - math.exp(-2 * step / half))
    return 0.8 * math.exp(-3 * (step - half) / (decay_steps - half))


def penalty_slope(entropy: Tensor, history: float, options: Options) -> Tensor:
    """dP_t/dH_t of the squared penalty for every token, [T] fp32.

    entropy: [T] fp32, nats. history: mean entropy of earlier steps, nats.
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
    """The running mean H^ with this step's mean entropy; unchanged if no token is trained."""
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
