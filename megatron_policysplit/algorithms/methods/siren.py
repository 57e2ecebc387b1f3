"""SIREN, selective entropy regularisation: forking tokens keep the mean entropy they began with.

Source: arXiv 2509.25133; formulas and defaults are from the authors' code. Dr. GRPO's advantages,
and the squared distance of one mean entropy to an anchor:

    loss = L_DrGRPO + beta (H - H_anchor)^2
    H    = mean over responses of the mean of H^p_t over the response's forking tokens

- H^p_t is the entropy of the distribution renormalised over its nucleus, the smallest set of tokens
  that holds `mass` of the probability. It is searched in the whole vocabulary; the authors' code
  searches among the 10,000 largest logits.
- Forking tokens are, of a response's trained tokens, the `share` with the largest H^p_t.
- H_anchor is H of the run's first batch, where the term is therefore 0. It is the method's state.

The term has the gradient 2 beta (H - H_anchor) dH, and dH goes through the H^p_t of every forking
token. A token's weight in the loss is that factor over the number of forking tokens of its
response, with H and the nuclei of the score pass. With more than one optimizer step a batch,
algorithm.statistics=step takes both anew at each step, as the authors' code does.
algorithm.scope=micro squares the distance of each micro-batch, as their code does too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_policysplit.algorithms.advantages import (
    AdvantageBatch,
    Method,
    State,
    TokenSignals,
    all_rows,
    centered,
)
from megatron_policysplit.algorithms.methods.forking_tokens import threshold
from megatron_policysplit.config import key


@dataclass(frozen=True)
class Options:
    beta: float = key(0.005, "Weight of the squared distance to the anchor.", minimum=0.0)
    mass: float = key(
        0.8, "Probability that a nucleus holds; 1 and above is the whole vocabulary.", above=0.0
    )
    share: float = key(
        0.2, "Share of each response's tokens that count as forking tokens.", above=0.0
    )


def forking_mask(batch: AdvantageBatch, share: float) -> Tensor:
    """[T] bool: the forking tokens of every response.

    Of its N trained tokens these have the ceil(share N) largest nucleus entropies, ties included.
    Raises ValueError for a batch without these entropies.
    """
    if batch.nucleus_entropy is None:
        raise ValueError("the batch has no entropies of nuclei, which this method needs")
    lengths = batch.offsets.diff().tolist()
    rows = zip(batch.nucleus_entropy.split(lengths), batch.mask.split(lengths), strict=True)
    return torch.cat(
        [mask & (entropy >= threshold(entropy[mask], share)) for entropy, mask in rows]
    )


def mean_nucleus_entropy(batch: AdvantageBatch, is_forking: Tensor) -> tuple[float, Tensor]:
    """H in nats (0 without any token), and the number of forking tokens in each token's response.

    is_forking: [T] bool. The number is [T] fp32.
    """
    row = batch.row_of_token
    count = torch.zeros(len(batch.rewards)).index_add(0, row, is_forking.float())
    total = torch.zeros(len(count)).index_add(0, row, batch.nucleus_entropy * is_forking)
    present = count > 0
    mean = float((total[present] / count[present]).double().mean()) if present.any() else 0.0
    return mean, count[row]


@torch.no_grad()
def signals(batch: AdvantageBatch, options: Options, state: State) -> TokenSignals:
    advantages = batch.on_tokens(centered(batch.rewards, batch.group))
    is_forking = forking_mask(batch, options.share)
    mean, count = mean_nucleus_entropy(batch, is_forking)
    # Before the first batch there is no anchor: the distance, and with it the term, is 0.
    slope = 2 * options.beta * (mean - state.get("anchor", mean))
    return TokenSignals(advantages, nucleus_coef=-slope * is_forking / count.clamp(min=1))


@torch.no_grad()
def next_state(state: State, batch: AdvantageBatch, options: Options) -> State:
    """`anchor`: H of the run's first batch with trained tokens. `entropy`: H of this batch."""
    if not batch.mask.any():
        return state
    mean, _ = mean_nucleus_entropy(batch, forking_mask(batch, options.share))
    return {"anchor": state.get("anchor", mean), "entropy": mean}


METHOD = Method(
    signals,
    source="arXiv 2509.25133",
    options=Options,
    loss={"clip_low": 0.28, "clip_high": 0.28, "loss_aggregation": "sequence_mean_token_sum_norm"},
    live=all_rows,
    next_state=next_state,
    nucleus=lambda options: min(options.mass, 1.0),
)
