"""GRPO: every token of a response gets the z-score of the response's reward within its group.

Source: arXiv 2402.03300.

    A_i = (r_i - mean r) / (std r + 1e-6)

The std is unbiased. A group whose rewards are all equal has the advantage 0.
"""

from __future__ import annotations

from megatron_policysplit.algorithms.advantages import (
    AdvantageBatch,
    Method,
    NoOptions,
    State,
    TokenSignals,
    zscore,
)


def signals(batch: AdvantageBatch, options: NoOptions, state: State) -> TokenSignals:
    """A_i = (r_i - mean r) / (std r + 1e-6) on every trained token of the response."""
    return TokenSignals(batch.on_tokens(zscore(batch.rewards, batch.group)))


METHOD = Method(signals, source="arXiv 2402.03300", engine_logprobs=lambda options: True)
