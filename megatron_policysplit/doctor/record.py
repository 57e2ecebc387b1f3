"""What a check says: a record, and how a list of them is printed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

Status = Literal["OK", "WARN", "FAIL"]
SEVERITY: tuple[Status, ...] = ("OK", "WARN", "FAIL")
GIB = 2**30
NAME_COLUMNS = 20  # of the column with the names


@dataclass(frozen=True)
class Record:
    """One line of the report."""

    name: str  # what was looked at
    status: Status
    value: str  # what it is, or what is wrong with it
    remedy: str = ""  # what to do; "" where nothing is to be done


def ok(name: str, value: str) -> Record:
    return Record(name, "OK", value)


def warn(name: str, value: str, remedy: str) -> Record:
    return Record(name, "WARN", value, remedy)


def fail(name: str, value: str, remedy: str) -> Record:
    return Record(name, "FAIL", value, remedy)


def has_failed(records: Sequence[Record]) -> bool:
    """Whether any record is a FAIL."""
    return any(record.status == "FAIL" for record in records)


def line_of(record: Record) -> str:
    """A record as text, with its remedy on a line below."""
    line = f"{record.status:<4}  {record.name:<{NAME_COLUMNS}}  {record.value}"
    return line + (f"\n{'':<6}{'':<{NAME_COLUMNS}}  -> {record.remedy}" if record.remedy else "")


def counted(records: Sequence[Record]) -> str:
    """The last line of the text: how many records have which status."""
    counts = [(sum(record.status == status for record in records), status) for status in SEVERITY]
    return ", ".join(f"{count} {status}" for count, status in counts)


def as_json(records: Sequence[Record]) -> str:
    """The records as a JSON list of objects with name, status, value and remedy."""
    return json.dumps([asdict(record) for record in records], indent=1)


def from_json(text: str) -> list[Record]:
    """Read what `as_json` wrote. Raises ValueError for anything else."""
    try:
        records = [Record(**entry) for entry in json.loads(text)]
    except TypeError as error:
        raise ValueError(f"not a list of records: {error}") from error
    if any(record.status not in SEVERITY for record in records):
        raise ValueError("a record has a status that is not OK, WARN or FAIL")
    return records


def gib(nbytes: float) -> str:
    """Bytes as text: in GiB, or in MiB below one."""
    return f"{nbytes / GIB:.1f} GiB" if nbytes >= GIB else f"{nbytes / 2**20:.0f} MiB"
