"""A training batch from its first question to its last response: drawn, generated, drawn again if a
method wants.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_policysplit.data.questions import Question
from megatron_policysplit.logs.timing import Phases
from megatron_policysplit.rollout.driver import Batch
from megatron_policysplit.rows import RIGHT, Rollout, SecondRollout
from megatron_policysplit.training.run import Run


class PendingBatch:
    """A batch under way. Collective over all ranks; every rank draws the same questions, leaders
    hold the responses.

    unused: responses of a second rollout that are not trained, on leaders, once finished.
    cursor: the stream's state once its questions were drawn; saved when it has been trained. With a
    method's `Selection` further rounds begin in `finish`, with the weights that the engines have
    then, which are still those of the first round. The seed of a sample depends on batch and
    question, not on the round; a question that the end of an epoch brings again is left out.
    """

    def __init__(self, run: Run, number: int):
        self.run, self.number = run, number
        self.selection = run.algorithm.method.selection(run.algorithm.options)
        self.questions: list[Question] = []
        self.rounds: list[Batch] = []
        self.metrics: dict[str, float] = {}
        self.generated_tokens = 0
        self.second = self._second()
        self.unused: list[Rollout] = []
        self._rollouts: list[Rollout] | None = None
        self._begin(run.stream.next_batch())

    def finish(self, phases: Phases) -> list[Rollout]:
        """Graded rollouts of the questions to train, sorted by key, on leaders; [] elsewhere. May
        be called again.

        phases: as of `Driver.finish`, over all rounds.
        """
        made = [self.run.driver.finish(batch, phases) for batch in self.rounds]
        if self._rollouts is not None:
            return self._rollouts
        if self.selection is not None:
            kept = self._kept(made)
            while (
                len(kept) < self._wanted
                and len(self.rounds) < self.selection.max_rounds
                and self._draw_again()
            ):
                made.append(self.run.driver.finish(self.rounds[-1], phases))
                kept = self._kept(made)
        everything = [rollout for part in made for rollout in part]
        self.generated_tokens = sum(len(rollout.tokens) for rollout in everything)
        self.metrics = _together([batch.metrics for batch in self.rounds])
        rollouts = [rollout for rollout in everything if not rollout.auxiliary]
        if self.selection is not None:
            rollouts = self._select(rollouts, kept)
        if self.second is not None:
            rollouts += self._positives([rollout for rollout in everything if rollout.auxiliary])
        self._rollouts = sorted(rollouts, key=lambda rollout: rollout.key)
        return self._rollouts

    def cancel(self) -> None:
        """Stop generating it, if it is being generated, and wait until the engine has been told."""
        for batch in self.rounds:
            batch.cancel()

    @property
    def _wanted(self) -> int:
        return self.run.config.data.batch_questions

    def _second(self) -> SecondRollout | None:
        """What the method asks for besides, by its state after the batch trained last."""
        run, algorithm = self.run, self.run.algorithm
        state = run.state.method or algorithm.method.begin(algorithm.options)
        samples = run.config.rollout.samples_per_question
        return algorithm.method.second_rollout(algorithm.options, state, self._wanted, samples)

    def _begin(self, questions: Sequence[Question]) -> None:
        """Start a round; the second rollout comes with the first."""
        run, second = self.run, None if self.rounds else self.second
        self.questions += questions
        self.cursor = run.stream.state()
        self.rounds.append(
            run.driver.begin(
                self.number,
                questions,
                run.prompts,
                run.samples_per_mode,
                purpose="train",
                second=second,
            )
        )

    def _draw_again(self) -> bool:
        """Begin another round; False if every question of the data set has been asked."""
        asked = {question.id for question in self.questions}
        fresh: list[Question] = []
        while not fresh and len(asked) < len(self.run.questions):
            fresh = [
                question for question in self.run.stream.next_batch() if question.id not in asked
            ]
        if fresh:
            self._begin(fresh)
        return bool(fresh)

    def _kept(self, made: Sequence[Sequence[Rollout]]) -> list[int]:
        """Ids of the questions that the method keeps so far, in the order drawn (the chief's, on
        every rank).
        """
        rewards: dict[int, list[float]] = {}
        for rollouts in made:
            for rollout in (rollout for rollout in rollouts if not rollout.auxiliary):
                rewards.setdefault(rollout.question, []).append(rollout.reward)
        asked = [question.id for question in self.questions if question.id in rewards]
        return self.run.layout.broadcast_from_chief(
            [id for id in asked if self.selection.keeps(rewards[id])]
        )

    def _select(self, rollouts: list[Rollout], kept: Sequence[int]) -> list[Rollout]:
        """Those of the first questions kept; of the first round's, whatever their rewards, if there
        is none.
        """
        chosen, drawn = kept[: self._wanted], len(self.questions)
        if rollouts:
            self.metrics |= {
                "dynamic/rounds": float(len(self.rounds)),
                "dynamic/questions": float(drawn),
                "dynamic/dropped": float(drawn - len(kept)),
                "dynamic/surplus": float(len(kept) - len(chosen)),
                "dynamic/reward_of_all": sum(rollout.reward for rollout in rollouts)
                / len(rollouts),
            }
        if len(chosen) < self._wanted:
            tail = (
                "those are trained"
                if chosen
                else "the first ones are trained, though without an advantage"
            )
            self.run.log.message(
                f"step {self.number + 1}: {len(chosen)} of {drawn} questions drawn in "
                f"{len(self.rounds)} rounds have "
                f"unequal rewards, where data.batch_questions={self._wanted} are wanted; {tail}"
            )
        wanted = set(chosen or [question.id for question in self.questions[: self._wanted]])
        return [rollout for rollout in rollouts if rollout.question in wanted]

    def _positives(self, auxiliary: list[Rollout]) -> list[Rollout]:
        """Right responses of the second rollout, at most `most`: first samples of all questions
        before second ones.
        """
        order = sorted(
            auxiliary, key=lambda rollout: (rollout.sample, rollout.question, rollout.mode.value)
        )
        right = [rollout for rollout in order if rollout.reward > RIGHT]
        chosen = right[: self.second.most]
        taken = {rollout.key for rollout in chosen}
        self.unused = [rollout for rollout in auxiliary if rollout.key not in taken]
        if auxiliary:
            self.metrics |= {
                "auxiliary/temperature": self.second.temperature,
                "auxiliary/responses": float(len(auxiliary)),
                "auxiliary/accuracy": len(right) / len(auxiliary),
                "auxiliary/trained": float(len(chosen)),
            }
        return chosen


def _together(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Metrics of several rounds as of one: counts are added, shares are their mean."""
    names = {name for part in parts for name in part}
    result = {}
    for name in sorted(names):
        values = [part[name] for part in parts if name in part]
        result[name] = sum(values) / (len(values) if name.endswith("_share") else 1)
    return result
