"""The training loop: generate, grade, share, score, update, sync, log, evaluate, save."""

from __future__ import annotations

import gc
from collections.abc import Sequence

from megatron_policysplit.actor import checkpoint
from megatron_policysplit.actor.checkpoint_files import checkpoint_path
from megatron_policysplit.algorithms.signals import live_rows, scored_rows
from megatron_policysplit.config import Config
from megatron_policysplit.config.modes import modes_of
from megatron_policysplit.distributed.device import peak_memory_bytes
from megatron_policysplit.distributed.stop_signal import StopRequested, StopSignal
from megatron_policysplit.errors import DONE, STOPPED, TrainingError
from megatron_policysplit.evaluation.verdicts import judge_metrics, with_verdicts
from megatron_policysplit.logs.timing import Phases
from megatron_policysplit.rollout.staleness import check_staleness, staleness_metrics
from megatron_policysplit.rows import Mode, Rollout, Row, share_rollouts
from megatron_policysplit.training import run as runs
from megatron_policysplit.training.agreement.diagnosis import Probe
from megatron_policysplit.training.agreement.gate import AgreementGate
from megatron_policysplit.training.build import start
from megatron_policysplit.training.metrics import (
    evaluation_metrics,
    prompt_metrics,
    training_metrics,
)
from megatron_policysplit.training.rollout_batch import PendingBatch


