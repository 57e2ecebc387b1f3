"""A training batch from its first question to its last response, in as many rounds as it takes."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_policysplit.data.questions import Question
from megatron_policysplit.logs.timing import Phases
from megatron_policysplit.rollout.driver import Batch
from megatron_policysplit.rows import RIGHT, Rollout, SecondRollout
from megatron_policysplit.training.run import Run


class PendingBatch:
    """A batch whose responses are being generated. Collective over all ranks.

    Every rank draws the same questions; leaders hold the responses. With a method's `Selection`
    further rounds begin in `finish`, by the weights that the engines have then, which are still
    those of the first round. The seed of a sample depends on batch and question, not on the round;
    a question that the end of an epoch brings again is left out.
    """

    def __init__(self, run: Run, number: int):
        """Draw the questions of the batch after `number` trained ones, and begin to generate."""
        self.run, self.number = run, number
        self.selection = run.algorithm.method.selection(run.algorithm.options)
        self.questions: list[Question] = []  # in the order in which they were drawn
        self.rounds: list[Batch] = []
        self.second_rollout = self._second_rollout()
        self.cursor: dict[str, int] = {}  # of the questions' stream, saved once this is trained
        # After `finish`, on leaders:
        self.metrics: dict[str, float] = {}
        self.generated_tokens = 0
        self.unused: list[Rollout] = []  # responses of a second rollout that are not trained
        self._rollouts: list[Rollout] | None = None
        self._begin_round(run.questions.draw())

    def finish(self, phases: Phases) -> list[Rollout]:
        """Graded rollouts of the questions to train, sorted by key, on leaders; [] elsewhere.

        May be called again. `phases` takes the seconds of all rounds, as `Driver.finish` says.
        """
        rounds = [self.run.generation.driver.finish(batch, phases) for batch in self.rounds]
        if self._rollouts is not None:
            return self._rollouts
        selected: list[int] = []
        if self.selection is not None:
            selected = self._selected_questions(rounds)
            while self._lacks(selected) and self._draw_again():
                rounds.append(self.run.generation.driver.finish(self.rounds[-1], phases))
                selected = self._selected_questions(rounds)
        responses = [rollout for rollouts in rounds for rollout in rollouts]
        self.generated_tokens = sum(len(rollout.tokens) for rollout in responses)
        self.metrics = _metrics_of_rounds([batch.metrics for batch in self.rounds])
        rollouts = [rollout for rollout in responses if not rollout.auxiliary]
        if self.selection is not None:
            rollouts = self._of_selected_questions(rollouts, selected)
        if self.second_rollout is not None:
            rollouts += self._positives([rollout for rollout in responses if rollout.auxiliary])
        self._rollouts = sorted(rollouts, key=lambda rollout: rollout.key)
        return self._rollouts

    def cancel(self) -> None:
        """Stop generating it, if it is being generated, and wait until the engine has been told."""
        for batch in self.rounds:
            batch.cancel()

    @property
    def _batch_questions(self) -> int:
        return self.run.config.data.batch_questions

    def _second_rollout(self) -> SecondRollout | None:
        """What the method samples besides, by its state after the batch trained last."""
        run, algorithm = self.run, self.run.algorithm
        state = run.state.method or algorithm.method.begin(algorithm.options)
        samples = run.config.rollout.samples_per_question
        return algorithm.method.second_rollout(
            algorithm.options, state, self._batch_questions, samples
        )

    def _begin_round(self, questions: Sequence[Question]) -> None:
        """Begin to generate for more questions; the second rollout comes with the first round."""
        run, is_first = self.run, not self.rounds
        self.questions += questions
        self.cursor = run.questions.cursor
        batch = run.generation.driver.begin(
            self.number,
            questions,
            run.questions.prompts,
            run.samples_per_mode,
            purpose="train",
            second=self.second_rollout if is_first else None,
        )
        self.rounds.append(batch)

    def _lacks(self, selected: Sequence[int]) -> bool:
        """Whether the method selected too few questions, and may draw again."""
        too_few = len(selected) < self._batch_questions
        return too_few and len(self.rounds) < self.selection.max_rounds

    def _draw_again(self) -> bool:
        """Begin another round; False if every question of the data set has been drawn."""
        drawn = {question.id for question in self.questions}
        fresh: list[Question] = []
        while not fresh and len(drawn) < len(self.run.questions.questions):
            fresh = [question for question in self.run.questions.draw() if question.id not in drawn]
        if fresh:
            self._begin_round(fresh)
        return bool(fresh)

    def _selected_questions(self, rounds: Sequence[Sequence[Rollout]]) -> list[int]:
        """Ids of the questions that the method keeps so far, in the order drawn.

        The chief's, on every rank (one broadcast over the world).
        """
        rewards: dict[int, list[float]] = {}
        for rollouts in rounds:
            for rollout in rollouts:
                if not rollout.auxiliary:
                    rewards.setdefault(rollout.question, []).append(rollout.reward)
        answered = [question.id for question in self.questions if question.id in rewards]
        selected = [id for id in answered if self.selection.keeps(rewards[id])]
        return self.run.layout.broadcast_from_chief(selected)

    def _of_selected_questions(
        self, rollouts: list[Rollout], selected: Sequence[int]
    ) -> list[Rollout]:
        """The rollouts of as many selected questions as a batch has.

        Where none is selected, those of the first round's questions, whatever their rewards.
        """
        size, drawn = self._batch_questions, len(self.questions)
        trained = selected[:size]
        if rollouts:
            mean_reward = sum(rollout.reward for rollout in rollouts) / len(rollouts)
            self.metrics |= {
                "dynamic/rounds": float(len(self.rounds)),
                "dynamic/questions": float(drawn),
                "dynamic/dropped": float(drawn - len(selected)),
                "dynamic/surplus": float(len(selected) - len(trained)),
                "dynamic/reward_of_all": mean_reward,
            }
        if len(trained) < size:
            consequence = "the first ones are trained, though without an advantage"
            if trained:
                consequence = "those are trained"
            self.run.journal.message(
                f"step {self.number + 1}: {len(trained)} of {drawn} questions drawn in "
                f"{len(self.rounds)} rounds have unequal rewards, where "
                f"data.batch_questions={size} are wanted; {consequence}"
            )
        questions = set(trained or [question.id for question in self.questions[:size]])
        return [rollout for rollout in rollouts if rollout.question in questions]

    def _positives(self, auxiliary: list[Rollout]) -> list[Rollout]:
        """Right responses of the second rollout, at most `most` of them.

        The first samples of all questions come before second ones.
        """
        order = sorted(
            auxiliary, key=lambda rollout: (rollout.sample, rollout.question, rollout.mode.value)
        )
        right = [rollout for rollout in order if rollout.reward > RIGHT]
        trained = right[: self.second_rollout.most]
        trained_keys = {rollout.key for rollout in trained}
        self.unused = [rollout for rollout in auxiliary if rollout.key not in trained_keys]
        if auxiliary:
            self.metrics |= {
                "auxiliary/temperature": self.second_rollout.temperature,
                "auxiliary/responses": float(len(auxiliary)),
                "auxiliary/accuracy": len(right) / len(auxiliary),
                "auxiliary/trained": float(len(trained)),
            }
        return trained


def _metrics_of_rounds(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    """Metrics of several rounds as of one: counts are added, shares are their mean."""
    names = {name for metrics in rounds for name in metrics}
    result = {}
    for name in sorted(names):
        values = [metrics[name] for metrics in rounds if name in metrics]
        result[name] = sum(values) / (len(values) if name.endswith("_share") else 1)
    return result
