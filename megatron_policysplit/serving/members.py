"""The SGLang engines of a run, as the rank that owns each of them sees it."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # configuration checks import this module, and need no HTTP client
    from megatron_policysplit.rollout.sglang_http import SglangClient


class State(enum.Enum):
    """What an engine is good for at present.

    Who moves it between these:

    - the fleet to WAITING, once it has generated and fits the run; to DOWN, when it is dead or
      silent, or when its own server is quarantined; from DOWN to STARTING, or to WAITING where
      others started it and it answers again;
    - a weight sync to SERVING; where it fails to QUARANTINED, or to DOWN if it does not answer;
    - colocation to WAITING, when it has released its memory.
    """

    STARTING = "starting"  # not ready yet
    WAITING = "waiting"  # answers, but holds other weights than the run's
    SERVING = "serving"  # in use
    QUARANTINED = "quarantined"  # a weight sync failed half-way: paused, its weights are mixed
    DOWN = "down"  # dead or silent


@dataclass(frozen=True)
class Placement:
    """Where an engine stands. Made by `placement.place_engines`, the same on every rank."""

    index: int  # number of the engine in the run
    owner: int  # global rank that starts it and talks to it about weights and memory
    # The actor ranks on whose GPUs it runs, in the order of its tensor-parallel ranks; (owner,) if
    # it stands apart.
    ranks: tuple[int, ...]


@dataclass
class Member:
    """One engine, on the rank that owns it. Fleet, weight sync and colocation read and set it."""

    placement: Placement
    client: SglangClient
    tensor: int  # tensor-parallel size
    dtype: str = "auto"  # as the engine says itself, once `check_identity` has asked it
    state: State = State.STARTING
    version: int | None = None  # of the weights it was given last; None if unknown or mixed
    why: str = ""  # what happened, where the state is not SERVING

    @property
    def index(self) -> int:
        return self.placement.index

    @property
    def address(self) -> str:
        return self.client.address
