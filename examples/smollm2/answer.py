"""Reward of the SmolLM2 example: the last number in the response against the task's answer."""

from __future__ import annotations

import re

from megatron_policysplit.data.questions import Question

NUMBER = re.compile(r"-?\d+")


def reward(response: str, question: Question) -> float:
    """Return 1.0 if the last number in `response` is `question.answer`, else 0.0."""
    numbers = NUMBER.findall(response)
    return float(bool(numbers) and numbers[-1] == question.answer)
