"""Which engines did not take the weights and why, and how all ranks come to know it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from megatron_policysplit.distributed.agree import all_gather_results
from megatron_policysplit.distributed.layout import Layout

T = TypeVar("T")


@dataclass(frozen=True)
class Failure:
    """Why an engine did not take the weights."""

    why: str
    silent: bool = False  # it did not answer, rather than refuse


Failures = dict[int, Failure]  # by engine index


def merge(reports: Iterable[Mapping[int, Failure]]) -> Failures:
    """Return the failures of all ranks in one mapping."""
    return {index: failure for report in reports for index, failure in report.items()}


def results_of_all_ranks(layout: Layout, work: Callable[[], T]) -> list[T]:
    """Return every rank's `work()` in rank order; if it raises on one rank, raise on every rank.

    One all-gather of an object over the world (`all_gather_results`). An exception says that a rank
    failed; an engine that failed is a `Failure` in the result.
    """
    return all_gather_results(layout.world, work, "rank {rank} failed in a weight sync ({error})")
