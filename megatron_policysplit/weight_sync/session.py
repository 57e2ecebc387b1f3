"""One engine through one weight sync: the calls before the weights, and those after them.

Order: pause, begin, (the weights), end, flush, set version, continue, read the version back. SGLang
has no way back from a session that fails half-way, so an engine on which any call fails stays
paused.
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
    """Pause the engine and, if `begins`, open a weight-update session. limit: seconds for each
    call.
    """
    await within(limit, member, "pausing", member.client.pause())
    if before_load is not None:
        await within(limit, member, "getting ready for weights", before_load(member))
    if begins:
        await begin(member, limit)
    else:
        await end_if_open(member, limit)


async def begin(member: Member, limit: float) -> None:
    """Open a session; one that is open already, of a trainer that died or of a failed attempt, is
    ended first.
    """
    try:
        await within(limit, member, "opening a weight update", member.client.begin_update())
    except EngineRefused as refused:
        try:
            await within(limit, member, "ending an older weight update", member.client.end_update())
        except EngineRefused:
            raise refused from None  # none was open, so it was for another reason
        await within(limit, member, "opening a weight update", member.client.begin_update())


async def end_if_open(member: Member, limit: float) -> None:
    """End a session that was left open; SGLang refuses when there is none, which is as good."""
    try:
        await within(limit, member, "ending an older weight update", member.client.end_update())
    except EngineRefused:
        return


async def close_session(
    member: Member, version: int, *, ends: bool, limit: float, after_load: Hook | None
) -> None:
    """Make the engine generate with the weights it has taken; it then says that it has `version`.

    Raises EngineError, with the engine paused, if it does not.
    """
    client = member.client
    if ends:
        await within(limit, member, "ending the weight update", client.end_update())
    if after_load is not None:
        await within(limit, member, "getting ready to generate", after_load(member))
    await _flush(member, limit)
    await within(limit, member, "setting the version", client.set_version(str(version)))
    await within(limit, member, "continuing", client.proceed())
    try:
        served = await within(limit, member, "reading the version back", client.version())
        if served != str(version):
            raise EngineRefused(
                f"{member.address} says weight version {served!r} after version {version} was set",
                200,
            )
    except EngineError:
        await within(limit, member, "pausing", client.pause())
        raise


async def abandon(member: Member, *, ends: bool, limit: float) -> bool:
    """After a failure, as far as the engine still answers: have it paused, and no session open into
    which a bucket that is late could be loaded. Whether it answered.
    """
    answered = False
    for call in (member.client.pause, member.client.end_update) if ends else (member.client.pause,):
        try:
            await within(limit, member, "giving up a weight update", call())
            answered = True
        except EngineRefused:
            answered = True
        except EngineUnreachable:
            continue
    return answered


async def _flush(member: Member, limit: float) -> None:
    """Empty the prefix cache, which the old weights filled; aborted requests may take a moment to
    be gone.
    """
    deadline = asyncio.get_running_loop().time() + limit
    while True:
        try:
            return await within(limit, member, "flushing its cache", member.client.flush())
        except EngineRefused:
            if asyncio.get_running_loop().time() > deadline:
                raise
        await asyncio.sleep(FLUSH_AGAIN_SECONDS)


async def each(members: Sequence[Member], step: Step) -> Failures:
    """`step` on all members at the same time; those on which it failed."""
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


def explained(failures: Failures) -> Failures:
    """Of a bucket or a snapshot: why an engine may have ended while it took that."""
    hint = "(SGLang ends when tensors do not fit the model that it serves; its log says so)"
    return {
        index: Failure(f"{failure.why} {hint}", silent=True) if failure.silent else failure
        for index, failure in failures.items()
    }


def as_failure(error: EngineError) -> Failure:
    return Failure(str(error), silent=isinstance(error, EngineUnreachable))


async def within(limit: float, member: Member, doing: str, call: Awaitable[Any]) -> Any:
    """`call` with a time limit in seconds; past it, EngineUnreachable says what the engine was
    doing.
    """
    try:
        async with asyncio.timeout(limit):
            return await call
    except TimeoutError:
        raise EngineUnreachable(
            f"{member.address} took more than {limit:g} s for {doing}"
        ) from None