class Trainer:
    """One rank's view of a run. Every method is collective over all ranks."""

    def __init__(self, config: Config, stop: StopSignal):
        self.config = config
        self.run = run = start(config, stop)
        probe = Probe(run.layout, run.actor, run.engine_log_probs, self.resync)
        self.gate = AgreementGate.of(config, probe, run.log)
        self.ahead: PendingBatch | None = (
            None  # with rollout.overlap, the batch that is generated while one is trained
        )

    def train(self) -> int:
        """Train to `train.steps`; returns DONE, or STOPPED after a signal (state saved)."""
        run, config = self.run, self.config
        gc.collect()
        # A million objects of the libraries, which collections in the middle of steps need not
        # visit again.
        gc.freeze()
        try:
            self.sync()
            self.evaluate_and_save()
            while run.state.step < config.train.steps:
                self.step()
                self.evaluate_and_save()
            if config.checkpoint.hugging_face:
                run.export("hf")
            return DONE
        except StopRequested:
            self._forget_ahead()
            self.save()
            run.log.message(
                f"stopped by a signal after step {run.state.step}; run the same command to go on"
            )
            return STOPPED
        finally:
            gc.unfreeze()
            self._forget_ahead()
            run.close()

    def step(self) -> None:
        """One rollout batch. Nothing of the run's state changes before its update.

        With rollout.overlap the engines get the weights that this batch is about to change, and
        generate the next batch with them meanwhile: its samples are one version behind when it is
        trained (importance weights correct).
        """
        run, config, phases = self.run, self.config, Phases()
        batch, batch_version = run.state.step, run.state.weight_version
        with phases.measure("step"):
            with run.engines_awake():
                asked, self.ahead = self.ahead or self.ask(batch), None
                rollouts = asked.finish(phases)
            check_staleness(rollouts, batch_version, config.rollout)
            if config.rollout.overlap and batch + 1 < config.train.steps:
                self.sync(phases)
                self.ahead = self.ask(batch + 1)
            rows = share_rollouts(rollouts, run.prompts, run.training_modes)
            live = live_rows(rows, run.algorithm, config)
            scored = scored_rows(rows, live, run.algorithm, config)
            due = self.gate.due(batch)
            compared = [
                due and row.on_policy and not there for row, there in zip(rows, scored, strict=True)
            ]
            with phases.measure("score"):
                seed = config.run.seed * 1_000_003 + batch
                placed = run.actor.place(rows, live, seed, scored=scored, compared=compared)
                old = run.actor.log_probs(placed)
                reference = (
                    run.actor.reference_log_probs(placed) if config.algorithm.kl_coef > 0 else None
                )
            agreement = self.gate.check(batch, rows, old, batch_version, run.served)
            # Replicas score for different times, and the control group does not wait long.
            run.layout.barrier()
            run.control.check()  # a stop signal need not wait for the longest phase
            with phases.measure("update"):
                signals = run.signals(rows, old, placed.plan, reference)
                update = run.actor.update(placed, signals)
            run.state.method = run.layout.broadcast_from_chief(signals and signals.state)
            run.state.step += 1
            run.state.stream = asked.cursor
            run.state.optimizer_steps = run.actor.optimizer.steps_taken
            run.state.weight_version += 1
            if not config.rollout.overlap:
                self.sync(phases)
        run.state.bad_steps += update.bad_steps
        run.state.bad_steps_in_a_row = run.state.bad_steps_in_a_row + 1 if update.bad_steps else 0
        memory = run.layout.all_reduce_max(peak_memory_bytes())
        if run.layout.is_chief:
            metrics = (
                training_metrics(rows, old, live)
                | update.named()
                | _speed(rows, live, scored, asked, phases)
            )
            metrics |= agreement | staleness_metrics(rollouts, batch_version) | signals.metrics()
            metrics |= {"actor/unscored_rows": float(len(scored) - sum(scored))}
            metrics |= {
                "memory/peak_gib": memory / 2**30,
                "actor/bad_steps_total": float(run.state.bad_steps),
            }
            run.log.log(run.state.step, metrics | asked.metrics)
            run.log.rollouts(run.state.step, run.records([*rollouts, *asked.unused]))
        self._stop_if_bad(rollouts)

    def evaluate_and_save(self) -> None:
        """What is due after the batches trained so far, at the start of a run and at its end too.

        An evaluation that a stop signal interrupted is due again when the run goes on.
        """
        state, config = self.run.state, self.config
        at_end = state.step == config.train.steps
        if state.evaluated < state.step and (
            state.step == 0 or at_end or _due(state.step, config.eval.every)
        ):
            self.evaluate()
            state.evaluated = state.step
        if state.step > 0 and (at_end or _due(state.step, config.checkpoint.every)):
            self.save()

    def ask(self, batch: int) -> PendingBatch:
        """Start to generate the next batch of questions."""
        return PendingBatch(self.run, batch)

    def sync(self, phases: Phases | None = None) -> None:
        """Give the engines the actor's weights, unless they have them."""
        with (phases or Phases()).measure("sync"):
            self.run.load_engines(self.run.state.weight_version)

    def resync(self) -> None:
        """Give the engines the actor's weights, whatever they have; the gate does so before it ends
        the run.
        """
        self._forget_ahead()
        self.run.load_engines(self.run.state.weight_version, again=True)

    def _forget_ahead(self) -> None:
        if self.ahead is not None:
            self.ahead.cancel()
            self.ahead = None

    def evaluate(self) -> None:
        """Sample every evaluation question in all modes and under eval.prompts; judge; keep the
        best weights.
        """
        run, phases = self.run, Phases()
        if not run.eval_questions:
            return
        samples = self.config.eval.samples
        if self.ahead is not None:
            self.ahead.finish(Phases())  # it stays as it is; the engines are needed
        self.sync()
        variety, others = self.config.eval.variety, {}
        with phases.measure("eval"):
            modes = modes_of(self.config.modes)
            rollouts, rows, scores = self._answers(run.eval_prompts, modes)
            answers = {
                mode.value: [rollout for rollout in rollouts if rollout.mode == mode]
                for mode in modes
            }
            for name, prompts in run.other_prompts.items():
                answers[name], *sampled = self._answers(prompts, (Mode.NORMAL,))
                if run.layout.is_chief:
                    others |= prompt_metrics(name, *sampled, run.text, samples, variety=variety)
        metrics, verdicts = None, {}
        if run.judging is not None:
            with phases.measure("judge"):
                verdicts = run.judging.verdicts(answers, run.eval_questions, run.text)
        if run.layout.is_chief:
            metrics = (
                evaluation_metrics(rows, scores, run.text, samples, variety=variety)
                | others
                | _seconds(phases)
            )
            metrics |= judge_metrics(verdicts)
            run.log.evaluation(run.state.step, metrics)
            run.log.eval_rollouts(
                run.state.step, with_verdicts(run.eval_records(rollouts), verdicts)
            )
        accuracy = run.layout.broadcast_from_chief(metrics and metrics["eval/normal/accuracy"])
        if accuracy > run.state.best:
            run.state.best = accuracy
            if self.config.checkpoint.hugging_face and run.state.step > 0:
                run.export("best")

    def _answers(
        self, prompts: runs.Prompts, modes: Sequence[Mode]
    ) -> tuple[list[Rollout], list[Row], list]:
        """Graded responses to the evaluation questions under `prompts` in each of `modes`, their
        rows and scores.
        """
        run = self.run
        with run.engines_awake():
            rollouts = run.driver.generate(
                run.state.step,
                run.eval_questions,
                prompts,
                dict.fromkeys(modes, self.config.eval.samples),
                purpose="evaluation",
                phases=Phases(),
            )
        rows = share_rollouts(rollouts, prompts, modes)
        return (
            rollouts,
            rows,
            run.actor.log_probs(run.actor.place(rows, [False] * len(rows), seed=0)),
        )

    def save(self) -> None:
        """Save a checkpoint of the state after the last trained batch, unless it is there already."""
        run, phases = self.run, Phases()
        run.wake_actor()
        if run.layout.broadcast_from_chief(
            checkpoint_path(run.checkpoints, run.state.step).exists()
        ):
            return
        with phases.measure("checkpoint"):
            path = checkpoint.save(
                run.actor, run.state, run.checkpoints, self.config.checkpoint.keep
            )
        run.log.message(f"saved {path} in {phases.seconds['checkpoint']:.1f} s")

    def _stop_if_bad(self, rollouts) -> None:
        """Say that an update was skipped; stop after `train.max_bad_steps` batches in a row, the
        last one dumped.
        """
        run, limit = self.run, self.config.train.max_bad_steps
        if not run.state.bad_steps_in_a_row:
            return
        run.log.message(
            f"step {run.state.step}: the loss or the gradient was not finite; the update was "
            "skipped"
        )
        if run.state.bad_steps_in_a_row >= limit:
            dump = run.directory / f"bad_batch_step_{run.state.step:06d}.jsonl"
            if run.layout.is_chief:
                run.dump(dump, run.records(rollouts))
            raise TrainingError(
                f"the loss or the gradient was NaN or infinite {limit} steps in a row "
                "(train.max_bad_steps); the last "
                f"batch is in {dump}; lower train.learning_rate, or look at the batch"
            )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _seconds(phases: Phases) -> dict[str, float]:
    return {f"time/{name}_s": seconds for name, seconds in phases.seconds.items()}


def _speed(rows, live, scored, asked: PendingBatch, phases: Phases) -> dict[str, float]:
    """Seconds per phase; tokens per second of generation (responses), score (rows scored), update
    (rows trained).
    """
    tokens = {
        "generate": asked.generated_tokens,
        "score": sum(row.length for row, there in zip(rows, scored, strict=True) if there),
        "update": sum(row.length for row, trained in zip(rows, live, strict=True) if trained),
    }
    speed = {
        f"throughput/{name}_tokens_per_s": count / phases.seconds[name]
        for name, count in tokens.items()
    }
    return _seconds(phases) | speed
