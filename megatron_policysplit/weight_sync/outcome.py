"""What became of an engine, and how all ranks come to know it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Failure:
    """Why an engine did not take the weights. silent: it did not answer, rather than refuse."""

    why: str
    silent: bool = False


Failures = dict[int, Failure]  # by engine index


def merged(reports: Iterable[Mapping[int, Failure]]) -> Failures:
    """The failures of all ranks in one mapping."""
    return {index: failure for report in reports for index, failure in report.items()}
