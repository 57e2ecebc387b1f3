"""RLOO: the advantage is the reward minus the mean reward of the group's other responses.

Source: arXiv 2402.14740. In a group of G responses:

    A_i = r_i - mean_{j != i} r_j = G / (G - 1) (r_i - mean r)

The paper's gradient is that of the unclipped log-likelihood. With one optimizer step per batch the
clipped loss has the same gradient, up to the aggregation: the loss of a response is summed over its
tokens and divided by the constant rollout.max_response_tokens.
"""

from __future__ import annotations

from megatron_policysplit.algorithms.advantages import (
    AdvantageBatch,
    Method,
    NoOptions,
    State,
    TokenSignals,
    leave_one_out,
)


def signals(batch: AdvantageBatch, options: NoOptions, state: State) -> TokenSignals:
    """A_i = r_i - mean_{j != i} r_j on every trained token of the response."""
    return TokenSignals(batch.on_tokens(leave_one_out(batch.rewards, batch.group)))


METHOD = Method(
    signals,
    source="arXiv 2402.14740",
    loss={"loss_aggregation": "sequence_mean_token_sum_norm"},
    engine_logprobs=lambda options: True,
)
