"""transport=distributed: each pipeline stage broadcasts its weights to all engines at once.

The **sender** of a stage is its tensor rank 0 in replica 0. The chief posts every bucket to every
engine, which then waits to receive it, while the sender of the stage that owns it broadcasts. The
chief waits for the engines' answers and the sender for its broadcast; neither waits for the other,
so that each can stop the other through a key in the store (`groups.Abort`).

A group lasts from sync to sync, as long as the engines are the same processes. It breaks when one
engine fails: the broadcast then fails for all others, too. So it is left, a group without that
engine is made, and all weights are sent again, at most ATTEMPTS times.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from megatron_policysplit.actor.weights import consume_weights
from megatron_policysplit.distributed.agree import PeerFailed
from megatron_policysplit.distributed.device import backend, training_device
from megatron_policysplit.errors import ConfigError, EngineError
from megatron_policysplit.serving.members import Member
from megatron_policysplit.weight_sync import session
from megatron_policysplit.weight_sync.bucket import Bucket
from megatron_policysplit.weight_sync.groups import Abort, BroadcastFailed, SenderGroup, own_address
from megatron_policysplit.weight_sync.nccl import check_nccl
from megatron_policysplit.weight_sync.outcome import Failure, Failures, results_of_all_ranks
from megatron_policysplit.weight_sync.transport import TransportContext

T = TypeVar("T")

ATTEMPTS = 3
ALIVE_SECONDS = 10.0  # to answer: a scheduler may have to give up a receive first
WATCH_SECONDS = 0.1  # between two looks at the abort key while engines are posted to


@dataclass(frozen=True)
class Offer:
    """The engines that a group is made for. Made by the chief, the same on every rank."""

    # engine index -> (start time of its process, tensor-parallel size). A process that was started
    # again has another start time, and is not in the group any more.
    engines: dict[int, tuple[float, int]]
    addresses: tuple[str, ...]  # their URLs
    host: str  # name of the chief's machine

    @property
    def world_size(self) -> int:
        """Size of a stage's group: its sender, and every rank of every engine."""
        return 1 + sum(tensor for _, tensor in self.engines.values())


@dataclass(frozen=True)
class Attempt:
    """How making the groups, or sending all weights once, ended."""

    failures: Failures
    broken: str = ""  # why all must be sent again; "" if nothing must


Posts = Callable[[Abort], Coroutine[Any, Any, Attempt]]  # the chief's half of an attempt


