"""How an error on one rank is raised on every rank.

A rank that raises alone leaves a note, and the run ends with its message (`rank_watch`); but the
others come out of their collectives by force then, without taking down what they started. So
whatever can fail on one rank while the others go on runs in `raise_on_all_ranks`, or in
`all_gather_results` where the others need its result. What has run already (`Control.attend`)
calls `exchange`, the core of both.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_policysplit.errors import TrainingError, UserError

FAILURE = "rank {rank} failed ({error})"

T = TypeVar("T")


class ExportError(TrainingError):
    """An export failed, and every rank that takes part in it knows already."""


class PeerFailed(ExportError):
    """This rank stopped because another one failed while it took or gave the weights."""


def raise_on_all_ranks(
    group: dist.ProcessGroup, work: Callable[[], T], failure: str = FAILURE
) -> T:
    """Return this rank's `work()`; if it raises on one rank, raise on every rank.

    Every Exception reaches every rank, whatever its type. What a rank raises:

    - a rank whose work failed: its own exception, unless that is PeerFailed;
    - the others: the exception of the first rank that failed if it is a UserError, else a
      TrainingError with the text of `failure`. A rank with PeerFailed counts as one that failed
      only where no rank has anything else: it has less to say than the rank that caused it.

    `work` may not wait for a rank that could have failed before it answers. A BaseException that
    is no Exception (KeyboardInterrupt, SystemExit) is not exchanged: it ends this rank at once, and
    the others learn of it by its note (`rank_watch`).

    Collective over `group`: one all-gather of an object, which is two collectives (sizes, bytes).

    Args:
        group: a group of all ranks, so that a rank has the same number in it as in the world.
        work: what this rank does. Its result stays on this rank and need not be picklable.
        failure: what the others say of an error that is not a UserError, with `{rank}`, `{error}`.
    """
    result, error = _attempt(work)
    exchange(group, None, error, failure)
    return result


def all_gather_results(
    group: dist.ProcessGroup, work: Callable[[], T], failure: str = FAILURE
) -> list[T]:
    """Return every rank's `work()` in rank order; if it raises on one rank, raise on every rank.

    In all else as `raise_on_all_ranks`, with the same single all-gather. A result that cannot be
    pickled is an error of its rank.
    """
    # Pickled as a part of the work, so that a result which cannot be sent is an error like others.
    packed, error = _attempt(lambda: pickle.dumps(work()))
    return [pickle.loads(result) for result in exchange(group, packed, error, failure)]


def exchange(
    group: dist.ProcessGroup, value: Any, error: BaseException | None, failure: str = FAILURE
) -> list[Any]:
    """Return every rank's `value` in rank order; if one rank has an `error`, raise on every rank.

    `raise_on_all_ranks` says who raises what, what `failure` is and what it costs.
    """
    reports: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(reports, (value, _sendable(error)), group=group)
    if error is not None and not isinstance(error, PeerFailed):
        raise error
    failures = [(rank, cause) for rank, (_, cause) in enumerate(reports) if cause is not None]
    if failures:
        rank, cause = min(failures, key=lambda item: isinstance(item[1], PeerFailed))
        if isinstance(cause, UserError):
            raise cause
        raise TrainingError(failure.format(rank=rank, error=cause))
    return [value for value, _ in reports]


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:  # raised again by `exchange`, once all ranks know
        return None, error


def _sendable(error: BaseException | None) -> UserError | str | None:
    """Return an error as the other ranks get it: a UserError itself, of others type and message."""
    if error is None or (isinstance(error, UserError) and _is_picklable(error)):
        return error
    return f"{type(error).__name__}: {error}"


def _is_picklable(error: UserError) -> bool:
    # Both ways: one whose constructor wants more than the message fails where it is loaded.
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return False
    return True
