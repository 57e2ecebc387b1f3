"""`math`: mathematical equality with the reference answer, by math-verify."""

from __future__ import annotations

import functools
import logging
import re

import math_verify

from megatron_policysplit.data.questions import Question

# math-verify's own time limits are signals, which the pool's time limit makes needless; it warns of
# their absence.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_NUMBER = re.compile(r"(?:(?<![\w)])-)?\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d+)?%?")
_BOXED = re.compile(r"\\boxed\s*\{")


def reward(response: str, question: Question) -> float:
    """1 if the final answer of the response equals the question's answer, else 0.

    The final answer is the last boxed expression, or without one the last number of the text.
    Raises ValueError for a question without an answer that math-verify can read.
    """
    if question.answer is None:
        raise ValueError(f"question {question.id} has no answer, which reward.function=math needs")
    gold = _parse_gold(question.answer)
    if not gold:
        raise ValueError(
            f"math-verify cannot read the answer {question.answer!r} of question {question.id}"
        )
    answer = final_answer(response)
    if answer is None:
        return 0.0
    return float(math_verify.verify(gold, _parse(answer), timeout_seconds=None))


def final_answer(response: str) -> str | None:
    """The contents of the last closed `\\boxed{..}`, else the last number, else None."""
    boxed = [
        content
        for match in _BOXED.finditer(response)
        if (content := _braced(response, match.end())) is not None
    ]
    if boxed:
        return boxed[-1]
    numbers = _NUMBER.findall(response)
    return numbers[-1].rstrip(",") if numbers else None


def _braced(text: str, start: int) -> str | None:
    """The text from `start` up to the brace that closes it; None if none does."""
    depth = 1
    for position in range(start, len(text)):
        if text[position] in "{}" and text[position - 1] != "\\":
            depth += 1 if text[position] == "{" else -1
            if depth == 0:
                return text[start:position]
    return None


@functools.lru_cache(maxsize=4096)
def _parse_gold(answer: str) -> list:
    """The reference answer as math-verify reads it, in a box, in dollars or bare."""
    boxed = _BOXED.search(answer)
    return _parse(final_answer(answer) if boxed else answer.strip().strip("$"))


def _parse(expression: str) -> list:
    """Parse an expression as LaTeX in a box, where math-verify need not guess where it stands.

    LaTeX only: its reader of plain expressions hands the text to eval(), and a model wrote that
    text.
    """
    latex = [math_verify.LatexExtractionConfig()]
    return math_verify.parse(
        f"\\boxed{{{expression}}}", extraction_config=latex, parsing_timeout=None
    )
