"""A row's reference answer as text, numbers included."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from megatron_policysplit.errors import DataError

if TYPE_CHECKING:
    import pyarrow

Row = dict[str, Any]

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


def narrow_floats(schema: pyarrow.Schema) -> Callable[[Row], Row]:
    """What gives answers of float32 and float16 columns the decimals that were written.

    pyarrow hands these out as Python's floats of 64 bits, which makes 0.10000000149011612 of 0.1.
    The function returned takes a row and returns it with the float of the shortest decimal that
    rounds to the same number in the column's type.
    """
    import pyarrow

    def narrow_type(kind: pyarrow.DataType) -> str | None:
        if pyarrow.types.is_float32(kind):
            return "float32"
        return "float16" if pyarrow.types.is_float16(kind) else None

    answer = struct = None
    if schema.names.count(_COLUMN) == 1:
        answer = narrow_type(schema.field(_COLUMN).type)
    if schema.names.count(_STRUCT) == 1 and pyarrow.types.is_struct(schema.field(_STRUCT).type):
        fields = {field.name: field.type for field in schema.field(_STRUCT).type}
        struct = narrow_type(fields[_FIELD]) if _FIELD in fields else None

    def narrowed(row: Row) -> Row:
        if answer is not None:
            row = row | {_COLUMN: _shortest(row[_COLUMN], answer)}
        if struct is not None and row[_STRUCT] is not None:
            value = _shortest(row[_STRUCT][_FIELD], struct)
            row = row | {_STRUCT: row[_STRUCT] | {_FIELD: value}}
        return row

    return narrowed


def _shortest(value: float | None, kind: str) -> float | None:
    """The float whose shortest decimal is that of `value` in the type `kind` of numpy."""
    import numpy

    if value is None:
        return None
    return float(numpy.format_float_scientific(numpy.dtype(kind).type(value), unique=True))
