"""SIREN, selective entropy regularisation (arXiv 2509.25133): the entropy of forking tokens is held
where it began.

Dr. GRPO and a squared distance of one mean entropy to an anchor,

    loss + beta (H - H_anchor)^2,   H = mean over responses of the mean of H^p_t over the response's
    kept tokens

H^p_t is the entropy of the distribution renormalised over the smallest set of tokens that holds
`mass` of the probability (searched in the whole vocabulary; in the authors' code, among the 10,000
largest logits). Kept are, of a response's trained tokens, the `share` with the largest H^p_t.
H_anchor is H of the run's first batch, when the term is therefore 0; it is state. Formulas and
defaults from the authors' code.

The term has the gradient 2 beta (H - H_anchor) dH, and dH goes through every kept H^p_t: its weight
in the loss is that factor over the response's number of kept tokens, with H of the score pass.
Which tokens a nucleus has is taken from there too. With more than one optimizer step a batch,
algorithm.statistics=step takes both anew at each step, as the authors' code does;
algorithm.scope=micro squares the distance of each micro-batch, as it does too.
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
        0.2, "Share of each response's tokens that is kept, those of largest entropy.", above=0.0
    )


def kept_tokens(batch: AdvantageBatch, share: float) -> Tensor:
    """[T] bool: of N trained tokens of a response those of the ceil(share N) largest nucleus
    entropies, ties included.

    Raises ValueError for a batch without these entropies.
    """
    if batch.nucleus_entropy is None:
        raise ValueError("the batch has no entropies of nuclei, which this method needs")
    lengths = batch.offsets.diff().tolist()
    rows = zip(batch.nucleus_entropy.split(lengths), batch.mask.split(lengths), strict=True)
    return torch.cat(
        [mask & (entropy >= threshold(entropy[mask], share)) for entropy, mask in rows]
    )


def kept_mean(batch: AdvantageBatch, kept: Tensor) -> tuple[float, Tensor]:
    """H (0 of no tokens at all), and the number of kept tokens of each token's response, [T]."""
    row = batch.row_of_token
    count = torch.zeros(len(batch.rewards)).index_add(0, row, kept.float())
    total = torch.zeros(len(count)).index_add(0, row, batch.nucleus_entropy * kept)
    present = count > 0
    mean = float((total[present] / count[present]).double().mean()) if present.any() else 0.0
    return mean, count[row]


@torch.no_grad()
def signals(batch: AdvantageBatch, options: Options, state: State) -> TokenSignals:
    advantages = batch.on_tokens(centered(batch.rewards, batch.group))
    kept = kept_tokens(batch, options.share)
    mean, count = kept_mean(batch, kept)
    slope = 2 * options.beta * (mean - state.get("anchor", mean))
    return TokenSignals(advantages, nucleus_coef=-slope * kept / count.clamp(min=1))


@torch.no_grad()
def next_state(state: State, batch: AdvantageBatch, options: Options) -> State:
    """`anchor` is there from the first batch with trained tokens on; `entropy` is H of the last
    one.
    """
    if not batch.mask.any():
        return state
    mean, _ = kept_mean(batch, kept_tokens(batch, options.share))
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
