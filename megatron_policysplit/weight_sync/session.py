"""One engine through one weight sync: the calls before the weights, and those after them.

Order: pause, begin, (the weights), end, flush, set version, continue, read the version back. If
engines are colocated, all ranks give back what the weights took of their GPUs after `end`, and only
then do engines take memory for their caches.

Pause comes first, so that no request is answered with mixed weights. The flush comes before the
engine continues: its prefix cache holds what the old weights computed. The version is set last,
when all else has succeeded; it is read back because a server that was started again meanwhile has
other weights, and says so.

SGLang has no way back from a session that fails half-way, so an engine on which any call fails
stays paused.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from megatron_policysplit.errors import EngineError
from megatron_policysplit.rollout.sglang_http import EngineRefused, EngineUnreachable
from megatron_policysplit.serving.members import Member
from megatron_policysplit.weight_sync.outcome import Failure, Failures

FLUSH_AGAIN_SECONDS = 0.2

Hook = Callable[[Member], Awaitable[None]]
Step = Callable[[Member], Coroutine[Any, Any, None]]


async def open_session(
    member: Member, *, begins: bool, limit: float, before_load: Hook | None
) -> None:
    """Pause the engine, call `before_load`, and open a weight-update session if `begins`.

    begins: whether the transport has a session. limit: seconds for each call. before_load: what a
    colocated engine needs before it has memory for weights. Raises EngineError if a call fails.
    """
    await with_limit(limit, member, "pausing", member.client.pause())
    if before_load is not None:
        await with_limit(limit, member, "getting ready for weights", before_load(member))
    if begins:
        await begin(member, limit)
    else:
        await end_if_open(member, limit)


async def begin(member: Member, limit: float) -> None:
    """Open a session; one that is open already is ended first.

    A trainer that died leaves one open, and so does an attempt that failed.
    """
    try:
        await with_limit(limit, member, "opening a weight update", member.client.begin_update())
    except EngineRefused as refused:
        try:
            await with_limit(
                limit, member, "ending an older weight update", member.client.end_update()
            )
        except EngineRefused:
            raise refused from None  # none was open, so it was for another reason
        await with_limit(limit, member, "opening a weight update", member.client.begin_update())


async def end_if_open(member: Member, limit: float) -> None:
    """End a session that was left open; SGLang refuses when there is none, which is as good."""
    try:
        await with_limit(limit, member, "ending an older weight update", member.client.end_update())
    except EngineRefused:
        return


async def end(member: Member, limit: float) -> None:
    """End the session: the engine lets go of what it was told to read. Raises EngineError."""
    await with_limit(limit, member, "ending the weight update", member.client.end_update())


async def serve_again(
    member: Member, version: int, *, limit: float, after_load: Hook | None
) -> None:
    """Make the engine generate with the weights it has taken, and say that it has `version`.

    No session is open. limit: seconds for each call. after_load: what a colocated engine needs
    before it can generate. Raises EngineError if a call fails or the engine says another version;
    an engine that was continued is paused again.
    """
    client = member.client
    if after_load is not None:
        await with_limit(limit, member, "getting ready to generate", after_load(member))
    await _flush(member, limit)
    await with_limit(limit, member, "setting the version", client.set_version(str(version)))
    await with_limit(limit, member, "continuing", client.proceed())
    try:
        served = await with_limit(limit, member, "reading the version back", client.version())
        if served != str(version):
            raise EngineRefused(
                f"{member.address} says weight version {served!r} after version {version} was set",
                200,
            )
    except EngineError:
        # It generates already, maybe with other weights than the run's.
        await with_limit(limit, member, "pausing", client.pause())
        raise


async def abandon(member: Member, *, ends: bool, limit: float) -> bool:
    """Leave a failed engine paused and without a session; return whether it answered.

    Into a session that stays open a bucket that is late could still be loaded. ends: whether the
    transport has a session. limit: seconds for each call. Raises nothing if the engine is gone.
    """
    answered = False
    calls = [member.client.pause, *([member.client.end_update] if ends else [])]
    for call in calls:
        try:
            await with_limit(limit, member, "giving up a weight update", call())
            answered = True
        except EngineRefused:  # it is paused already, or no session is open
            answered = True
        except EngineUnreachable:
            continue  # the other call may get through all the same
    return answered


async def _flush(member: Member, limit: float) -> None:
    """Empty the prefix cache, which the old weights filled.

    An engine refuses while requests run, and those that the pause aborted take a moment to be gone.
    """
    deadline = asyncio.get_running_loop().time() + limit
    while True:
        try:
            return await with_limit(limit, member, "flushing its cache", member.client.flush())
        except EngineRefused:
            if asyncio.get_running_loop().time() > deadline:
                raise
        await asyncio.sleep(FLUSH_AGAIN_SECONDS)


async def call_each(members: Sequence[Member], step: Step) -> Failures:
    """Call `step` on all members at the same time; return those on which it failed."""
    failures = await asyncio.gather(*(_attempt(member, step) for member in members))
    return {
        member.index: failure
        for member, failure in zip(members, failures, strict=True)
        if failure is not None
    }


async def _attempt(member: Member, step: Step) -> Failure | None:
    try:
        await step(member)
    except EngineError as error:
        return as_failure(error)
    return None


def add_hint(failures: Failures) -> Failures:
    """Add to silent failures why an engine may have ended while it took a bucket or snapshot."""
    hint = "(SGLang ends when tensors do not fit the model that it serves; its log says so)"
    return {
        index: Failure(f"{failure.why} {hint}", silent=True) if failure.silent else failure
        for index, failure in failures.items()
    }


def as_failure(error: EngineError) -> Failure:
    """Return the error of a call to an engine as what becomes of the engine."""
    return Failure(str(error), silent=isinstance(error, EngineUnreachable))


async def with_limit(limit: float, member: Member, doing: str, call: Awaitable[Any]) -> Any:
    """Await `call` for at most `limit` seconds; past them EngineUnreachable says `doing`."""
    try:
        async with asyncio.timeout(limit):
            return await call
    except TimeoutError:
        raise EngineUnreachable(
            f"{member.address} took more than {limit:g} s for {doing}"
        ) from None
