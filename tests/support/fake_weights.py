"""A weight sync for tests of the fleet: engines take weights, or fail as they are told."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch.distributed as dist

from megatron_policysplit.distributed.layout import Layout
from megatron_policysplit.serving.members import Member, State


@dataclass
class FakeWeights:
    """Speaks like WeightSync. failing: for the next pushes, engine -> why it fails; an engine that does not run always
    does. during: called on this rank in the middle of the next push."""

    members: Sequence[Member]
    layout: Layout
    log: list[str]
    failing: list[dict[int, str]] = field(default_factory=list)
    pushes: list[tuple[int, list[int]]] = field(default_factory=list)
    during: Callable[[], None] = lambda: None
    snapshot: int | None = None
    can_restore: bool = False
    restores_fail: list[Exception] = field(default_factory=list)

    def push(self, version: int, engines: set[int]) -> dict[int, str]:
        self.pushes.append((version, sorted(engines)))
        failing = self.failing.pop(0) if self.failing else {}
        self.during()
        self.snapshot = version
        mine = [member for member in self.members if member.index in engines]
        own = {}
        for member in mine:
            engine = member.client.engine
            if not engine.running:
                own[member.index], member.state, member.version = "no answer", State.DOWN, None
            elif member.index in failing:
                own[member.index], member.state, member.version = failing[member.index], State.QUARANTINED, None
                member.why, engine.paused = failing[member.index], True
            else:
                self._take(member, version)
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, own, group=self.layout.world)
        return {index: why for failed in everyone for index, why in failed.items()}

    async def restore_from_snapshot(self, member: Member) -> None:
        assert self.can_restore
        await asyncio.sleep(0.01)
        if self.restores_fail:
            member.state = State.QUARANTINED
            raise self.restores_fail.pop(0)
        self.log.append(f"restore {member.index}")
        self._take(member, self.snapshot)

    def _take(self, member: Member, version: int) -> None:
        self.log.append(f"weights {version} {member.index}")
        member.client.engine.version, member.client.engine.paused = str(version), False
        member.state, member.version, member.why = State.SERVING, version, ""
