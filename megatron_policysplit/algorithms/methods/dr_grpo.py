"""Dr. GRPO: GRPO without the division by the standard deviation and by a response's own length.

Source: arXiv 2503.20783.

    A_i = r_i - mean r

The loss of a response is summed over its tokens and divided by the constant
rollout.max_response_tokens.
"""

from __future__ import annotations

from megatron_policysplit.algorithms.advantages import (
    AdvantageBatch,
    Method,
    NoOptions,
    State,
    TokenSignals,
    centered,
)


def signals(batch: AdvantageBatch, options: NoOptions, state: State) -> TokenSignals:
    """A_i = r_i - mean r; the constant length is in the loss aggregation of `METHOD`."""
    return TokenSignals(batch.on_tokens(centered(batch.rewards, batch.group)))


METHOD = Method(
    signals,
    source="arXiv 2503.20783",
    loss={"loss_aggregation": "sequence_mean_token_sum_norm"},
    engine_logprobs=lambda options: True,
)
