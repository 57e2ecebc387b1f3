"""What SGLang is asked at /generate: one JSON object for each kind of request.

`answers.py` reads what comes back. The client adds the request's id (`rid`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_policysplit.rollout.engine import Sampling


def sample_payload(
    prompt: Sequence[int], sampling: Sampling, seed: int, stop_tokens: frozenset[int]
) -> dict[str, Any]:
    """One response, with the log-prob of each of its tokens. One request is one sample: no `n`.

    With `n` all samples would share one seed, and be equal under deterministic inference.
    """
    return {
        "input_ids": prompt,
        "sampling_params": _sampling_params(sampling, seed, stop_tokens),
        "return_logprob": True,
    }


def prefix_payload(prompt: Sequence[int]) -> dict[str, Any]:
    """No token: the server computes the prompt and keeps it in its prefix cache."""
    return {
        "input_ids": prompt,
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
    }


def score_payload(prompt: Sequence[int], response: Sequence[int]) -> dict[str, Any]:
    """No token: the log-probs of the given ones, from the last prompt token on."""
    return {
        "input_ids": [*prompt, *response],
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": len(prompt) - 1,
    }


def health_payload() -> dict[str, Any]:
    """One token after id 0, whatever it is."""
    return {
        "input_ids": [0],
        "sampling_params": {"max_new_tokens": 1, "temperature": 1.0, "ignore_eos": True},
    }


def _sampling_params(sampling: Sampling, seed: int, stop_tokens: frozenset[int]) -> dict[str, Any]:
    # Every parameter that bends the distribution is named, whatever the server's defaults are.
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": 0.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "min_new_tokens": 0,
        "max_new_tokens": sampling.max_tokens,
        "stop_token_ids": sorted(stop_tokens),
        "ignore_eos": not stop_tokens,
        "no_stop_trim": True,  # the stop token is trained on, so it must be in the answer
        "skip_special_tokens": False,
        "sampling_seed": seed,  # [0, 2**63), which SGLang takes as it is
    }
