"""The quickstart's task: given a number, answer with a sum of two or three numbers that makes it.

"9" is answered by "4+5", "5+4" or "3+3+3": many answers are right, so exploration can be counted.
The terms are positive.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_policysplit.data.questions import Question

NUMBERS = range(4, 21)
_CONTROL_TOKEN = re.compile(r"<\|[a-z]+\|>")
_SUM = re.compile(r"[1-9][0-9]*(\+[1-9][0-9]*){1,2}", re.ASCII)


def reward(response: str, question: Question) -> float:
    """Return 1.0 for a sum of two or three positive integers that is `question.answer`, else 0.0.

    The terms are joined by "+"; leading zeros, spaces and any other text score 0.0. Control tokens
    such as <|user|> count as nothing. The order of the terms is part of the text: "4+5" and "5+4"
    are two different right answers.
    """
    text = _CONTROL_TOKEN.sub("", response)
    right = _SUM.fullmatch(text) is not None
    return 1.0 if right and sum(map(int, text.split("+"))) == int(question.answer) else 0.0


def random_sum(number: int, rng: random.Random) -> str:
    """Draw a right answer: two or three terms with equal chance, then uniformly among these."""
    # The terms are the distances between cuts of the number.
    cuts = sorted(rng.sample(range(1, number), rng.choice((1, 2))))
    return "+".join(str(high - low) for low, high in zip([0, *cuts], [*cuts, number], strict=True))


def write_questions(path: str | Path, numbers: Iterable[int]) -> None:
    """Write one JSON object a line, {"question": "9", "answer": "9"}, in the order of `numbers`."""
    lines = [json.dumps({"question": str(number), "answer": str(number)}) for number in numbers]
    Path(path).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
