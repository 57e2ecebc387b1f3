"""Builds a run on every rank: process groups, data, prompts, actor, engines, logs."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from checkpoints_conv import read_hf_config
from megatron_policysplit.actor import checkpoint, parallel
from megatron_policysplit.actor.actor import Actor
from megatron_policysplit.actor.checkpoint import TrainerState
from megatron_policysplit.actor.checkpoint_files import complete
from megatron_policysplit.actor.offload import Offload
from megatron_policysplit.algorithms.methods import build_algorithm
from megatron_policysplit.config import Config
from megatron_policysplit.config.load import to_dict
from megatron_policysplit.data.prompts import PromptBuilder, read_eval_prompts
from megatron_policysplit.data.questions import (
    Question,
    QuestionStream,
    drop_overlong,
    load_questions,
)
from megatron_policysplit.data.tokenizer import load_tokenizer
from megatron_policysplit.distributed.agree import _agreed
from megatron_policysplit.distributed.control import Control
from megatron_policysplit.distributed.device import missing_triton, use_triton
from megatron_policysplit.distributed.layout import Layout
from megatron_policysplit.distributed.stop_signal import StopSignal
from megatron_policysplit.errors import ConfigError
from megatron_policysplit.evaluation.verdicts import EvaluationJudge
from megatron_policysplit.logs import Logger
from megatron_policysplit.rewards import RewardPool
from megatron_policysplit.rollout.build import engine_in_process, sglang_engine
from megatron_policysplit.rollout.driver import Driver, Leader
from megatron_policysplit.rows import Mode
from megatron_policysplit.serving.build import build_fleet, open_fleet, place
from megatron_policysplit.serving.colocation import Colocation
from megatron_policysplit.serving.fleet import Fleet
from megatron_policysplit.training.run import Prompts, Run
from megatron_policysplit.weight_sync.sync import WeightSync


class SilentLog:
    """The log of ranks that do not log."""

    def start(self, step: int) -> None:
        pass

    def message(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


def start(config: Config, stop: StopSignal) -> Run:
    """Build the run, resumed from the newest complete checkpoint in its directory if there is one.

    Collective over all ranks. Raises a UserError for input that cannot be used, the same on every
    rank; StopRequested after a signal during the slow imports.
    """
    with ExitStack() as resources:
        run = _build(config, stop, resources)
        run.resources = resources.pop_all()
        return run


def _build(config: Config, stop: StopSignal, resources: ExitStack) -> Run:
    layout = parallel.initialize(config.parallel, config.run.seed)
    control = Control(layout.control, stop)
    resources.callback(control.close)
    control.check()

    log = _agreed(layout, lambda: _log(config, layout))
    resources.callback(log.close)
    judging = (
        EvaluationJudge(config.eval.judge, layout, control, log.message)
        if config.eval.judge.url is not None
        else None
    )

    hf_config = read_hf_config(config.model.path)
    actor = Actor(config, hf_config, layout)
    found = complete(Path(config.run.dir) / "checkpoints")
    found = layout.broadcast_from_chief(found[-1] if found else None)
    state = checkpoint.load(actor, found) if found else TrainerState()
    _agreed(layout, lambda: log.start(state.step))
    if found:
        log.message(f"resumed from {found}")
    if (slower := missing_triton()) is not None:
        log.message(slower)
    elif use_triton() and actor.asked["nucleus"] is not None:
        log.message(
            f"the LM head is computed in plain torch: algorithm.name={config.algorithm.name} needs "
            "its logits"
        )

    state.date = layout.broadcast_from_chief(state.date or datetime.date.today().isoformat())
    fleet, url = None, None
    if config.rollout.engine == "sglang":
        fleet, url = _fleet(config, layout, control, actor, log, resources)
    leader = _agreed(layout, lambda: _leader(config, url) if layout.is_leader else None)
    builder = None
    if leader is not None:
        resources.callback(leader.rewards.close)
        if fleet is not None:
            resources.callback(lambda: control.run(leader.engine.aclose()))
        builder = PromptBuilder(leader.tokenizer, config.modes, date=state.date)

    questions, prompts, dropped = _questions(
        config.data.path, config.data.options, config, layout, builder
    )
    if dropped:
        log.message(
            f"dropped {dropped} questions whose prompt exceeds {config.data.max_prompt_tokens} "
            "tokens"
        )
    eval_questions, eval_prompts, other_prompts = [], {}, {}
    if config.eval.path is not None:
        eval_questions, eval_prompts, dropped = _questions(
            config.eval.path, config.eval.options, config, layout, builder
        )
        if dropped:
            log.message(f"dropped {dropped} evaluation questions, as over-long as that")
        eval_questions = eval_questions[: config.eval.questions]
        other_prompts = _agreed(
            layout, lambda: _other_prompts(config, eval_questions, leader, state.date)
        )

    stream = QuestionStream(questions, config.data.batch_questions, config.run.seed)
    if state.stream:
        stream.restore(state.stream)
    state.stream = stream.state()
    run = Run(
        config=config,
        layout=layout,
        control=control,
        actor=actor,
        algorithm=build_algorithm(config.algorithm),
        driver=Driver(config, layout, control, leader, fleet),
        leader=leader,
        log=log,
        stream=stream,
        questions={question.id: question for question in questions},
        prompts=prompts,
        eval_questions=eval_questions,
        eval_prompts=eval_prompts,
        state=state,
        other_prompts=other_prompts,
        judging=judging,
        fleet=fleet,
        colocation=fleet and fleet.colocation,
    )
    if fleet is not None:
        fleet.actor_version, fleet.tell_version = lambda: state.weight_version, run.tell_version
    return run


def _fleet(
    config: Config, layout: Layout, control: Control, actor: Actor, log: Any, resources: ExitStack
) -> tuple[Fleet, str]:
    """SGLang engines, ready but without the run's weights, and the address that requests go to."""
    placements = _agreed(layout, lambda: place(config, layout))
    fleet = _agreed(layout, lambda: build_fleet(config, layout, control, placements, log.message))
    options = {}
    if config.rollout.colocated:
        offload = Offload(actor.ddp, actor.optimizer, actor.reference or ())
        server = config.rollout.server
        fleet.colocation = Colocation(
            offload, fleet.members, control, layout, start_seconds=server.start_seconds
        )
        options = {
            "before_load": fleet.colocation.before_load,
            "after_load": fleet.colocation.after_load,
            "read": offload.read,
        }
    fleet.weights = WeightSync(config, layout, control, actor, placements, fleet.members, **options)
    resources.callback(fleet.weights.close)
    if fleet.colocation is not None:
        fleet.colocation.to_generation()  # servers start with all of their memory
    return fleet, open_fleet(fleet, layout, control, resources)


