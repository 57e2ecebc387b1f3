"""transport=distributed: one sender a pipeline stage broadcasts its stage's weights to all engines
at once.

The chief posts every bucket to every engine, which then receives it, while TP rank 0 of the stage
that owns it broadcasts. Neither waits for the other except in the broadcast, so each can stop the
other (`groups.Abort`). A group lasts from sync to sync, as long as the engines are the same. It
breaks when one engine fails; all others then fail with it, so a group without that engine is made
and all weights are sent again.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_policysplit.actor.weights import consume_weights
from megatron_policysplit.distributed.agree import PeerFailed
from megatron_policysplit.distributed.device import backend, training_device
from megatron_policysplit.errors import ConfigError, EngineError
from megatron_policysplit.serving.members import Member
from megatron_policysplit.weight_sync import session
from megatron_policysplit.weight_sync.bucket import Bucket
from megatron_policysplit.weight_sync.groups import Abort, BroadcastFailed, SenderGroup, own_address
from megatron_policysplit.weight_sync.outcome import Failure, Failures, results_of_all_ranks
from megatron_policysplit.weight_sync.transport import TransportContext

ATTEMPTS = 3
ALIVE_SECONDS = 10.0  # for a scheduler that may have to give up a receive first
WATCH_SECONDS = 0.1


@dataclass(frozen=True)
class Offer:
    """Whom the chief sends to. engines: index -> (start time of its process, tensor-parallel size)."""

    engines: dict[int, tuple[float, int]]
    addresses: tuple[str, ...]
    host: str

    @property
    def world_size(self) -> int:
        return 1 + sum(tensor for _, tensor in self.engines.values())


@dataclass(frozen=True)
class Attempt:
    """How an attempt ended, as the chief sees it. broken: why all must be sent again; "" if nothing
    must.
    """

    failures: Failures
    broken: str = ""


Posts = Callable[[Abort], Coroutine[Any, Any, Attempt]]


class DistributedTransport:
    """Built on all ranks at once."""

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
        self.layout, self.control, self.actor = layout, context.control, context.actor
        self.members, self.read = context.members, context.read
        self.plan = context.plan_buckets(per_stage=True)
        self.limit = settings.weight_sync.timeout_seconds
        self.master_address = settings.weight_sync.master_address
        self.sends = layout.data_rank == 0 and layout.tensor_rank == 0
        self._joined: Offer | None = None  # the engines in the current groups, on every rank
        self._names: list[str] = []
        self._made = self._begun = 0
        self._run = layout.broadcast_from_chief(
            secrets.token_hex(4)
        )  # an engine may still know the groups of another run
        self._group: SenderGroup | None = None
        self._left: list[SenderGroup] = []

    def send(self, version: int, live: set[int]) -> Failures:
        """Give all buckets to the engines in `live`, on which a session is open. Collective over
        all ranks.
        """
        failures: Failures = {}
        for number in range(ATTEMPTS):
            if number:
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
        """Each rank for itself: the chief has the engines leave the groups, the senders leave
        theirs.
        """
        if self._joined is not None and self.layout.is_chief:
            self.control.run(self._destroy(sorted(self._joined.engines)))
        self._leave()

    def _attempt(self, live: set[int]) -> Attempt:
        """Send everything once. The same answer on every rank."""
        offer = self._from_chief(lambda: self.control.run(self._offer(live)))
        if set(offer.engines) != live:
            gone = {
                engine: Failure("it does not answer", silent=True)
                for engine in live - set(offer.engines)
            }
            return Attempt(gone, "an engine is gone")
        if self._joined is None or self._joined.engines != offer.engines:
            attempt = self._join(offer)
            if attempt.broken:
                return attempt
        return self._agreed(lambda abort: self._post_all(sorted(live), abort), self._broadcast)

    def _join(self, offer: Offer) -> Attempt:
        if self._joined is not None:
            self._from_chief(lambda: self.control.run(self._destroy(sorted(self._joined.engines))))
        self._leave()
        self._made += 1
        self._names = [
            f"policysplit-{self._run}-stage{stage}-{self._made}"
            for stage in range(self.layout.pipeline)
        ]
        found = results_of_all_ranks(self.layout, lambda: self._listen(offer))
        places = dict(place for place in found if place is not None)
        self._joined = offer

        def join(abort: Abort) -> None:
            if self._group is not None:
                self._group.join(abort)

        return self._agreed(lambda abort: self._init_all(offer, places, abort), join)

    def _listen(self, offer: Offer) -> tuple[int, tuple[str, int]] | None:
        """On a sender: its stage, and where the engines can join it."""
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

    def _agreed(self, posts: Posts, senders: Callable[[Abort], None]) -> Attempt:
        """Run `posts(abort)` on the chief's control loop while all ranks run `senders(abort)`, and
        agree on the end.

        If either fails, the groups are left and destroyed on all engines that answer.
        """
        self._begun += 1
        abort = Abort(f"{self._run}/{self._begun}")

        def run() -> Attempt:
            work = self.control.start(posts(abort)) if self.layout.is_chief else None
            broken = ""
            try:
                senders(abort)
            except (BroadcastFailed, PeerFailed) as error:
                broken = str(error)
                abort.set(broken)
                self._leave()
            except BaseException as error:
                abort.set(f"{type(error).__name__}: {error}")
                self._leave()
                raise
            finally:
                if work is not None:
                    work.wait()
            return work.result() if work is not None else Attempt({}, broken)

        answers = results_of_all_ranks(self.layout, run)
        attempt = answers[self.layout.chief]
        broken = attempt.broken or next((answer.broken for answer in answers if answer.broken), "")
        if broken or attempt.failures:
            self._leave()
        return Attempt(attempt.failures, broken)

    def _broadcast(self, abort: Abort) -> None:
        """Export, and on a sender broadcast its stage's buckets."""
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

    async def _offer(self, live: set[int]) -> Offer:
        """Who is there; a process that was started again is not the one that joined a group."""
        engines, addresses = {}, []
        for member in self._live(live):
            try:
                info = await session.within(
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
        offset, offsets = 1, {}
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
        """`call(member, step)` for each step on all engines at once; told apart who failed and who
        only suffered.
        """
        members = [self.members[engine] for engine in engines]
        origin: list[Member] = []  # the engine whose failure stopped the others
        reasons: Failures = {}

        async def post(member: Member, step) -> None:
            try:
                await session.within(self.limit, member, "a weight update", call(member, step))
            except EngineError as error:
                reasons[member.index] = session.as_failure(error)
                if abort.reason() is None:
                    origin.append(member)
                    abort.set(str(error))
                raise

        watch = asyncio.ensure_future(self._destroy_on(abort, engines))
        try:
            for step in steps:
                if await session.each(members, lambda member, step=step: post(member, step)):
                    break
        finally:
            if abort.reason() is None:
                watch.cancel()
            else:
                await watch
        if not reasons and abort.reason() is None:
            return Attempt({})
        alive = await asyncio.gather(*(self._answers(member) for member in members))
        guilty = [
            member for member, lives in zip(members, alive, strict=True) if not lives
        ] or origin
        return Attempt(
            {
                member.index: reasons.get(member.index, Failure("it does not answer", silent=True))
                for member in guilty
            },
            abort.reason() or "",
        )

    async def _answers(self, member: Member) -> bool:
        """Whether the engine's scheduler, not only its HTTP front, answers a question."""
        try:
            await session.within(
                min(self.limit, ALIVE_SECONDS), member, "answering", member.client.server_info()
            )
        except EngineError:
            return False
        return True

    async def _destroy_on(self, abort: Abort, engines: Sequence[int]) -> None:
        """Once the attempt is stopped, free the engines that wait for a broadcast: each of them
        leaves the group.
        """
        while abort.reason() is None:
            await asyncio.sleep(WATCH_SECONDS)
        await self._destroy(engines)

    async def _destroy(self, engines: Sequence[int]) -> None:
        async def destroy(member: Member, name: str) -> None:
            limit = min(self.limit, ALIVE_SECONDS)
            await session.within(
                limit, member, "leaving a group", member.client.destroy_group(name)
            )

        members = self._live(set(engines))
        for name in self._names:  # an engine that is gone or never joined has nothing to leave
            await session.each(members, lambda member, name=name: destroy(member, name))

    def _begin_again(self, live: set[int]) -> Failures:
        async def begin(member: Member) -> None:
            await session.begin(member, self.limit)

        return self._from_chief(lambda: self.control.run(session.each(self._live(live), begin)))

    def _leave(self) -> None:
        self._joined = None
        if self._group is not None:
            self._group.leave()
            self._left.append(self._group)
            self._group = None
        self._left = [group for group in self._left if not group.over]

    def _live(self, live: set[int]) -> list[Member]:
        return [self.members[engine] for engine in sorted(live) if engine in self.members]

    def _from_chief(self, work):
        """The chief's `work()` on every rank."""
        return results_of_all_ranks(self.layout, lambda: work() if self.layout.is_chief else None)[
            self.layout.chief
        ]
