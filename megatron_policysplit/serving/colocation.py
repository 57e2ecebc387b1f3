"""Engines on the actor's own GPUs: whose turn it is to hold the memory, and how it changes hands.

To generation, on every rank (`to_generation`):
1. offload the optimizer, the gradient buffers, the parameters;
2. a barrier over the world: an engine spans the GPUs of several ranks, and all must have made room;
3. the engines' turn begins: servers that do not run may be started, with all of their memory.
Then, by the weight sync, on the rank that owns an engine:
4. pause; resume the memory of the weights (`before_load`);
5. load: the actor's parameters are read from host memory, `Offload.read`;
6. resume the KV cache and the CUDA graphs (`after_load`); continue. A server started meanwhile
   holds everything and resumes nothing, whether it was started at the beginning of the run or again
   after a fault.

To training, on every rank (`to_training`):
1. the engines' turn ends: no server may be started, and one that is starting is waited for;
2. owners: pause, flush until the engine is idle (SGLang dies if asked to release before), release
   KV cache, weights and CUDA graphs;
3. a barrier over the world that carries errors;
4. every rank waits until its GPU really has the memory (SGLang answers for its tensor-parallel rank
   0, and the others may be later);
5. the same barrier again; and only if no rank failed
6. restore the parameters, the gradient buffers, the optimizer.

In this order engines and actor never hold the same memory at once. At the start of a run the actor
is built first, on empty GPUs; then `to_generation`, then the servers start. Released weights are
lost, so every turn of the engines begins with a load, even of weights that have not changed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from megatron_policysplit.distributed.agree import raise_on_all_ranks
from megatron_policysplit.distributed.control import Control
from megatron_policysplit.distributed.device import return_freed_memory
from megatron_policysplit.distributed.layout import Layout
from megatron_policysplit.errors import EngineError
from megatron_policysplit.rollout.sglang_http import EngineRefused
from megatron_policysplit.serving.members import Member, State

TAGS = ("kv_cache", "weights", "cuda_graph")
POLL_SECONDS = 0.1
SETTLE_SECONDS = 10.0
GIB = 2**30


class ActorMemory(Protocol):
    """The part of `actor.offload.Offload` that is used here."""

    @property
    def bytes_away(self) -> int: ...  # of the actor, in host memory
    def free_bytes(self) -> float: ...  # of this rank's GPU
    def offload_optimizer(self) -> None: ...
    def offload_gradients(self) -> None: ...
    def offload_parameters(self) -> None: ...
    def restore_parameters(self) -> None: ...
    def restore_gradients(self) -> None: ...
    def restore_optimizer(self) -> None: ...


class Colocation:
    """The turns of the engines and the actor on this rank's GPU. One per rank."""

    def __init__(
        self,
        offload: ActorMemory,
        members: Sequence[Member],
        control: Control,
        layout: Layout,
        *,
        start_seconds: float,
        release_seconds: float = 120.0,
        settle_seconds: float = SETTLE_SECONDS,
    ):
        """Begin with the actor's turn.

        offload: the actor's memory on this rank.
        members: the engines this rank owns, often none.
        start_seconds: how long a server may be starting (rollout.server.start_seconds).
        release_seconds: how long an engine may take to become idle, and a GPU to have the memory
            that the actor needs.
        settle_seconds: how long an engine that does not answer may take to be found dead, and
            memory beyond what the actor needs to come back.
        """
        self.offload, self.members, self.control, self.layout = offload, members, control, layout
        self.start_seconds, self.release_seconds = start_seconds, release_seconds
        self.settle_seconds = settle_seconds
        # Both are false while the memory changes hands.
        self._actors_turn, self._engines_turn = True, False
        self._released_tags: dict[int, set[str]] = {}  # by engine
        self._free_without_engines = 0.0  # bytes, when the engines' turn began

    @property
    def engines_turn(self) -> bool:
        """Whether a server may be started now. To be asked on the control loop.

        Between the answer and the server's STARTING there may be no `await`: `to_training` ends the
        turn on the same loop, and waits only for servers that it finds STARTING.
        """
        return self._engines_turn

    def started(self, member: Member) -> None:
        """Note, on the control loop, that a server was started and holds all of its memory."""
        self._released_tags.pop(member.index, None)

    def to_generation(self) -> None:
        """Free this rank's GPU and wait until every rank has.

        One barrier over the world, in the main thread.
        """
        if not self._actors_turn:
            raise RuntimeError("the GPUs are the engines' already")
        self._actors_turn = False
        self.offload.offload_optimizer()
        self.offload.offload_gradients()
        self.offload.offload_parameters()
        # An engine spans the GPUs of several ranks, and all of them must have made room.
        self.layout.barrier()
        self._free_without_engines = self.offload.free_bytes()
        self._engines_turn = True

    async def before_load(self, member: Member) -> None:
        """Give a paused engine memory for its weights.

        A hook of the weight sync, on the owner's control loop.
        """
        await self._resume(member, ("weights",))

    async def after_load(self, member: Member) -> None:
        """Give a paused engine all its other memory: only now, so that the load has room.

        A hook of the weight sync, on the owner's control loop.
        """
        await self._resume(member, ("kv_cache", "cuda_graph"))

    def to_training(self) -> None:
        """Have the engines release their memory, and bring the actor back.

        Raises EngineError, on every rank, if any engine does not release its memory: the actor then
        stays away, and the run cannot go on. Engines that served are WAITING afterwards; those that
        are DOWN have nothing to release.

        Two exchanges of errors over the world (`raise_on_all_ranks`), in the main thread.
        """
        if not self._engines_turn:
            raise RuntimeError("the GPUs are not the engines'")
        return_freed_memory()
        free_with_engines, world = self.offload.free_bytes(), self.layout.world
        raise_on_all_ranks(world, lambda: self.control.run(self._release_all()))
        # Only once all engines have released: this rank's GPU may be part of another's engine.
        raise_on_all_ranks(world, lambda: self._wait_for_memory(free_with_engines))
        self.offload.restore_parameters()
        self.offload.restore_gradients()
        self.offload.restore_optimizer()
        self._actors_turn = True

    async def _resume(self, member: Member, tags: Sequence[str]) -> None:
        if not self._engines_turn:
            raise RuntimeError(f"engine {member.index} may not take the GPUs: they are the actor's")
        released = self._released_tags.get(member.index, set())
        tags = [tag for tag in tags if tag in released]
        if tags:  # a server dies if told to resume what it holds
            await member.client.resume_memory(tags)
            released.difference_update(tags)

    async def _release_all(self) -> None:
        # First, and on the control loop: from here on no server is started.
        self._engines_turn = False
        results = await asyncio.gather(*map(self._release, self.members), return_exceptions=True)
        errors = [result for result in results if result is not None]
        for error in errors:
            if not isinstance(error, EngineError):
                raise error
        if errors:
            raise EngineError("; ".join(map(str, errors)))

    async def _release(self, member: Member) -> None:
        # A quarantined server is stopped by the fleet that tends it; what it holds until then is
        # not known.
        transient = (State.STARTING, State.QUARANTINED)
        if not await self._wait_until(lambda: member.state not in transient, self.start_seconds):
            raise EngineError(
                f"engine {member.index} ({member.address}) is {member.state.value} after "
                f"{self.start_seconds:g} s and still holds its GPUs, so that training cannot go "
                "on; see its log"
            )
        if member.state is State.DOWN:
            return
        tags = [tag for tag in TAGS if tag not in self._released_tags.get(member.index, ())]
        try:
            await member.client.pause()
            await self._flush_when_idle(member)
            if tags:
                await member.client.release_memory(tags)
        except EngineError as error:
            # One that died has given its memory back, too; the fleet may need a moment to see it.
            if await self._wait_until(lambda: member.state is State.DOWN, self.settle_seconds):
                return
            raise EngineError(
                f"engine {member.index} ({member.address}) did not release its GPUs' memory, so "
                f"that training cannot go on: {error}"
            ) from error
        self._released_tags[member.index] = set(TAGS)
        member.state, member.version = State.WAITING, None
        member.why = "its memory is released for training"

    async def _flush_when_idle(self, member: Member) -> None:
        """Flush, again and again: an engine refuses it while requests run."""
        deadline = time.monotonic() + self.release_seconds
        while True:
            try:
                return await member.client.flush()
            except EngineRefused:
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(POLL_SECONDS)

    async def _wait_until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Wait for a condition; False if it does not hold within the time."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(POLL_SECONDS)
        return True

    def _wait_for_memory(self, free_with_engines: float) -> None:
        """Wait until there is room for the actor, and a moment longer for what else comes back."""
        # What this process itself has cached would count as somebody else's.
        return_freed_memory()
        needed = self.offload.bytes_away
        # Beyond what is needed: all but a tenth of what the engine had taken, or but 1 GiB if that
        # is more. Waited for no longer than settle_seconds, because an engine may keep some.
        free_before = self._free_without_engines
        target = min(0.9 * free_before + 0.1 * free_with_engines, free_before - GIB)
        start = time.monotonic()
        while True:
            free, waited = self.offload.free_bytes(), time.monotonic() - start
            if free >= needed and (free >= target or waited >= self.settle_seconds):
                return
            if free < needed and waited > self.release_seconds:
                raise EngineError(
                    f"the GPU of rank {self.layout.rank} has {free / GIB:.2f} GiB free "
                    f"{waited:.0f} s after its engine answered that it had released its memory, "
                    f"but the actor needs {needed / GIB:.2f} GiB back; does another process use "
                    "that GPU?"
                )
            time.sleep(POLL_SECONDS)