def _log(config: Config, layout: Layout) -> Any:
    if not layout.is_chief:
        return SilentLog()
    return Logger(config.log, config.run.dir, config.train.steps, to_dict(config))


def _leader(config: Config, url: str | None) -> Leader:
    tokenizer = load_tokenizer(config.model.path)
    rewards = RewardPool(
        config.reward.function, config.reward.workers, config.reward.timeout_seconds
    )
    if url is None:
        return Leader(engine_in_process(config, tokenizer), rewards, tokenizer)
    return Leader(sglang_engine(config, url, tokenizer), rewards, tokenizer)


def _questions(
    path: str, options: Mapping, config: Config, layout: Layout, builder: PromptBuilder | None
) -> tuple[list[Question], Prompts, int]:
    """Questions that fit, their prompts (on leaders) and how many were dropped; the same on every
    rank.
    """
    questions = load_questions(path, options)
    prompts: Prompts = {}

    def build_and_drop() -> list[int]:
        if builder is None:
            return []
        prompts.update({question.id: builder.build(question.messages) for question in questions})
        lengths = {
            id: {mode: len(ids) for mode, ids in modes.items()} for id, modes in prompts.items()
        }
        return [q.id for q in drop_overlong(questions, lengths, config.data.max_prompt_tokens)[0]]

    kept = layout.broadcast_from_chief(_agreed(layout, build_and_drop))
    if len(kept) < config.data.batch_questions and path == config.data.path:
        raise ConfigError(
            f"data.batch_questions={config.data.batch_questions} is more than the {len(kept)} "
            f"questions of {path} "
            f"that fit data.max_prompt_tokens={config.data.max_prompt_tokens}; lower the one or "
            "raise the other"
        )
    wanted = set(kept)
    return (
        [question for question in questions if question.id in wanted],
        prompts,
        len(questions) - len(kept),
    )


def _other_prompts(
    config: Config, questions: Sequence[Question], leader: Leader | None, date: str
) -> dict[str, Prompts]:
    """The evaluation questions' prompts under each of eval.prompts; without ids on ranks that are
    no leader.
    """
    texts = read_eval_prompts(config.eval.prompts, config.modes)
    result: dict[str, Prompts] = {name: {} for name in texts}
    for name, text in texts.items() if leader is not None else ():
        modes = replace(
            config.modes, high_entropy_prompt=text, high_entropy_prompt_file=None, others={}
        )
        builder = PromptBuilder(leader.tokenizer, modes, date=date)
        for question in questions:
            ids = builder.build(question.messages)[Mode.HIGH_ENTROPY]
            if len(ids) > config.data.max_prompt_tokens:
                raise ConfigError(
                    f"eval.prompts.{name} makes a prompt of {len(ids)} tokens, more than "
                    "data.max_prompt_tokens="
                    f"{config.data.max_prompt_tokens}; shorten it or raise that"
                )
            result[name][question.id] = {Mode.NORMAL: ids}
    return result
