"""`exact`: the response is the answer, word for word."""

from __future__ import annotations

from megatron_policysplit.data.questions import Question


def reward(response: str, question: Question) -> float:
    """1 if response and reference answer are equal but for white space, else 0.

    Raises ValueError for a question without an answer.
    """
    if question.answer is None:
        raise ValueError(f"question {question.id} has no answer, which reward.function=exact needs")
    return float(response.split() == question.answer.split())
