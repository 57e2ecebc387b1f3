"""The rows of JSONL and Parquet files, as Python values.

Every row comes with the place it stands at, so that whoever finds fault with it can name it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_policysplit.errors import DataError

_BOM = b"\xef\xbb\xbf"
# How files begin that carry the name of another kind, and what to do about each.
_UTF16 = "is UTF-16 text; save it as UTF-8"
_COMPRESSED = "is compressed; decompress it"
_LFS = "is a pointer of Git LFS, not the data; run git lfs pull"
_NOT_JSONL = {
    b"\x1f\x8b": _COMPRESSED,
    b"\x28\xb5\x2f\xfd": _COMPRESSED,
    b"\xff\xfe": _UTF16,
    b"\xfe\xff": _UTF16,
    b"PAR1": "is a Parquet file; call it .parquet",
    b"version https://git-lfs": _LFS,
}
_NOT_PARQUET = {b"version https://git-lfs": _LFS, b"PARE": "is encrypted; decrypt it"}
# Brackets in each other that a row may have. Python can parse deeper ones than it can hand to the
# processes that grade.
_DEEPEST = 100


def read_rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the (place, row) pairs of a .jsonl or .parquet file, in the file's order.

    The place is the file with the line, or with the number of the row for Parquet. In rows of a
    Parquet file a value of the types float16 and float32 is the float whose shortest decimal it is:
    0.1, not 0.10000000149011612.

    Raises DataError naming the file, and the line, row or column, for what cannot be read.
    """
    if not path:
        raise DataError("the path of the questions is empty; give a .jsonl or .parquet file")
    try:
        yield from _read_file(path)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror or error}); check the path and its permissions"
        ) from error


def _read_file(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file by the reader for its name. Raises DataError and OSError."""
    file = Path(path)
    suffix = file.suffix.lower()
    readers: dict[str, Callable] = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if file.is_dir():
        inside = sorted(
            name.name for name in file.iterdir() if name.suffix in readers and name.is_file()
        )
        hint = f"such as {inside[0]}" if inside else "a .jsonl or .parquet file"
        raise DataError(f"{path} is a directory; give a file in it, {hint}")
    if suffix not in readers:
        raise DataError(
            f"{path} is neither .jsonl nor .parquet nor reasoning_gym:NAME; {_conversion(file)}"
        )
    if not file.is_file():
        raise DataError(f"{path} does not exist or is not a file; check the path")
    yield from readers[suffix](file)


def _refuse_other_kinds(file: Path, kinds: Mapping[bytes, str]) -> None:
    """Raise DataError for a file that begins as one of another kind does."""
    with file.open("rb") as stream:
        beginning = stream.read(64)
    for mark, remedy in kinds.items():
        if beginning.startswith(mark):
            raise DataError(f"{file} {remedy}")


def _conversion(file: Path) -> str:
    """How to get a file that can be read from one that cannot."""
    if file.suffix == ".json" and file.is_file():
        return "where it holds one list, write its items one a line: jq -c '.[]' FILE > FILE.jsonl"
    if file.suffix in (".gz", ".zst", ".zip", ".bz2", ".xz"):
        return "decompress it"
    return "convert it or give another path"


def _read_jsonl(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of the lines that are not blank. Raises DataError."""
    _refuse_other_kinds(file, _NOT_JSONL)
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            line = line.removeprefix(_BOM)  # files that were joined have one within, too
            if line.strip():
                where = f"{file}:{number}"
                yield where, _parse_line(where, line)


def _parse_line(where: str, line: bytes) -> dict[str, Any]:
    """One line's JSON object. Raises DataError naming `where`."""
    if b"\0" in line:
        raise DataError(f"{where} has NUL bytes, as a file that a crash cut has; restore the file")
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
        raise DataError(_too_deep(where)) from error
    except ValueError as error:  # Python reads no integer of more than some 4,300 digits
        raise DataError(f"{where} has a number that is too long; write it as text") from error
    if not isinstance(row, dict):
        kind = {"list": "list", "str": "text", "NoneType": "null"}.get(type(row).__name__, "value")
        raise DataError(f"{where} is a JSON {kind}; every line must be one JSON object")
    if text.count("[") + text.count("{") > _DEEPEST and _is_deep(row):
        raise DataError(_too_deep(where))
    return row


def _too_deep(where: str) -> str:
    return f"{where} is nested too deeply to be read, over {_DEEPEST} levels; flatten it"


def _is_deep(row: dict[str, Any]) -> bool:
    """Whether lists and objects of a row stand in each other more than _DEEPEST times."""
    level: list[Any] = [row]
    for _ in range(_DEEPEST):
        level = [
            item
            for value in level
            for item in (value.values() if isinstance(value, dict) else value)
            if isinstance(item, (dict, list))
        ]
        if not level:
            return False
    return True


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

    _refuse_other_kinds(file, _NOT_PARQUET)
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            number = 0
            for batch in table.iter_batches(1024):
                for row in _rows_of_batch(file, number, batch):
                    number += 1
                    yield f"{file} row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.strerror:  # of the file, not of what it holds
            raise
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
        # KeyError: a time zone that nobody knows.
        except (pyarrow.ArrowException, ValueError, OverflowError, KeyError) as error:
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
