"""A trainer of one rank whose SGLang engine runs already: what a run builds of it, put together by the same functions.

One process may hold one at a time: Megatron's groups are global.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from checkpoints_conv import read_hf_config
from megatron_policysplit.actor import parallel
from megatron_policysplit.actor.actor import Actor
from megatron_policysplit.actor.weights import load_weights
from megatron_policysplit.config import Config
from megatron_policysplit.data.tokenizer import load_tokenizer
from megatron_policysplit.distributed.control import Control
from megatron_policysplit.distributed.layout import Layout
from megatron_policysplit.distributed.stop_signal import StopSignal
from megatron_policysplit.rollout.build import sglang_engine
from megatron_policysplit.rollout.collect import collect, split_lots
from megatron_policysplit.rollout.engine import Request
from megatron_policysplit.rollout.sglang import SglangEngine
from megatron_policysplit.rows import Rollout
from megatron_policysplit.serving import fleet as fleets
from megatron_policysplit.serving.build import open_fleet
from megatron_policysplit.serving.fleet import Fleet
from megatron_policysplit.serving.members import Member
from megatron_policysplit.training.generation import build_fleet
from tests.support.sglang import Reference

HEARTBEAT_SECONDS = 0.05


@dataclass
class OneRank:
    """reference: source of the weights. said: what the fleet logged."""

    config: Config
    reference: Reference
    actor: Actor
    control: Control
    fleet: Fleet
    engine: SglangEngine
    directory: Path
    said: list[str] = field(default_factory=list)
    version: int = -1  # of the actor's weights

    @property
    def member(self) -> Member:
        return self.fleet.members[0]

    def train(self) -> int:
        """As an optimizer step does, give the actor other weights, and sync them; the new version."""
        self.version += 1
        self.reference.save(self.version, self.directory)
        load_weights(self.actor.model, self.directory)
        self.fleet.sync(self.version)
        self.engine.serve_version(self.version)
        return self.version

    def generate(self, requests: Sequence[Request]) -> list[Rollout]:
        """As the driver does: in lots, engines that come back served meanwhile."""
        lots = iter(split_lots(requests, lot_questions=2))
        work = collect(self.engine, lambda: next(lots, None), concurrency=3)
        rollouts, _ = self.control.attend(work, self)
        return rollouts

    def wanted(self) -> bool:
        return self.fleet.wanted()

    def serve(self) -> None:
        """As a run's rollouts do, for an engine that came back."""
        self.fleet.resync(self.version)
        self.engine.serve_version(self.version)


@contextmanager
def layout_of_one() -> Iterator[Layout]:
    """torch.distributed and Megatron for one rank, on the CPU."""
    from megatron_policysplit.config import ParallelConfig

    try:
        yield parallel.initialize(ParallelConfig(), seed=0)
    finally:
        parallel.shutdown()


@contextmanager
def one_rank(
    layout: Layout, reference: Reference, address: str, directory: Path, transport: str, *, patience: float = 1.0
) -> Iterator[OneRank]:
    """A trainer with the engine at `address`, its weights not synced yet.

    patience: factor on the time limits of what is struck and on the pauses after it; a test's are shorter than a run's.
    """
    config = Config()
    config.run.dir = str(directory)
    config.model.path, config.model.dtype = str(reference.path), "float32"
    config.data.max_prompt_tokens = 64
    config.rollout.engine, config.rollout.addresses = "sglang", [address]
    config.rollout.max_response_tokens, config.rollout.concurrency = 64, 8
    config.rollout.request_seconds = 60.0 * patience
    config.rollout.unavailable_seconds = 1200.0 * patience
    config.rollout.retries = 20  # a busy machine is slow, too
    config.weight_sync.transport, config.weight_sync.bucket_mib = transport, 1
    config.weight_sync.timeout_seconds = 60.0 * patience
    said: list[str] = []
    pauses = {name: getattr(fleets, name) for name in ("TEND_SECONDS", "RETRY_SECONDS")}
    with ExitStack() as resources:
        for name, seconds in pauses.items():
            setattr(fleets, name, seconds * patience)
            resources.callback(setattr, fleets, name, seconds)
        control = Control(layout.control, StopSignal(), HEARTBEAT_SECONDS)
        resources.callback(control.close)
        actor = Actor(config, read_hf_config(reference.path), layout)
        fleet = build_fleet(config, layout, control, actor, said.append, resources)
        url = open_fleet(fleet, layout, control, resources)
        engine = sglang_engine(config.model, config.rollout, url, load_tokenizer(reference.path))
        engine._backoff_seconds *= patience
        resources.callback(lambda: control.run(engine.aclose()))
        weights = directory / "weights_of_the_actor"
        shutil.copytree(reference.path, weights)
        yield OneRank(config, reference, actor, control, fleet, engine, weights, said)
