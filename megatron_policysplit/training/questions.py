"""The questions of a run and their prompts: those that are trained, and those of evaluations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_policysplit.config import Config, DataConfig
from megatron_policysplit.data.prompts import PromptBuilder, Prompts, read_eval_prompts
from megatron_policysplit.data.questions import Question, QuestionStream, load_questions
from megatron_policysplit.distributed.agree import raise_on_all_ranks
from megatron_policysplit.distributed.layout import Layout
from megatron_policysplit.logs.progress import show_progress
from megatron_policysplit.rollout.driver import Leader
from megatron_policysplit.rows import Mode, Rollout
from megatron_policysplit.training.prompt_check import (
    build_other_prompts,
    check_batch,
    fitting_questions,
    prompt_builder,
)
from megatron_policysplit.training.records import rollout_records


@dataclass
class QuestionSet:
    """Questions that fit data.max_prompt_tokens in every mode."""

    questions: Mapping[int, Question] = field(default_factory=dict)  # by id, on every rank
    prompts: Prompts = field(default_factory=dict)  # on leaders; {} elsewhere

    def records(self, rollouts: Sequence[Rollout], leader: Leader) -> list[dict[str, Any]]:
        """Rollouts of these questions for a dump (leaders only)."""
        decode = leader.tokenizer.decode
        ids = {rollout.question for rollout in rollouts}
        texts = {id: decode(self.prompts[id][Mode.NORMAL]) for id in ids}
        return rollout_records(rollouts, self.questions, texts, leader.text)


@dataclass
class TrainingQuestions(QuestionSet):
    """The questions that are trained, and the order in which batches are drawn from them."""

    stream: QuestionStream | None = None

    def draw(self) -> list[Question]:
        """The next batch's questions; the same on every rank."""
        return self.stream.next_batch()

    @property
    def cursor(self) -> dict[str, int]:
        """Where the stream stands, for a checkpoint."""
        return self.stream.state()


@dataclass
class EvaluationQuestions(QuestionSet):
    """The questions of evaluations; none without eval.path."""

    # Of eval.prompts: name -> question id -> NORMAL -> prompt ids; without ids on other ranks.
    other_prompts: dict[str, Prompts] = field(default_factory=dict)


def load_training_questions(
    config: Config,
    layout: Layout,
    leader: Leader | None,
    date: str,
    cursor: Mapping[str, int],
    message: Callable[[str], None],
) -> TrainingQuestions:
    """The questions of data.path (collective over all ranks).

    date: that chat templates are pinned to. cursor: where the stream goes on; {} for a fresh run.
    Raises a UserError on every rank for data that cannot be used.
    """
    data = config.data
    builder = _prompt_builder(config, leader, date)
    fitting, dropped = _load_fitting(data.path, data.options, data, layout, builder)
    check_batch(data, len(fitting.questions))
    if dropped:
        message(f"dropped {dropped} questions whose prompt exceeds {data.max_prompt_tokens} tokens")
    questions = list(fitting.questions.values())
    stream = QuestionStream(questions, data.batch_questions, config.run.seed)
    if cursor:
        stream.restore(dict(cursor))
    return TrainingQuestions(fitting.questions, fitting.prompts, stream)


def load_evaluation_questions(
    config: Config,
    layout: Layout,
    leader: Leader | None,
    date: str,
    message: Callable[[str], None],
) -> EvaluationQuestions:
    """The first eval.questions questions of eval.path, as `load_training_questions` loads them."""
    settings = config.eval
    if settings.path is None:
        return EvaluationQuestions()
    builder = _prompt_builder(config, leader, date)
    fitting, dropped = _load_fitting(settings.path, settings.options, config.data, layout, builder)
    if dropped:
        message(f"dropped {dropped} evaluation questions, as over-long as that")
    questions = dict(list(fitting.questions.items())[: settings.questions])
    other_prompts = raise_on_all_ranks(
        layout.world, lambda: _other_prompts(config, list(questions.values()), leader, date)
    )
    return EvaluationQuestions(questions, fitting.prompts, other_prompts)


def _prompt_builder(config: Config, leader: Leader | None, date: str) -> PromptBuilder | None:
    if leader is None:
        return None
    return prompt_builder(config, config.modes, leader.tokenizer, date)


def _load_fitting(
    path: str,
    options: Mapping[str, Any],
    data: DataConfig,
    layout: Layout,
    builder: PromptBuilder | None,
) -> tuple[QuestionSet, int]:
    """The questions that fit, and how many were dropped; the same on every rank."""
    questions = load_questions(path, options)
    prompts: Prompts = {}

    def build_and_drop() -> list[int]:
        if builder is None:
            return []
        what = f"questions of {path} have their prompts"
        with show_progress(what, len(questions), is_shown=layout.is_chief) as advance:
            prompts.update(builder.build_all(questions, advance, source=path))
        return [question.id for question in fitting_questions(questions, prompts, data)]

    fitting = raise_on_all_ranks(layout.world, build_and_drop)
    fitting = set(layout.broadcast_from_chief(fitting))
    by_id = {question.id: question for question in questions if question.id in fitting}
    return QuestionSet(by_id, prompts), len(questions) - len(fitting)


def _other_prompts(
    config: Config, questions: Sequence[Question], leader: Leader | None, date: str
) -> dict[str, Prompts]:
    """The questions' prompts under each of eval.prompts, by name."""
    if leader is None:
        return {name: {} for name in read_eval_prompts(config.eval.prompts, config.modes)}
    return build_other_prompts(config, questions, leader.tokenizer, date)
