"""The training loop: rollouts, rewards, rows, log-probs, advantages, update, sync, log."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_policysplit.actor.actor import UpdateMetrics
from megatron_policysplit.actor.layers import transformer_engine_attention
from megatron_policysplit.actor.placed_batch import PlacedBatch
from megatron_policysplit.algorithms.advantages import TokenStatistics
from megatron_policysplit.algorithms.signals import (
    RowSettings,
    SignalBuilder,
    live_rows,
    scored_rows,
)
from megatron_policysplit.distributed.device import peak_memory_bytes
from megatron_policysplit.distributed.stop_signal import StopRequested
from megatron_policysplit.errors import DONE, STOPPED, TrainingError
from megatron_policysplit.logs.timing import Phases
from megatron_policysplit.rollout.staleness import check_staleness, staleness_metrics
from megatron_policysplit.rows import Rollout, Row, share_rollouts
from megatron_policysplit.training.agreement.diagnosis import Probe
from megatron_policysplit.training.agreement.gate import AgreementGate
from megatron_policysplit.training.evaluator import Evaluator
from megatron_policysplit.training.grading_check import GradingCheck
from megatron_policysplit.training.metrics import training_metrics
from megatron_policysplit.training.rollout_batch import PendingBatch
from megatron_policysplit.training.run import Run


@dataclass
class PlacedRows:
    """The rows of a batch and where they are trained; on leaders, but for `placed`."""

    rows: Sequence[Row]
    is_live: Sequence[bool]  # whether a row can change the weights
    is_scored: Sequence[bool]  # whether something reads a row's statistics
    placed: PlacedBatch  # on every rank, as the actor takes it


class Trainer:
    """One rank's view of the training of a run. Every method is collective over all ranks."""

    def __init__(self, run: Run):
        self.run, self.config = run, run.config
        self.row_settings = RowSettings.of(run.config)
        self.grading = GradingCheck(run.layout, run.config.reward.function)
        self.evaluator = Evaluator(run)
        probe = Probe(run.layout, run.actor, run.generation.engine_log_probs, self.resync)
        self.gate = AgreementGate.of(run.config, probe, run.journal)
        self.attention: str | None = None  # what Transformer Engine computes attention with
        # With rollout.overlap, the batch that is generated while the one before is trained.
        self.ahead: PendingBatch | None = None

    def train(self) -> int:
        """Train to `train.steps`; returns DONE, or STOPPED after a signal (state saved)."""
        run, config = self.run, self.config
        gc.collect()
        # The libraries made a million objects, which no collection need visit again.
        gc.freeze()
        if run.state.step >= config.train.steps:
            run.journal.message(
                f"nothing to train: all {run.state.step} steps of train.steps are done; what "
                "belongs to the end is written again"
            )
        try:
            with run.watch.noting():
                return self._train()
        finally:
            gc.unfreeze()
            self._forget_ahead()
            run.close()

    def _train(self) -> int:
        run, config = self.run, self.config
        try:
            self.sync()
            self.evaluate_and_save()
            while run.state.step < config.train.steps:
                self.step()
                self._tell_attention()
                self.evaluate_and_save()
            if config.checkpoint.hugging_face:
                run.journal.export("hf")
            return DONE
        except StopRequested:
            self._forget_ahead()
            self.save()
            run.journal.message(
                f"stopped by a signal after step {run.state.step}; run the same command to go on"
            )
            return STOPPED

    def step(self) -> None:
        """Generate one rollout batch and train on it.

        Nothing of the run's state changes before the update. With rollout.overlap the engines get
        the weights that this batch is about to change, and generate the next batch with them
        meanwhile: its samples are one version behind when it is trained, which importance weights
        correct.
        """
        run, overlap, phases = self.run, self.config.rollout.overlap, Phases()
        step, version = run.state.step, run.state.weight_version
        with phases.measure("step"):
            with run.generation.awake():
                pending, self.ahead = self.ahead or self.ask(step), None
                rollouts = pending.finish(phases)
            self.grading.check(rollouts, f"the batch of step {step + 1}")
            check_staleness(rollouts, version, self.config.rollout)
            if overlap and step + 1 < self.config.train.steps:
                self.sync(phases)
                self.ahead = self.ask(step + 1)

            rows = share_rollouts(rollouts, run.questions.prompts, run.training_modes)
            with phases.measure("score"):
                batch = self.place(rows)
                old, reference = self.log_probs(batch.placed)
            agreement = self.gate.check(step, rows, old, version, run.generation.served)
            # Replicas score for different times, which the control group would not wait for.
            run.layout.barrier()
            run.control.check()  # the last look for a stop signal before the longest phase

            with phases.measure("update"):
                builder, updates = self.signal_builder(batch, old, reference), []
                for k in range(batch.placed.optimizer_steps):
                    current = self.log_probs_before(k, batch.placed)
                    advantages = builder.for_step(k, current)
                    updates.append(run.actor.update(batch.placed, k, advantages))
            self._move_on(pending, builder, updates)
            if not overlap:
                self.sync(phases)
        update = UpdateMetrics.over(updates)
        self._log(pending, rollouts, batch, old, agreement, builder, update, phases)
        self._stop_if_bad(rollouts)

    def ask(self, batch: int) -> PendingBatch:
        """Draw the questions of batch `batch` and start to generate."""
        return PendingBatch(self.run, batch)

    def place(self, rows: Sequence[Row]) -> PlacedRows:
        """Decide which rows are trained and which are scored, and send every replica its own."""
        run, step = self.run, self.run.state.step
        is_live = live_rows(rows, run.algorithm, self.row_settings)
        is_scored = scored_rows(rows, is_live, run.algorithm, self.row_settings)
        # The gate compares engine and actor on rows that the engine sampled. Of those that nothing
        # else would score, it has some scored for itself.
        due = self.gate.due(step)
        is_compared = [
            due and row.on_policy and not scored
            for row, scored in zip(rows, is_scored, strict=True)
        ]
        placed = run.actor.place(
            rows, is_live, run.seed(step), scored=is_scored, compared=is_compared
        )
        return PlacedRows(rows, is_live, is_scored, placed)

    def log_probs(self, placed: PlacedBatch) -> tuple[list[TokenStatistics], list[Tensor] | None]:
        """Statistics of the rows before the update; with kl_coef the initial policy's log-probs."""
        old = self.run.actor.log_probs(placed)
        reference = None
        if self.config.algorithm.kl_coef > 0:
            reference = self.run.actor.reference_log_probs(placed)
        return old, reference

    def log_probs_before(
        self, optimizer_step: int, placed: PlacedBatch
    ) -> dict[int, TokenStatistics] | None:
        """Statistics of a step's rows by the weights as they are, with algorithm.statistics=step.

        None where those of the score pass serve: without that key, and at the first step.
        """
        if self.config.algorithm.statistics != "step" or optimizer_step == 0:
            return None
        return self.run.actor.step_log_probs(placed, optimizer_step)

    def signal_builder(
        self,
        batch: PlacedRows,
        old: Sequence[TokenStatistics],
        reference: Sequence[Tensor] | None,
    ) -> SignalBuilder:
        """What makes advantages and loss weights, one optimizer step after the other."""
        return SignalBuilder(
            batch.rows,
            old,
            batch.placed.plan,
            self.run.algorithm,
            self.row_settings,
            state=self.run.state.method or None,
            reference=reference,
            seed=self.run.seed(self.run.state.step),
        )

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

    def evaluate(self) -> None:
        """Evaluate the weights; keep them as `run.dir/best` if no others were better."""
        if not self.run.eval_questions.questions:
            return
        if self.ahead is not None:
            # An evaluation needs the engines. The batch stays: it is trained after this.
            self.ahead.finish(Phases())
        self.sync()
        accuracy = self.evaluator.evaluate()
        if accuracy > self.run.state.best:
            self.run.state.best = accuracy
            if self.config.checkpoint.hugging_face and self.run.state.step > 0:
                self.run.journal.export("best")

    def save(self) -> None:
        """Save a checkpoint of the state after the last trained batch."""
        # After a stop signal engines on the actor's GPUs may have the memory that saving needs.
        self.run.generation.sleep()
        self.run.journal.save()

    def sync(self, phases: Phases | None = None) -> None:
        """Give the engines the actor's weights, unless they have them."""
        with (phases or Phases()).measure("sync"):
            self.run.generation.sync()

    def resync(self) -> None:
        """Give the engines the actor's weights whatever they have; the gate asks for it."""
        self._forget_ahead()
        self.run.generation.sync(again=True)

    def _forget_ahead(self) -> None:
        if self.ahead is not None:
            self.ahead.cancel()
            self.ahead = None

    def _move_on(self, pending: PendingBatch, builder: SignalBuilder, updates: Sequence) -> None:
        """The state after a trained batch: what a checkpoint taken now would have."""
        run = self.run
        bad_steps = sum(not update.result.stepped for update in updates)
        run.state.method = run.layout.broadcast_from_chief(builder.state)
        run.state.step += 1
        run.state.stream = pending.cursor
        run.state.optimizer_steps = run.actor.optimizer.steps_taken
        run.state.weight_version += 1
        run.state.bad_steps += bad_steps
        run.state.bad_steps_in_a_row = run.state.bad_steps_in_a_row + 1 if bad_steps else 0

    def _tell_attention(self) -> None:
        """Log what Transformer Engine computes attention with, once it is known or has changed."""
        attention = transformer_engine_attention()
        if attention != self.attention:
            self.attention = attention
            self.run.journal.message(f"attention by {attention}")

    def _log(
        self,
        pending: PendingBatch,
        rollouts: Sequence[Rollout],
        batch: PlacedRows,
        old: Sequence[TokenStatistics],
        agreement: dict[str, float],
        builder: SignalBuilder,
        update: UpdateMetrics,
        phases: Phases,
    ) -> None:
        """Metrics and rollouts of a trained batch, on the chief (one all-reduce over the world)."""
        run = self.run
        memory = run.layout.all_reduce_max(peak_memory_bytes())
        if not run.layout.is_chief:
            return
        metrics = training_metrics(batch.rows, old, batch.is_live) | update.named()
        metrics |= _throughput(batch, pending, phases) | agreement
        # The batch was sampled and scored before the update, which made a new version.
        version = run.state.weight_version - 1
        metrics |= staleness_metrics(rollouts, version) | builder.metrics()
        metrics |= {
            "actor/unscored_rows": float(len(batch.is_scored) - sum(batch.is_scored)),
            "memory/peak_gib": memory / 2**30,
            "actor/bad_steps_total": float(run.state.bad_steps),
        }
        metrics |= pending.metrics
        # A write that fails here is this rank's alone: the others learn of it by its note.
        records = run.questions.records([*rollouts, *pending.unused], run.leader)
        run.journal.log.log(run.state.step, metrics)
        run.journal.log.rollouts(run.state.step, records)

    def _stop_if_bad(self, rollouts: Sequence[Rollout]) -> None:
        """Say that an update was skipped; stop after train.max_bad_steps in a row, and dump."""
        run, limit = self.run, self.config.train.max_bad_steps
        if not run.state.bad_steps_in_a_row:
            return
        step = run.state.step
        run.journal.message(
            f"step {step}: the loss or the gradient was not finite; the update was skipped"
        )
        if run.state.bad_steps_in_a_row >= limit:
            name = f"bad_batch_step_{step:06d}.jsonl"
            if run.layout.is_chief:
                run.journal.dump(name, run.questions.records(rollouts, run.leader))
            raise TrainingError(
                f"the loss or the gradient was NaN or infinite {limit} steps in a row "
                f"(train.max_bad_steps); the last batch is in {run.journal.directory / name}; "
                "lower train.learning_rate, or look at the batch"
            )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _throughput(batch: PlacedRows, pending: PendingBatch, phases: Phases) -> dict[str, float]:
    """Seconds per phase, and tokens per second of generation, score and update."""
    lengths = [row.length for row in batch.rows]
    tokens = {
        "generate": pending.generated_tokens,
        "score": sum(n for n, scored in zip(lengths, batch.is_scored, strict=True) if scored),
        "update": sum(n for n, live in zip(lengths, batch.is_live, strict=True) if live),
    }
    speed = {
        f"throughput/{name}_tokens_per_s": count / phases.seconds[name]
        for name, count in tokens.items()
    }
    return phases.named() | speed
