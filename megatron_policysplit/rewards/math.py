"""`math`: mathematical equality with the reference answer, by math-verify."""

from __future__ import annotations

import functools
import logging
import math
import re
from dataclasses import dataclass
from typing import Any

import math_verify
import sympy

from megatron_policysplit.data.questions import Question
from megatron_policysplit.rewards.final_answer import final_answer
from megatron_policysplit.rewards.numerals import decimals_to_compare, same_number
from megatron_policysplit.rewards.readings import (
    Reading,
    read_answer,
    read_reference,
    right_side,
)

# math-verify's own time limits are signals, which the pool's time limit makes needless; it warns of
# their absence.
logging.getLogger("math_verify").setLevel(logging.ERROR)

# Digits to which differences of exact numbers are evaluated; math-verify takes what is smaller for
# nothing.
_EXACT_DIGITS = 60
_FLOAT_DIGITS = 15  # math-verify's own, which fit numbers with 53 bits


def reward(response: str, question: Question) -> float:
    """1 if the final answer of the response equals the question's answer, else 0.

    The final answer is the last boxed expression, or without one the last expression with a number
    (`final_answer.final_answer`). The question's answer is its last boxed expression, or what
    follows `####`, or all of it; what only decorates it is taken off.

    - Numbers are compared exactly. If one has a decimal point, both are rounded to six decimals, or
      below 0.001 to six significant digits (`numerals.same_number`).
    - An answer of letters alone is compared as text: "ACB" is not "BCA". Upper and lower case are
      the same but for single letters: "A" is not "a". Items of a list may have any order.
    - Everything else is compared by math-verify. As there, and as in Qwen2.5-Math, a pair may lack
      its parentheses ("1,2" for "(1,2)") but must have its order; as there and in DeepScaleR, of an
      equation in the response the right side counts where the answer is none ("x = 6", "5 = 6" for
      "6").

    Raises ValueError for a question without an answer, and for an answer that is neither a number,
    nor words, nor a formula, such as text with digits: it would reward nothing, or something wrong.
    """
    if question.answer is None:
        raise ValueError(f"question {question.id} has no answer, which reward.function=math needs")
    try:
        gold = _read_gold(question.answer)
    except ValueError as error:
        raise ValueError(unreadable(question, str(error))) from error
    answer = final_answer(response)
    return 0.0 if answer is None else float(_is_equal(gold, read_answer(answer)))


def unreadable(question: Question, reason: str) -> str:
    """The sentence about a reference answer that `math` refuses."""
    text = question.answer if len(question.answer) <= 80 else question.answer[:77] + "..."
    return (
        f"math cannot read the answer {text!r} of question {question.id}: {reason}; give a number, "
        r"a formula or words without digits, or mark it by \boxed{} or ####"
    )


@dataclass(frozen=True)
class _Gold:
    """A reference answer, read once for all its responses."""

    reading: Reading
    parsed: list[Any]  # by math-verify; empty for a number, whose LaTeX is parsed when needed


@functools.lru_cache(maxsize=4096)
def _read_gold(answer: str) -> _Gold:
    """Raises ValueError with the reason if the answer cannot be read."""
    reading = read_reference(answer)
    if not reading.is_formula:
        return _Gold(reading, [])
    parsed = _parse(reading.text)
    is_mathematics = any(not isinstance(value, str) for value in parsed)
    if not is_mathematics and re.search(r"[\d\n]", reading.text):
        raise ValueError("math-verify reads it as text")
    if any(value in (sympy.nan, sympy.zoo) for value in parsed if isinstance(value, sympy.Basic)):
        raise ValueError("it is not a finite number")
    return _Gold(reading, parsed)


def _is_equal(gold: _Gold, answer: Reading) -> bool:
    reading = gold.reading
    if reading.numeral is not None:
        numeral = answer.numeral or right_side(answer)
        if numeral is not None:
            return same_number(reading.numeral, numeral)
        if answer.words is not None:
            return False
    if reading.words is not None and answer.words is not None:
        return reading.words == answer.words
    if answer.doubt is not None or (reading.words is not None and answer.numeral is not None):
        return False
    return _verify(gold.parsed or _parse(_latex(reading)), _parse(_latex(answer)))


def _verify(gold: list[Any], answer: list[Any]) -> bool:
    """math-verify's comparison, with as many digits as the answer's numbers need."""
    is_exact = not any(
        value.atoms(sympy.Float)
        for value in (*gold, *answer)
        if isinstance(value, (sympy.Basic, sympy.MatrixBase))
    )
    smallest = min(map(_smallest, gold), default=1.0)
    decimals = decimals_to_compare(smallest)
    digits = _FLOAT_DIGITS + decimals - decimals_to_compare(1.0)
    return math_verify.verify(
        gold,
        answer,
        float_rounding=decimals,
        numeric_precision=max(digits, _EXACT_DIGITS) if is_exact else digits,
        timeout_seconds=None,
    )


def _smallest(value: Any) -> float:
    """The smallest number other than 0 of an expression, a set or a matrix; 1 without any."""
    if not isinstance(value, (sympy.Basic, sympy.MatrixBase)):
        return 1.0
    if getattr(value, "is_number", False):
        size = abs(sympy.N(value))
        if not size.is_Float or size == 0 or size > 1:
            return 1.0
        return max(float(size), math.ulp(0.0))  # a float holds none below
    parts = value.flat() if isinstance(value, sympy.MatrixBase) else value.args
    return min(map(_smallest, parts), default=1.0)


def _latex(reading: Reading) -> str:
    return reading.text if reading.numeral is None else reading.numeral.latex()


def _parse(expression: str) -> list[Any]:
    """Parse an expression as LaTeX in a box, where math-verify need not guess where it stands.

    LaTeX only: its reader of plain expressions hands the text to eval(), and a model wrote that
    text.
    """
    latex = [math_verify.LatexExtractionConfig()]
    return math_verify.parse(
        f"\\boxed{{{expression}}}", extraction_config=latex, parsing_timeout=None
    )
