"""A row's reference answer as text, numbers included."""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from megatron_policysplit.errors import DataError

# The columns and fields that answers come from.
_COLUMN, _STRUCT, _FIELD = "answer", "reward_model", "ground_truth"


def answer_text(where: str, row: Mapping[str, Any], needed: str) -> str | None:
    """A row's reference answer as text; verl's `reward_model` wins over `answer`. None for null.

    A number becomes the shortest decimal that is read as the same number, without an exponent and
    without a fraction of zeros: 1e-05 is "0.00001" and 18.0 is "18".

    where: the row's file and line. needed: the columns that a row needs, in words. Raises DataError
    for what is neither text nor a finite number.
    """
    answer, source = row.get(_COLUMN), _COLUMN
    if row.get(_STRUCT) is not None:
        source = f"{_STRUCT}.{_FIELD}"
        if isinstance(row[_STRUCT], str):
            raise DataError(
                f"{where}: `{_STRUCT}` is text; it must be a mapping with `{_FIELD}`, or the "
                f"answer stand in `{_COLUMN}`"
            )
        if not isinstance(row[_STRUCT], dict) or _FIELD not in row[_STRUCT]:
            raise DataError(f"{where}: `{_STRUCT}` has no `{_FIELD}`; needed are {needed}")
        answer = row[_STRUCT][_FIELD]
    if answer is None or isinstance(answer, str):
        return answer
    # bool is an int
    if isinstance(answer, bool) or not isinstance(answer, (int, float, Decimal)):
        raise DataError(
            f"{where}: `{source}` is a {type(answer).__name__}; it must be text or a number"
        )
    if not math.isfinite(answer):
        raise DataError(
            f"{where}: `{source}` is {answer}, not a finite number; give the right answer, or null "
            "where the task has many"
        )
    return str(answer) if isinstance(answer, int) else _decimal(answer)


def _decimal(number: float | Decimal) -> str:
    """A finite number as its shortest decimal without an exponent."""
    text = format(Decimal(repr(number)) if isinstance(number, float) else number, "f")
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text == "-0" else text
