"""The rows of JSONL and Parquet files, as Python values.

Every row comes with the place it stands at, so that whoever finds fault with it can name it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_policysplit.errors import DataError

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_BOM = b"\xef\xbb\xbf"


def read_rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the (place, row) pairs of a .jsonl or .parquet file, in the file's order.

    The place is the file with the line, or with the number of the row for Parquet. In rows of a
    Parquet file a value of the types float16 and float32 is the float whose shortest decimal it is:
    0.1, not 0.10000000149011612.

    Raises DataError naming the file, and the line, row or column, for what cannot be read.
    """
    file = Path(path)
    readers: dict[str, Callable] = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if file.is_dir():
        inside = sorted(
            name.name for name in file.iterdir() if name.suffix in readers and name.is_file()
        )
        hint = f"such as {inside[0]}" if inside else "a .jsonl or .parquet file"
        raise DataError(f"{path} is a directory; give a file in it, {hint}")
    if file.suffix not in readers:
        raise DataError(
            f"{path} is neither .jsonl nor .parquet nor reasoning_gym:NAME; {_conversion(file)}"
        )
    if not file.is_file():
        raise DataError(f"{path} does not exist or is not a file; check the path")
    try:
        yield from readers[file.suffix](file)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error})") from error


def _conversion(file: Path) -> str:
    """How to get a file that can be read from one that cannot."""
    if file.suffix == ".json" and file.is_file():
        return "where it holds one list, write its items one a line: jq -c '.[]' FILE > FILE.jsonl"
    if file.suffix in (".gz", ".zst", ".zip", ".bz2", ".xz"):
        return "decompress it"
    return "convert it or give another path"


def _read_jsonl(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of the lines that are not blank. Raises DataError."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if number == 1:
                if line.startswith((_GZIP, _ZSTD)):
                    raise DataError(f"{file} is compressed; decompress it")
                line = line.removeprefix(_BOM)
            if line.strip():
                where = f"{file}:{number}"
                yield where, _parse_line(where, line)


def _parse_line(where: str, line: bytes) -> dict[str, Any]:
    """One line's JSON object. Raises DataError naming `where`."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} is not UTF-8 text (byte {error.start + 1} of the line); save the file as "
            "UTF-8"
        ) from error
    try:
        row = json.loads(text, object_pairs_hook=lambda pairs: _without_duplicates(where, pairs))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where} is not JSON ({error}); every line must be one JSON object{_pretty(text)}"
        ) from error
    except RecursionError as error:
        raise DataError(f"{where} is nested too deeply to be read; flatten it") from error
    except ValueError as error:  # Python reads no integer of more than some 4,300 digits
        raise DataError(f"{where} has a number that is too long; write it as text") from error
    if not isinstance(row, dict):
        kind = {"list": "list", "str": "text", "NoneType": "null"}.get(type(row).__name__, "value")
        raise DataError(f"{where} is a JSON {kind}; every line must be one JSON object")
    return row


def _without_duplicates(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises DataError for a key that stands twice: either value may be meant."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{where} has the key `{twice}` twice; keep one")
    return row


def _pretty(text: str) -> str:
    """What to do about a list or an object that was written over several lines."""
    if text.strip() in ("[", "{"):
        return "; write one object a line: jq -c '.[]' for a list, jq -c . for objects"
    return ""


def _read_parquet(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a Parquet file. Raises DataError."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            number = 0
            for batch in table.iter_batches(1024):
                for row in _rows_of_batch(file, number, batch):
                    number += 1
                    yield f"{file} row {number}", row
    except pyarrow.ArrowException as error:
        raise DataError(f"{file} is not a readable Parquet file ({error}); restore it") from error


def _rows_of_batch(file: Path, before: int, batch: Any) -> Iterator[dict[str, Any]]:
    """The rows of a record batch; `before`: how many rows of the file stand before it.

    Raises DataError naming the column of a value that Python has no type for.
    """
    import pyarrow

    columns = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if name in columns:
            raise DataError(f"{file} has two columns `{name}`; rename one")
        try:
            columns[name] = _column(column)
        except (pyarrow.ArrowException, ValueError, OverflowError) as error:
            raise DataError(
                f"{file}: the column `{name}` of type {column.type} cannot be read in rows "
                f"{before + 1} to {before + batch.num_rows} ({error}); repair the column, store it "
                "as text or drop it"
            ) from error
    for index in range(batch.num_rows):
        yield {name: values[index] for name, values in columns.items()}


def _column(column: Any) -> list[Any]:
    """A column's values."""
    values = column.to_pylist()
    if not _holds_narrow_floats(column.type):
        return values
    return [_shortest(value, column.type) for value in values]


def _holds_narrow_floats(kind: Any) -> bool:
    """Whether a column's type is float16 or float32, or has one in it."""
    import pyarrow

    if kind in (pyarrow.float16(), pyarrow.float32()):
        return True
    return any(_holds_narrow_floats(kind.field(i).type) for i in range(kind.num_fields))


def _shortest(value: Any, kind: Any) -> Any:
    """A value whose narrow floats are the floats of their shortest decimals."""
    import numpy
    import pyarrow

    narrow = {pyarrow.float16(): numpy.float16, pyarrow.float32(): numpy.float32}
    if value is None:
        return None
    if kind in narrow:
        return float(str(narrow[kind](value)))
    if pyarrow.types.is_struct(kind):
        return {field.name: _shortest(value[field.name], field.type) for field in kind}
    if isinstance(value, list) and kind.num_fields == 1:
        return [_shortest(item, kind.field(0).type) for item in value]
    return value
