"""What a run consists of on one rank, and what is taken down with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from megatron_policysplit.actor.actor import Actor
from megatron_policysplit.actor.checkpoint import TrainerState
from megatron_policysplit.algorithms.methods import Algorithm
from megatron_policysplit.algorithms.modes import samples_per_mode, training_modes
from megatron_policysplit.config import Config
from megatron_policysplit.distributed.control import Control
from megatron_policysplit.distributed.layout import Layout
from megatron_policysplit.distributed.rank_watch import RankWatch
from megatron_policysplit.evaluation.verdicts import EvaluationJudge
from megatron_policysplit.rollout.driver import Leader
from megatron_policysplit.rows import Mode
from megatron_policysplit.training.generation import Generation
from megatron_policysplit.training.journal import Journal
from megatron_policysplit.training.questions import EvaluationQuestions, TrainingQuestions


@dataclass(frozen=True)
class Run:
    """Everything the trainer works with on one rank. Made by `build.build_run`."""

    config: Config
    layout: Layout
    control: Control
    watch: RankWatch  # of the other ranks
    algorithm: Algorithm
    actor: Actor  # scores rows and trains on them
    generation: Generation  # has questions answered
    journal: Journal  # writes down, and holds the state that a checkpoint has
    questions: TrainingQuestions
    eval_questions: EvaluationQuestions
    judge: EvaluationJudge | None  # with eval.judge.url
    resources: ExitStack  # what has to be taken down in the end

    @property
    def state(self) -> TrainerState:
        """Where the run stands."""
        return self.journal.state

    @property
    def leader(self) -> Leader | None:
        """What a replica's leader generates and grades with; None on other ranks."""
        return self.generation.leader

    @property
    def samples_per_mode(self) -> Mapping[Mode, int]:
        """Responses to a question by sampling mode."""
        return samples_per_mode(self.config.rollout, self.config.modes, self.algorithm.method)

    @property
    def training_modes(self) -> Sequence[Mode]:
        """The modes under whose prompts every response is trained."""
        return training_modes(self.config.modes, self.algorithm.method)

    def seed(self, batch: int) -> int:
        """The seed of what is drawn at random for the batch after `batch` trained ones."""
        return self.config.run.seed * 1_000_003 + batch

    def close(self) -> None:
        """End what the run started: engines, graders, threads, logs."""
        self.resources.close()
