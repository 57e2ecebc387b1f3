"""What a transport of the weights must do, and what it is given (docs/new_transport.md).

`WeightSync` (`sync.py`) pauses the engines and lets them go on; a transport moves the bytes in
between. One file a transport; `sync.TRANSPORTS` finds it by its name in the configuration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_policysplit.actor.actor import Actor
from megatron_policysplit.actor.export_buckets import exported_tensors
from megatron_policysplit.actor.weights import Read
from megatron_policysplit.config import Config, WeightSyncConfig
from megatron_policysplit.distributed.control import Control
from megatron_policysplit.distributed.layout import Layout
from megatron_policysplit.serving.members import Member, Placement
from megatron_policysplit.weight_sync.bucket import Bucket, plan_buckets
from megatron_policysplit.weight_sync.outcome import Failures


class Snapshot(Protocol):
    """Complete weights that were kept: one engine can take them without the other ranks."""

    @property
    def version(self) -> int:
        """The version that the engine serves afterwards."""

    async def load(self, member: Member) -> None:
        """Have a paused engine of this rank, without an open session, take the snapshot.

        Runs on the control loop, also while the main thread trains. Raises EngineError if the
        engine does not take it; the engine is left out of use then.
        """


class Transport(Protocol):
    """How the actor's weights reach the engines. Built from a `TransportContext` on every rank.

    The constructor is collective over all ranks and runs in the main thread, before any engine
    has to answer. It raises ConfigError, on every rank, if these engines cannot be reached.
    """

    # Whether SGLang takes the weights within a weight-update session, which `WeightSync` opens and
    # ends. Its route for files wants none.
    has_session: bool
    # The newest snapshot, of the same version on every rank; None where there is none, or not yet.
    snapshot: Snapshot | None

    def send(self, version: int, live: set[int]) -> Failures:
        """Give the actor's weights to the engines in `live`, as `version`.

        Collective over all ranks, which call it with the same arguments, in the main thread: there
        it may use the collectives of the training groups, and start HTTP calls to the engines that
        this rank owns (`context.members`) on the control loop. Every engine in `live` is paused and
        has a session open if `has_session`. Memory that an engine was told to read stays until that
        engine has answered or is given up: SGLang ends if it is gone.

        Returns the engines that did not take all weights, the same on every rank, {} if all did. An
        engine that fails is no exception: it is in the answer, `silent` if it did not answer, and
        the others take their weights all the same. `WeightSync` leaves it paused.

        Raises, on every rank, what is wrong with a rank: an export, a disk. All engines are left
        paused then. No call to an engine may take longer than `weight_sync.timeout_seconds`.
        """

    def close(self) -> None:
        """Give up groups, memory and processes; engines keep their weights.

        Each rank for itself, in the main thread: no collective, since other ranks may be gone.
        """


@dataclass(frozen=True)
class SyncSettings:
    """What a weight sync needs of the configuration. Made by `sync_settings`."""

    weight_sync: WeightSyncConfig
    model_path: str  # the Hugging Face directory that the run started from
    run_dir: str
    colocated: bool  # engines run on the actor's own GPUs
    external_servers: bool  # servers of rollout.addresses, which the run does not start itself
    server_python: str | None  # interpreter of the servers that the run starts; None: the trainer's


def sync_settings(config: Config) -> SyncSettings:
    """Take the settings of a weight sync out of the configuration."""
    return SyncSettings(
        weight_sync=config.weight_sync,
        model_path=config.model.path,
        run_dir=config.run.dir,
        colocated=config.rollout.colocated,
        external_servers=bool(config.rollout.addresses),
        server_python=config.rollout.server.python,
    )


@dataclass(frozen=True)
class TransportContext:
    """All that a transport gets. Made by `WeightSync` on every rank."""

    settings: SyncSettings
    layout: Layout
    control: Control
    actor: Actor
    placements: Sequence[Placement]  # of all engines, the same on every rank
    members: Mapping[int, Member]  # the engines that this rank owns, by engine index; often none
    read: Read  # gives a parameter's values on the rank's own device

    def plan_buckets(self, *, per_stage: bool) -> list[Bucket]:
        """All weights in buckets of at most `weight_sync.bucket_mib`, in the order of the export.

        The same on every rank, without a collective. per_stage: no bucket holds tensors of two
        pipeline stages.
        """
        return plan_buckets(
            exported_tensors(self.actor.hf_config, self.layout.pipeline),
            next(self.actor.model.parameters()).dtype,
            self.settings.weight_sync.bucket_mib << 20,
            per_stage=per_stage,
        )