class DistributedTransport:
    """Broadcasts the weights to the engines. Implements `transport.Transport`."""

    has_session = True
    snapshot = None

    def __init__(self, context: TransportContext):
        settings, layout = context.settings, context.layout
        if settings.colocated:
            raise ConfigError(
                "weight_sync.transport=distributed cannot reach engines on the actor's own GPUs "
                "(rollout.colocated=true): NCCL wants a GPU of its own for every process; use "
                "tensor"
            )
        results_of_all_ranks(layout, lambda: check_nccl(settings) if layout.is_chief else None)
        self.layout, self.control, self.actor = layout, context.control, context.actor
        self.members, self.read = context.members, context.read
        self.plan = context.plan_buckets(per_stage=True)
        self.limit = settings.weight_sync.timeout_seconds
        self.master_address = settings.weight_sync.master_address
        self.sends = layout.data_rank == 0 and layout.tensor_rank == 0
        self._group_offer: Offer | None = None  # the engines in the current groups, on every rank
        self._names: list[str] = []  # of the current groups, by stage
        # Groups made, and attempts begun; both the same on every rank, and part of names.
        self._groups_made = self._attempts = 0
        # An engine may still know the groups of another run, whose names have another id.
        self._run = layout.broadcast_from_chief(secrets.token_hex(4))
        self._group: SenderGroup | None = None  # of this rank's stage, on its sender
        self._old_groups: list[SenderGroup] = []  # groups in which a broadcast is not over yet

    def send(self, version: int, live: set[int]) -> Failures:
        """Give all buckets to the engines in `live`.

        Beside the export two all-gathers of an object over the world, two more where groups are
        made, and one more where old groups are left; the same again, and one, per further attempt.
        """
        failures: Failures = {}
        for number in range(ATTEMPTS):
            if number:
                # A session may hold buckets of the attempt that broke: begin ends it and opens one.
                failures |= self._begin_again(live)
                live = live - set(failures)
            if not live:
                return failures
            attempt = self._attempt(live)
            failures |= attempt.failures
            live = live - set(failures)
            if not attempt.broken:
                return failures
        return failures | {engine: Failure(attempt.broken) for engine in live}

    def close(self) -> None:
        """As the chief have the engines leave the groups, as a sender leave this rank's."""
        if self._group_offer is not None and self.layout.is_chief:
            self.control.run(self._destroy(sorted(self._group_offer.engines)))
        self._leave()

    def _attempt(self, live: set[int]) -> Attempt:
        """Send everything once, after making groups if the engines are others than in the last."""
        offer = self._run_on_chief(lambda: self._make_offer(live))
        if set(offer.engines) != live:
            silent = Failure("it does not answer", silent=True)
            return Attempt(
                {engine: silent for engine in live - set(offer.engines)}, "an engine is gone"
            )
        if self._group_offer is None or self._group_offer.engines != offer.engines:
            attempt = self._join(offer)
            if attempt.broken:
                return attempt
        return self._run_attempt(lambda abort: self._post_all(sorted(live), abort), self._broadcast)

    def _join(self, offer: Offer) -> Attempt:
        """Leave the current groups, and make a group of every stage with the engines of `offer`."""
        if self._group_offer is not None:
            self._run_on_chief(lambda: self._destroy(sorted(self._group_offer.engines)))
        self._leave()
        self._groups_made += 1
        self._names = [
            f"policysplit-{self._run}-stage{stage}-{self._groups_made}"
            for stage in range(self.layout.pipeline)
        ]
        # All stores are open before any engine is told to come to one.
        stages = results_of_all_ranks(self.layout, lambda: self._listen(offer))
        places = dict(stage for stage in stages if stage is not None)
        self._group_offer = offer

        def join(abort: Abort) -> None:
            if self._group is not None:
                self._group.join(abort)

        return self._run_attempt(lambda abort: self._init_all(offer, places, abort), join)

    def _listen(self, offer: Offer) -> tuple[int, tuple[str, int]] | None:
        """As a sender open the group's store; return the stage, and (host, port) of the store."""
        if not self.sends:
            return None
        host = own_address(
            self.master_address,
            offer.addresses,
            beside_chief=socket.gethostname() == offer.host,
            chief_host=offer.host,
        )
        stage = self.layout.pipeline_rank
        try:
            self._group = SenderGroup(self._names[stage], host, offer.world_size, self.limit)
        except OSError as error:
            raise ConfigError(
                f"the weights of pipeline stage {stage} cannot be sent from {host} ({error}); set "
                "weight_sync.master_address to an address of the sending node that the engines "
                "reach"
            ) from error
        return stage, (host, self._group.port)

    def _run_attempt(self, posts: Posts, senders: Callable[[Abort], None]) -> Attempt:
        """Run `posts(abort)` on the chief's control loop while all ranks run `senders(abort)`.

        Returns how it ended, the same on every rank (one all-gather). If either side fails, the
        groups are left, and destroyed on all engines that answer.
        """
        self._attempts += 1
        # A key of its own for each attempt: one that was set says stop for good.
        abort = Abort(f"{self._run}/{self._attempts}")

        def run() -> Attempt:
            work = self.control.start(posts(abort)) if self.layout.is_chief else None
            broken = ""
            try:
                senders(abort)
            except (BroadcastFailed, PeerFailed) as error:
                # Not an error of this rank: all ranks try again without the engine that failed. The
                # key comes first, so that the chief stops posting; then the group is left, so that
                # engines waiting in it get an error and can answer.
                broken = str(error)
                abort.set(broken)
                self._leave()
            except BaseException as error:
                # The chief's posts would wait for a broadcast that never comes, up to the limit.
                abort.set(f"{type(error).__name__}: {error}")
                self._leave()
                raise
            finally:
                # Whatever happened here: nothing may be on its way to the engines when ranks meet.
                if work is not None:
                    work.wait()
            return work.result() if work is not None else Attempt({}, broken)

        answers = results_of_all_ranks(self.layout, run)
        # The chief knows which engine failed; a sender only that its broadcast did.
        attempt = answers[self.layout.chief]
        broken = attempt.broken or next((answer.broken for answer in answers if answer.broken), "")
        if broken or attempt.failures:
            self._leave()
        return Attempt(attempt.failures, broken)

    def _broadcast(self, abort: Abort) -> None:
        """Export the weights, and as a sender broadcast this stage's buckets."""
        if not self.layout.is_exported:
            return

        def take(stream) -> None:
            if self._group is None:
                return
            for bucket in self.plan:
                if bucket.stage == self.layout.pipeline_rank:
                    flat = torch.empty(bucket.nbytes, dtype=torch.uint8, device=training_device())
                    bucket.fill(stream, flat)
                    self._group.broadcast(flat, abort)

        destination = "stage_leader" if self.layout.data_rank == 0 else "nowhere"
        consume_weights(
            self.actor.model,
            self.actor.hf_config,
            destination,
            take,
            device=training_device(),
            read=self.read,
        )

    async def _make_offer(self, live: set[int]) -> Offer:
        """As the chief ask the engines in `live` who they are; those that answer."""
        engines, addresses = {}, []
        for member in self._members_of_rank(live):
            try:
                info = await session.with_limit(
                    self.limit, member, "answering", member.client.server_info()
                )
            except EngineError:
                continue
            engines[member.index] = (info["startup_time"], member.tensor)
            addresses.append(member.address)
        return Offer(engines, tuple(addresses), socket.gethostname())

    async def _init_all(
        self, offer: Offer, places: Mapping[int, tuple[str, int]], abort: Abort
    ) -> Attempt:
        """Have every engine join every stage's group."""
        offset, offsets = 1, {}  # rank 0 is the sender; engines follow in order
        for engine, (_, tensor) in offer.engines.items():
            offsets[engine] = offset
            offset += tensor

        async def init(member: Member, stage: int) -> None:
            host, port = places[stage]
            await member.client.init_group(
                host, port, offsets[member.index], offer.world_size, self._names[stage], backend()
            )

        return await self._post_stepwise(
            sorted(offer.engines), range(len(self._names)), init, abort
        )

    async def _post_all(self, engines: Sequence[int], abort: Abort) -> Attempt:
        """Tell the engines, bucket by bucket, to receive what the senders broadcast."""

        async def update(member: Member, bucket: Bucket) -> None:
            await member.client.update_from_distributed(
                bucket.names,
                [str(bucket.dtype).removeprefix("torch.")] * len(bucket.names),
                bucket.shapes,
                self._names[bucket.stage],
                flattened=True,
                timeout_seconds=self.limit,
            )

        return await self._post_stepwise(engines, self.plan, update, abort)

    async def _post_stepwise(self, engines: Sequence[int], steps, call, abort: Abort) -> Attempt:
        """Await `call(member, step)` for each step, on all engines at once; stop if one fails.

        The answer names the engines that failed, not those that failed with them: an engine in a
        broken broadcast answers with an error, too.
        """
        members = [self.members[engine] for engine in engines]
        origin: list[Member] = []  # the engine whose failure stopped the others
        reasons: Failures = {}  # of all that failed

        async def post(member: Member, step) -> None:
            try:
                await session.with_limit(self.limit, member, "a weight update", call(member, step))
            except EngineError as error:
                reasons[member.index] = session.as_failure(error)
                if abort.reason() is None:  # the first: later errors are its consequences
                    origin.append(member)
                    abort.set(str(error))
                raise

        watch = asyncio.ensure_future(self._destroy_on(abort, engines))
        try:
            for step in steps:
                if await session.call_each(members, lambda member, step=step: post(member, step)):
                    break
        finally:
            if abort.reason() is None:
                watch.cancel()
            else:
                await watch  # engines leave the group before anything else is asked of them
        if not reasons and abort.reason() is None:
            return Attempt({})
        # An engine that died or hangs need not be the first whose post failed: the others in the
        # broadcast may notice earlier. So whoever is silent now is at fault; if all answer, it is
        # the first that failed.
        answers = await asyncio.gather(*(self._answers(member) for member in members))
        silent = [member for member, answer in zip(members, answers, strict=True) if not answer]
        unknown = Failure("it does not answer", silent=True)
        return Attempt(
            {member.index: reasons.get(member.index, unknown) for member in silent or origin},
            abort.reason() or "",
        )

    async def _answers(self, member: Member) -> bool:
        """Return whether the engine's scheduler, not only its HTTP front, answers a question."""
        try:
            await session.with_limit(
                min(self.limit, ALIVE_SECONDS), member, "answering", member.client.server_info()
            )
        except EngineError:
            return False
        return True

    async def _destroy_on(self, abort: Abort, engines: Sequence[int]) -> None:
        """Once the attempt is stopped, have the engines leave the groups.

        An engine that waits for a broadcast would answer nothing until its own time-out. Runs
        beside the posts, which wait for just that answer.
        """
        while abort.reason() is None:
            await asyncio.sleep(WATCH_SECONDS)
        await self._destroy(engines)

    async def _destroy(self, engines: Sequence[int]) -> None:
        """Have the engines leave the current groups, as far as they answer."""

        async def destroy(member: Member, name: str) -> None:
            limit = min(self.limit, ALIVE_SECONDS)
            await session.with_limit(
                limit, member, "leaving a group", member.client.destroy_group(name)
            )

        members = self._members_of_rank(set(engines))
        for name in self._names:  # an engine that is gone or never joined has nothing to leave
            await session.call_each(members, lambda member, name=name: destroy(member, name))

    def _begin_again(self, live: set[int]) -> Failures:
        """Open a new session on the engines in `live`; return those on which that failed."""

        async def begin(member: Member) -> None:
            await session.begin(member, self.limit)

        return self._run_on_chief(lambda: session.call_each(self._members_of_rank(live), begin))

    def _leave(self) -> None:
        """Leave this rank's group, if it has one; the next attempt makes new ones."""
        self._group_offer = None
        if self._group is not None:
            self._group.leave()
            self._old_groups.append(self._group)
            self._group = None
        # Dropping a group earlier would wait for its broadcast (`SenderGroup.over`).
        self._old_groups = [group for group in self._old_groups if not group.over]

    def _members_of_rank(self, live: set[int]) -> list[Member]:
        """Return the engines in `live` that this rank owns."""
        return [self.members[engine] for engine in sorted(live) if engine in self.members]

    def _run_on_chief(self, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run `call()` on the chief; return its result on every rank (one all-gather)."""
        results = results_of_all_ranks(
            self.layout, lambda: self.control.run(call()) if self.layout.is_chief else None
        )
        return results[self.layout.chief]
