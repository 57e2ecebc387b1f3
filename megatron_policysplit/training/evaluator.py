"""Evaluations of a run: every evaluation question in all modes and under further prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_policysplit.algorithms.advantages import TokenStatistics
from megatron_policysplit.config.modes import modes_of
from megatron_policysplit.evaluation.verdicts import judge_metrics, with_verdicts
from megatron_policysplit.logs.timing import Phases
from megatron_policysplit.rows import Mode, Rollout, Row, share_rollouts
from megatron_policysplit.training.grading_check import GradingCheck
from megatron_policysplit.training.metrics import evaluation_metrics, prompt_metrics
from megatron_policysplit.training.questions import Prompts
from megatron_policysplit.training.run import Run


class Evaluator:
    """Samples, grades, scores and judges responses. Every method is collective over all ranks."""

    def __init__(self, run: Run):
        self.run, self.settings = run, run.config.eval
        self.grading = GradingCheck(run.layout, run.config.reward.function)

    def evaluate(self) -> float:
        """Evaluate the weights that the engines have; the normal mode's accuracy, on every rank.

        The chief logs metrics and rollouts. Raises StopRequested on every rank after a signal.
        """
        run, phases, metrics = self.run, Phases(), {}
        with phases.measure("eval"):
            modes = modes_of(run.config.modes)
            rollouts, rows, statistics = self._answers(run.eval_questions.prompts, modes)
            by_name: dict[str, Sequence[Rollout]] = {
                mode.value: [rollout for rollout in rollouts if rollout.mode == mode]
                for mode in modes
            }
            if run.layout.is_chief:
                metrics |= evaluation_metrics(rows, statistics, **self._measures())
            for name, prompts in run.eval_questions.other_prompts.items():
                by_name[name], *scored = self._answers(prompts, (Mode.NORMAL,))
                if run.layout.is_chief:
                    metrics |= prompt_metrics(name, *scored, **self._measures())
        verdicts = self._verdicts(by_name, phases)
        if run.layout.is_chief:
            metrics |= phases.named() | judge_metrics(verdicts)
            records = run.eval_questions.records(rollouts, run.leader)
            run.journal.log.evaluation(run.state.step, metrics)
            run.journal.log.eval_rollouts(run.state.step, with_verdicts(records, verdicts))
        return run.layout.broadcast_from_chief(metrics.get("eval/normal/accuracy"))

    def _measures(self) -> dict:
        samples, variety = self.settings.samples, self.settings.variety
        return {"text": self.run.leader.text, "samples": samples, "variety": variety}

    def _answers(
        self, prompts: Prompts, modes: Sequence[Mode]
    ) -> tuple[list[Rollout], list[Row], list[TokenStatistics]]:
        """Graded responses to all questions under `prompts` in `modes`; their rows, statistics."""
        run = self.run
        with run.generation.awake():
            rollouts = run.generation.driver.generate(
                run.state.step,
                list(run.eval_questions.questions.values()),
                prompts,
                dict.fromkeys(modes, self.settings.samples),
                purpose="evaluation",
                phases=Phases(),
            )
        self.grading.check(rollouts, f"the evaluation after step {run.state.step}")
        rows = share_rollouts(rollouts, prompts, modes)
        placed = run.actor.place(rows, [False] * len(rows), seed=0)
        return rollouts, rows, run.actor.log_probs(placed)

    def _verdicts(self, by_name: Mapping[str, Sequence[Rollout]], phases: Phases) -> dict:
        """The judge's verdicts by mode or prompt's name, question and sample; on the chief."""
        run = self.run
        if run.judge is None:
            return {}
        questions = list(run.eval_questions.questions.values())
        text = None if run.leader is None else run.leader.text
        with phases.measure("judge"):
            return run.judge.verdicts(by_name, questions, text)
