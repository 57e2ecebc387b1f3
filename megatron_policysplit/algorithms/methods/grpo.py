"""GRPO (arXiv 2402.03300): the reward's z-score within its group, the same for every token of a
response.
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
    """A_i = (r_i - mean r) / (std r + 1e-6), unbiased std; 0 in a group whose rewards are all
    equal.
    """
    return TokenSignals(batch.on_tokens(zscore(batch.rewards, batch.group)))


METHOD = Method(signals, source="arXiv 2402.03300", engine_logprobs=lambda options: True)
