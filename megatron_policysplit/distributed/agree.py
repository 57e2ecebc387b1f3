"""Work of each rank that ends alike on all of them: one rank's error is raised on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_policysplit.distributed.layout import Layout
from megatron_policysplit.errors import TrainingError, UserError

T = TypeVar("T")


def together(layout: Layout, work: Callable[[], T]) -> list[T]:
    """Every rank's `work()`, in rank order, on every rank (one all-gather over the world).

    If it raised anywhere, all ranks raise: a failed rank its own error, the others that UserError
    or else a TrainingError that names the rank. So work may not itself wait for a rank that could
    have failed.
    """
    result, error = None, None
    try:
        result = work()
    except Exception as raised:  # raised again below, once all ranks know
        error = raised
    said = (
        error
        if error is None or isinstance(error, UserError)
        else f"{type(error).__name__}: {error}"
    )
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, (result if error is None else None, said), group=layout.world)
    # Who stopped only because another rank did has less to say than that rank.
    if error is not None and not isinstance(error, PeerFailed):
        raise error
    errors = [(rank, said) for rank, (_, said) in enumerate(answers) if said is not None]
    if errors:
        rank, said = min(errors, key=lambda item: isinstance(item[1], PeerFailed))
        raise (
            said
            if isinstance(said, UserError)
            else TrainingError(f"rank {rank} failed in a weight sync ({said})")
        )
    return [result for result, _ in answers]


class Agreed(TrainingError):
    """An export failed, and all ranks that take part know already."""


class PeerFailed(Agreed):
    """Another rank failed while it took or gave the weights."""


def _agreed(layout: Layout, work: Callable[[], T]) -> T:
    """This rank's `work()`; a UserError on any rank is raised on every rank (an all-gather over the
    world).
    """
    result, error = None, None
    try:
        result = work()
    except UserError as raised:
        error = raised
    errors: list[UserError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error, group=layout.world)
    for error in errors:
        if error is not None:
            raise error
    return result
