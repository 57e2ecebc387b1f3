"""ARM, advantage re-weighting by confidence: answers that the policy is sure of gain less.

Source: ProGRPO (arXiv 2602.05281). With A_i GRPO's advantage, in groups whose rewards are not all
equal:

    A~_i   = A_i + alpha (c(q) - c(o_i|q))
    c(o|q) = exp(mean log pi)   over the `share` of the response's trained tokens that have the
                                lowest probability
    c(q)   = exp(mean log pi)   over the prompt's tokens except the first, which nothing predicts

Log-probs are those of the score pass, at the sampling temperature, prompts included. Nothing of
A~_i carries a gradient.

UNVERIFIED in two places: the paper's alpha was not found, and its c(q) was found to come from the
prompt's perplexity, but not how. The formula of c(q) and the default of alpha are ours.
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
    in_mixed_groups,
    zscore,
)
from megatron_policysplit.config import key


@dataclass(frozen=True)
class Options:
    alpha: float = key(0.3, "Weight of the difference of the confidences (a guess).", minimum=0.0)
    share: float = key(
        0.2,
        "Share of a response's tokens, those of lowest probability, that give its confidence.",
        above=0.0,
    )


def response_confidence(batch: AdvantageBatch, share: float) -> Tensor:
    """c(o|q) of every response, [R], over ceil(share T) of its T trained tokens; 1 without any."""
    lengths = batch.offsets.diff().tolist()
    rows = zip(batch.logprobs.split(lengths), batch.mask.split(lengths), strict=True)
    return torch.stack([_lowest_mean(logprobs[mask], share) for logprobs, mask in rows]).exp()


def _lowest_mean(values: Tensor, share: float) -> Tensor:
    if not len(values):
        return values.new_zeros(())
    count = min(len(values), math.ceil(share * len(values)))
    return values.topk(count, largest=False).values.mean()


@torch.no_grad()
def signals(batch: AdvantageBatch, options: Options, state: State) -> TokenSignals:
    """Advantages A~_i. Raises ValueError for a batch without the prompts' log-probs."""
    if batch.prompt_logprob is None:
        raise ValueError("the batch has no log-probs of prompts, which this method needs")
    difference = batch.prompt_logprob.exp() - response_confidence(batch, options.share)
    mixed = in_mixed_groups(batch.rewards, batch.group, options)
    return TokenSignals(
        batch.on_tokens(zscore(batch.rewards, batch.group) + options.alpha * difference * mixed)
    )


METHOD = Method(
    signals,
    source="arXiv 2602.05281 (alpha, c(q) unverified)",
    options=Options,
    loss={"clip_high": 0.28},
    live=in_mixed_groups,
    prompt_logprobs=True,
)
