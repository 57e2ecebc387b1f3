"""What generates in a run: the driver, the engines behind it, and the weights they get."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch.distributed as dist

from megatron_policysplit.actor.actor import Actor
from megatron_policysplit.actor.checkpoint import TrainerState
from megatron_policysplit.actor.offload import Offload
from megatron_policysplit.config import Config
from megatron_policysplit.data.response_text import end_token_ids
from megatron_policysplit.data.tokenizer import load_tokenizer
from megatron_policysplit.distributed.agree import raise_on_all_ranks
from megatron_policysplit.distributed.control import Control
from megatron_policysplit.distributed.layout import Layout
from megatron_policysplit.distributed.stop_signal import StopRequested
from megatron_policysplit.rewards import RewardPool
from megatron_policysplit.rollout.build import engine_in_process, sglang_engine
from megatron_policysplit.rollout.collect import request_settings
from megatron_policysplit.rollout.driver import Driver, Leader
from megatron_policysplit.serving.build import build_engines, open_fleet
from megatron_policysplit.serving.colocation import Colocation
from megatron_policysplit.serving.fleet import Fleet
from megatron_policysplit.weight_sync import WeightSync, sync_settings
from megatron_policysplit.weight_sync.in_process import load_in_process


class Generation:
    """Generation, as the trainer sees it. Every method is collective over all ranks.

    With a fleet it implements `control.Service`: while leaders generate, an engine that came back
    gets the actor's weights.
    """

    def __init__(
        self,
        config: Config,
        layout: Layout,
        control: Control,
        actor: Actor,
        state: TrainerState,
        leader: Leader | None,
        fleet: Fleet | None = None,
    ):
        """Put the parts together.

        leader: on the leaders of replicas, None elsewhere.
        fleet: with rollout.engine=sglang; else the leader's engine is in this process.
        """
        self.layout, self.control, self.actor, self.state = layout, control, actor, state
        self.leader, self.fleet = leader, fleet
        self.colocation = None if fleet is None else fleet.colocation
        self.driver = Driver(
            config.rollout,
            request_settings(config.rollout, config.modes, config.run.seed),
            layout,
            control,
            leader,
            service=None if fleet is None else self,
        )
        self.served = -1  # the weight version that the engines were given last

    def sync(self, *, again: bool = False) -> None:
        """Give the engines the actor's weights, unless they have this version; `again`: even then.

        Engines on the actor's own GPUs get theirs in `awake`.
        """
        if self.colocation is not None:
            return
        if again or self.served != self.state.weight_version:
            self._sync()

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Generation is possible inside.

        Engines on the actor's own GPUs take the memory and the weights, and afterwards the actor
        takes them back.
        """
        if self.colocation is None:
            yield
            return
        if not self.colocation.engines_turn:
            self.colocation.to_generation()
        self._sync()  # what an engine released is lost, so that its turn begins with a load
        try:
            yield
        except StopRequested:
            self.fleet.give_up_starting()
            self.sleep()
            raise
        self.sleep()

    def sleep(self) -> None:
        """Give the actor the memory of its GPUs back, if engines have it."""
        if self.colocation is not None and self.colocation.engines_turn:
            self.colocation.to_training()

    def engine_log_probs(self, sequences: Sequence) -> list[list[float]]:
        """`Engine.log_probs` on leaders, [] on other ranks."""
        with self.awake():
            self.layout.barrier()
            work = None if self.leader is None else self.leader.engine.log_probs(sequences)
            return self.control.attend(work, self.driver.service) or []

    def wanted(self) -> bool:
        """Whether an engine of this rank lacks weights (this rank's own answer)."""
        return self.fleet.wanted()

    def serve(self) -> None:
        """RESYNC: the actor's weights for engines that lack them, while the others go on.

        With rollout.overlap the actor may be a version ahead of the engines; what it has now is
        what it can give.
        """
        self.fleet.resync(self.state.weight_version)
        self._expect(self.state.weight_version)

    def _sync(self) -> None:
        version = self.state.weight_version
        if self.fleet is not None:
            self.fleet.sync(version)
            self._expect(version)
        else:
            load_in_process(self.actor, self.leader and self.leader.engine, version)
        self.served = version

    def _expect(self, version: int) -> None:
        """A leader's engine expects answers from these weights, or older ones if they may be."""
        if self.leader is not None:
            self.leader.engine.serve_version(version)


def build_generation(
    config: Config,
    layout: Layout,
    control: Control,
    actor: Actor,
    state: TrainerState,
    message: Callable[[str], None],
    resources: ExitStack,
) -> Generation:
    """Start what generates (collective over all ranks); `resources` takes it down again.

    Raises a UserError on every rank if anything cannot be started; StopRequested.
    """
    fleet, url = None, None
    if config.rollout.engine == "sglang":
        fleet = build_fleet(config, layout, control, actor, message, resources)
        url = open_fleet(fleet, layout, control, resources)
    leader = raise_on_all_ranks(
        layout.world, lambda: _leader(config, url) if layout.is_leader else None
    )
    if leader is not None:
        resources.callback(leader.rewards.close)
        if fleet is not None:
            resources.callback(lambda: control.run(leader.engine.aclose()))
    return Generation(config, layout, control, actor, state, leader, fleet)


def build_fleet(
    config: Config,
    layout: Layout,
    control: Control,
    actor: Actor,
    message: Callable[[str], None],
    resources: ExitStack,
) -> Fleet:
    """The SGLang engines of the run, not started yet, and their weight sync.

    With rollout.colocated the actor's GPUs are free afterwards: servers start with all of their
    memory.
    """
    engines = raise_on_all_ranks(layout.world, lambda: build_engines(config, layout))
    colocation, options = None, {}
    if config.rollout.colocated:
        offload = Offload(actor.ddp, actor.optimizer)
        start_seconds = config.rollout.server.start_seconds
        colocation = Colocation(
            offload, engines.members, control, layout, start_seconds=start_seconds
        )
        options = {
            "before_load": colocation.before_load,
            "after_load": colocation.after_load,
            "read": offload.read,
        }
    weights = WeightSync(
        sync_settings(config),
        layout,
        control,
        actor,
        engines.placements,
        engines.members,
        **options,
    )
    resources.callback(weights.close)
    if colocation is not None:
        colocation.to_generation()
    log = message if layout.is_chief else _to_stderr
    server = config.rollout.server
    return Fleet(server, layout, control, engines, weights, log, colocation=colocation)


def _to_stderr(text: str) -> None:
    """What another rank than the chief has to say of the engines that it owns."""
    print(f"rank {dist.get_rank()}: {text}", file=sys.stderr, flush=True)


def _leader(config: Config, url: str | None) -> Leader:
    """What a replica's leader generates and grades with; url: of the servers, if there are any."""
    tokenizer = load_tokenizer(config.model.path)
    reward = config.reward
    rewards = RewardPool(reward.function, reward.workers, reward.timeout_seconds)
    if url is None:
        engine = engine_in_process(config.model, config.rollout, tokenizer)
    else:
        engine = sglang_engine(config.model, config.rollout, url, tokenizer)
    return Leader(engine, rewards, tokenizer, end_token_ids(config.model.path, tokenizer))
