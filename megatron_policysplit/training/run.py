"""Builds a run on every rank: process groups, data, prompts, actor, engine, logs; and takes it down
again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoints_conv import write_hf
from megatron_policysplit.actor.actor import DTYPES, Actor
from megatron_policysplit.actor.checkpoint import TrainerState
from megatron_policysplit.actor.weights import consume_weights
from megatron_policysplit.algorithms.methods import Algorithm
from megatron_policysplit.algorithms.modes import samples_per_mode, training_modes
from megatron_policysplit.algorithms.signals import SignalBuilder
from megatron_policysplit.config import Config
from megatron_policysplit.data.questions import Question, QuestionStream
from megatron_policysplit.distributed.control import Control
from megatron_policysplit.distributed.layout import Layout
from megatron_policysplit.distributed.stop_signal import StopRequested
from megatron_policysplit.evaluation.verdicts import EvaluationJudge
from megatron_policysplit.rollout.driver import Driver, Leader
from megatron_policysplit.rows import Mode, Rollout
from megatron_policysplit.serving.colocation import Colocation
from megatron_policysplit.serving.fleet import Fleet
from megatron_policysplit.training.records import rollout_records
from megatron_policysplit.weight_sync.in_process import load_in_process

Prompts = dict[int, dict[Mode, list[int]]]


@dataclass
class Run:
    """Everything the trainer works with. Prompts are held on leaders only; questions on every rank.

    fleet: with rollout.engine=sglang. colocation: with rollout.colocated. served: weight version
    that the engines were given last. other_prompts: of eval.prompts, name -> evaluation question ->
    NORMAL -> prompt ids. judging: with eval.judge.url.
    """

    config: Config
    layout: Layout
    control: Control
    actor: Actor
    algorithm: Algorithm
    driver: Driver
    leader: Leader | None
    log: Any
    stream: QuestionStream
    questions: Mapping[int, Question]
    prompts: Prompts
    eval_questions: Sequence[Question]
    eval_prompts: Prompts
    state: TrainerState
    other_prompts: Mapping[str, Prompts] = field(default_factory=dict)
    judging: EvaluationJudge | None = None
    fleet: Fleet | None = None
    colocation: Colocation | None = None
    served: int = -1
    resources: ExitStack = field(default_factory=ExitStack)

    @property
    def directory(self) -> Path:
        return Path(self.config.run.dir)

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    @property
    def samples_per_mode(self) -> Mapping[Mode, int]:
        return samples_per_mode(self.config, self.algorithm.method)

    @property
    def training_modes(self) -> Sequence[Mode]:
        return training_modes(self.config, self.algorithm.method)

    def signals(self, rows, old, plan, reference) -> SignalBuilder | None:
        """What to train the current batch with (leaders only; None elsewhere)."""
        if self.leader is None:
            return None
        state, seed = self.state.method or None, self.config.run.seed * 1_000_003 + self.state.step
        return SignalBuilder(
            rows,
            old,
            plan,
            self.algorithm,
            self.config,
            state=state,
            reference=reference,
            seed=seed,
        )

    def text(self, rollout: Rollout) -> str:
        """A response as text (leaders only)."""
        return self.leader.text(rollout)

    def records(self, rollouts: Sequence[Rollout]) -> list[dict[str, Any]]:
        """Rollouts of training questions for a dump (leaders only)."""
        return self._records(rollouts, self.questions, self.prompts)

    def eval_records(self, rollouts: Sequence[Rollout]) -> list[dict[str, Any]]:
        """Rollouts of evaluation questions for a dump (leaders only)."""
        return self._records(
            rollouts, {question.id: question for question in self.eval_questions}, self.eval_prompts
        )

    def _records(
        self, rollouts: Sequence[Rollout], questions: Mapping[int, Question], prompts: Prompts
    ):
        tokenizer = self.leader.tokenizer
        text = {
            id: tokenizer.decode(prompts[id][Mode.NORMAL])
            for id in {rollout.question for rollout in rollouts}
        }
        return rollout_records(rollouts, questions, text, self.text)

    def load_engines(self, version: int, *, again: bool = False) -> None:
        """Give the engines the actor's weights, unless they have this version (collective over all
        ranks).

        again: even if they have it. Engines on the actor's own GPUs get theirs in `engines_awake`.
        """
        if self.colocation is not None or (version == self.served and not again):
            return
        self._load(version)

    @contextmanager
    def engines_awake(self) -> Iterator[None]:
        """Generation is possible inside (collective over all ranks).

        Engines on the actor's own GPUs take the memory and the weights, and afterwards the actor
        takes them back.
        """
        if self.colocation is None:
            yield
            return
        if not self.colocation.engines_turn:
            self.colocation.to_generation()
        self._load(self.state.weight_version)
        try:
            yield
        except StopRequested:
            self.fleet.give_up_starting()
            self.wake_actor()
            raise
        self.wake_actor()

    def wake_actor(self) -> None:
        """Give the actor the memory of its GPUs back, if engines have it (collective over all
        ranks).
        """
        if self.colocation is not None and self.colocation.engines_turn:
            self.colocation.to_training()

    def engine_log_probs(self, sequences: Sequence) -> list[list[float]]:
        """`Engine.score` on leaders, [] on other ranks (collective over all ranks)."""
        with self.engines_awake():
            self.layout.barrier()
            work = self.leader.engine.log_probs(sequences) if self.leader is not None else None
            return self.control.attend(work, self.fleet) or []

    def tell_version(self, version: int) -> None:
        """Have a leader's SGLang engine expect answers from these weights (and older ones as far as
        is allowed).
        """
        if self.leader is not None:
            self.leader.engine.serve_version(version)

    def _load(self, version: int) -> None:
        if self.fleet is not None:
            self.fleet.sync(version)
            self.tell_version(version)
        else:
            load_in_process(self.actor, self.leader and self.leader.engine, version)
        self.served = version

    def export(self, name: str) -> None:
        """Write the weights as a Hugging Face directory `run.dir/name` (collective over all ranks)."""
        if not self.layout.is_exported:
            return
        config = self.config

        def take(stream) -> None:
            if self.layout.is_chief:
                write_hf(
                    self.directory / name, config.model.path, stream, DTYPES[config.model.dtype]
                )

        destination = "leader" if self.layout.data_rank == 0 else "nowhere"
        consume_weights(self.actor.model, self.actor.hf_config, destination, take)

    def dump(self, path: Path, records: Sequence[dict]) -> None:
        partial = path.with_name(path.name + ".partial")
        partial.write_text(
            "".join(json.dumps(record) + "\n" for record in records), encoding="utf-8"
        )
        os.replace(partial, path)

    def close(self) -> None:
        self.resources.close()
