"""The SGLang engines of a run, as the rank that owns each of them sees it."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # configuration checks import this module, and need no HTTP client
    from megatron_policysplit.rollout.sglang_http import SglangClient


class State(enum.Enum):
    """STARTING: not ready yet. WAITING: answers, but holds other weights than the run's. SERVING:
    in use. QUARANTINED: a weight sync failed half-way; paused, its weights are mixed. DOWN: dead or
    silent.
    """

    STARTING = "starting"
    WAITING = "waiting"
    SERVING = "serving"
    QUARANTINED = "quarantined"
    DOWN = "down"


@dataclass(frozen=True)
class Placement:
    """Where an engine stands. owner: the global rank that starts it and talks to it about weights
    and memory.
    ranks: the actor ranks on whose GPUs it runs, in the order of its tensor-parallel ranks;
    (owner,) if apart.
    """

    index: int
    owner: int
    ranks: tuple[int, ...]


@dataclass
class Member:
    """One engine on the rank that owns it. version: of the weights it was given last, None if
    unknown or mixed.
    why: what happened when the state is not SERVING. tensor: its tensor-parallel size. dtype: as it
    says itself.
    """

    placement: Placement
    client: SglangClient
    tensor: int
    dtype: str = "auto"
    state: State = State.STARTING
    version: int | None = None
    why: str = ""

    @property
    def index(self) -> int:
        return self.placement.index

    @property
    def address(self) -> str:
        return self.client.address
