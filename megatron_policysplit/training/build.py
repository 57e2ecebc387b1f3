"""Builds a run on every rank: process groups, log, actor, journal, generation, questions."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from checkpoints_conv import read_hf_config
from megatron_policysplit.actor import parallel
from megatron_policysplit.actor.actor import Actor
from megatron_policysplit.actor.attention import attention_kernels
from megatron_policysplit.actor.layers import LayerChoice
from megatron_policysplit.algorithms.methods import build_algorithm
from megatron_policysplit.config import Config
from megatron_policysplit.distributed.control import Control
from megatron_policysplit.distributed.device import (
    slow_head,
    unused_gpu,
    use_deterministic_kernels,
    use_triton,
)
from megatron_policysplit.distributed.environment import described_defaults
from megatron_policysplit.distributed.rank_watch import RankWatch
from megatron_policysplit.distributed.stop_signal import StopSignal
from megatron_policysplit.evaluation.verdicts import EvaluationJudge
from megatron_policysplit.training.generation import build_generation
from megatron_policysplit.training.journal import Journal, open_log
from megatron_policysplit.training.kernels import keep_triton_cache, warm_up_kernels
from megatron_policysplit.training.questions import (
    load_evaluation_questions,
    load_training_questions,
)
from megatron_policysplit.training.run import Run


def build_run(config: Config, stop: StopSignal, watch: RankWatch) -> Run:
    """Build the run, resumed from the newest complete checkpoint in its directory if there is one.

    Collective over all ranks. Raises a UserError for input that cannot be used, the same on every
    rank; StopRequested after a signal during the slow imports or while ranks wait for each other.

    watch: not started yet.
    """
    with ExitStack() as resources, watch.noting():
        layout = parallel.initialize(config.parallel, config.run.seed, stop=stop, watch=watch)
        control = Control(layout.control, stop)
        resources.callback(control.close)
        control.check()

        log = open_log(config, layout)
        resources.callback(log.close)
        judge = None
        if config.eval.judge.url is not None:
            judge = EvaluationJudge(config.eval.judge, layout, control, log.message)

        if config.train.deterministic:
            use_deterministic_kernels()
        if use_triton():
            keep_triton_cache(Path(config.run.dir))
        # The actor comes before the engines: colocated ones start on GPUs that it has left.
        actor = Actor(config, read_hf_config(config.model.path), layout)
        directory = Path(config.run.dir)
        journal = Journal(directory, config.model, config.checkpoint, layout, actor, log)
        for said in (
            unused_gpu(),
            _layers(actor.layers),
            described_defaults(),
            *slow_head(),
        ):
            if said is not None:
                journal.message(said)
        if use_triton():
            nucleus = actor.nucleus_mass is not None
            warm_up_kernels(layout, actor.head, nucleus, journal.message)
        state = journal.state
        generation = build_generation(
            config, layout, control, actor, state, journal.message, resources
        )
        leader, message = generation.leader, journal.message
        questions = load_training_questions(
            config, layout, leader, state.date, state.stream, message
        )
        eval_questions = load_evaluation_questions(config, layout, leader, state.date, message)
        state.stream = questions.cursor
        return Run(
            config=config,
            layout=layout,
            control=control,
            watch=watch,
            algorithm=build_algorithm(config.algorithm),
            actor=actor,
            generation=generation,
            journal=journal,
            questions=questions,
            eval_questions=eval_questions,
            judge=judge,
            resources=resources.pop_all(),
        )


def _layers(choice: LayerChoice) -> str:
    """The layers, why, and what computes attention in them as far as it is known."""
    if choice.transformer_engine:
        return f"{choice}; it chooses its attention in the first pass"
    return f"{choice}; attention by {attention_kernels()}"
