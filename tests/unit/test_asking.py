"""Batches that a method chooses or adds to: rounds, cursors, what is kept; with a driver that grades by a table."""

from types import SimpleNamespace

import pytest

from megatron_policysplit.actor.checkpoint import TrainerState
from megatron_policysplit.algorithms.methods import build_algorithm
from megatron_policysplit.algorithms.modes import samples_per_mode
from megatron_policysplit.config import Config
from megatron_policysplit.data.questions import Question, QuestionStream
from megatron_policysplit.rows import MODES, Rollout, SecondRollout
from megatron_policysplit.training.questions import TrainingQuestions
from megatron_policysplit.training.rollout_batch import PendingBatch

QUESTIONS, BATCH = 10, 3
MIXED = (0, 1, 5, 6)


def equal_but_for(mixed):
    """Grades 1, and a single 0 for questions in `mixed`."""
    return lambda question, mode, sample: float(not (question in mixed and mode == MODES[0] and sample == 0))


class Batch:
    def __init__(self, rollouts):
        self.rollouts, self.cancelled = rollouts, 0
        self.metrics = {"rollout/retried": 2.0, "rollout/cached_prompt_share": 0.5 if len(rollouts) > 8 else 0.1}

    def cancel(self):
        self.cancelled += 1


class Driver:
    """Responses of one token; `leads` says whether this rank sees them. asked: questions of each round."""

    def __init__(self, grade, leads=True):
        self.grade, self.leads, self.asked, self.second, self.finished = grade, leads, [], [], 0

    def begin(self, batch, questions, prompts, samples_per_mode, purpose, second=None):
        assert purpose == "train"
        self.asked.append([question.id for question in questions])
        self.second.append(second)
        made = []
        for position, question in enumerate(questions):
            for mode, count in samples_per_mode.items():
                more = second.samples if second is not None and position < second.questions else 0
                for sample in range(count + more):
                    reward = self.grade(question.id, mode, sample)
                    made.append(Rollout(batch, question.id, mode, sample, [1], [-1.0], "stop", [(0, 0)], reward=reward))
                    made[-1].auxiliary = sample >= count
        return Batch(made)

    def finish(self, batch, phases):
        self.finished += 1
        return sorted(batch.rollouts, key=lambda rollout: rollout.key) if self.leads else []


def run_with(grade, method="dapo", options=None, state=None, told=None, leads=True):
    """A run of the parts that a batch is made of. told: what the chief says, in turn (else this rank is the chief)."""
    config = Config()
    config.data.batch_questions, config.rollout.samples_per_question = BATCH, 4
    config.algorithm.name, config.algorithm.options = method, {method: options or {}}
    questions = [Question(number, [], "1", {}) for number in range(QUESTIONS)]
    algorithm = build_algorithm(config.algorithm)
    said, messages = [], []

    def broadcast_from_chief(value):
        said.append(value if told is None else told[len(said)])
        return said[-1]

    by_id, driver = {question.id: question for question in questions}, Driver(grade, leads)
    return SimpleNamespace(
        config=config,
        algorithm=algorithm,
        samples_per_mode=samples_per_mode(config.rollout, config.modes, algorithm.method),
        questions=TrainingQuestions(by_id, {}, QuestionStream(questions, BATCH, seed=1)),
        state=state or TrainerState(),
        generation=SimpleNamespace(driver=driver),
        driver=driver,
        layout=SimpleNamespace(broadcast_from_chief=broadcast_from_chief),
        journal=SimpleNamespace(message=messages.append),
        said=said,
        messages=messages,
    )


def questions_of(rollouts):
    return sorted({rollout.question for rollout in rollouts})


@pytest.mark.parametrize("method", ["dapo", "policy_split"])
def test_questions_are_drawn_until_enough_are_mixed(method):
    run = run_with(equal_but_for(MIXED), method, {"dynamic_sampling": True})
    asked = PendingBatch(run, 0)
    found = asked.finish(None)
    drawn = [question for part in run.driver.asked for question in part]
    mixed = [question for question in drawn if question in MIXED]
    assert questions_of(found) == sorted(mixed[:BATCH]) and len(found) == 4 * BATCH
    assert [rollout.key for rollout in found] == sorted(rollout.key for rollout in found)
    assert len(run.driver.asked) > 1 and len(set(drawn)) == len(drawn)
    before = [question for question in drawn[: -len(run.driver.asked[-1])] if question in MIXED]
    assert len(before) < BATCH <= len(mixed)
    assert asked.cursor == run.questions.cursor and not run.messages
    zeros, responses = len(mixed), 4 * len(drawn)
    assert asked.metrics == pytest.approx(
        {
            "dynamic/rounds": len(run.driver.asked),
            "dynamic/questions": len(drawn),
            "dynamic/dropped": len(drawn) - len(mixed),
            "dynamic/surplus": len(mixed) - BATCH,
            "dynamic/reward_of_all": (responses - zeros) / responses,
            "rollout/retried": 2.0 * len(run.driver.asked),
            "rollout/cached_prompt_share": asked.metrics["rollout/cached_prompt_share"],
        }
    )
    assert 0.1 <= asked.metrics["rollout/cached_prompt_share"] <= 0.5 and asked.generated_tokens == responses
    rounds, asked_for = len(run.driver.asked), len(run.said)
    assert asked.finish(None) is found and (len(run.driver.asked), len(run.said)) == (rounds, asked_for)


def test_a_rank_that_leads_nothing_draws_the_same():
    chief = run_with(equal_but_for(MIXED))
    first = PendingBatch(chief, 0)
    first.finish(None)
    other = run_with(equal_but_for(MIXED), told=chief.said, leads=False)
    second = PendingBatch(other, 0)
    assert second.finish(None) == [] and other.driver.asked == chief.driver.asked
    assert second.cursor == first.cursor and not [name for name in second.metrics if name.startswith("dynamic")]


def test_batches_after_a_stop_are_those_of_a_run_without():
    """With the cursor of the batch trained last; a batch that was begun leaves no trace in it."""
    straight = run_with(equal_but_for(MIXED))
    first = PendingBatch(straight, 0)
    first.finish(None)
    cursor = first.cursor
    expected = PendingBatch(straight, 1)
    found = expected.finish(None)
    resumed = run_with(equal_but_for(MIXED))
    resumed.questions.stream.restore(cursor)
    again = PendingBatch(resumed, 1)
    assert again.finish(None) == found and again.cursor == expected.cursor != cursor


@pytest.mark.parametrize(("mixed", "rounds"), [((0, 5), 10), ((), 10), (MIXED, 1)])
def test_when_there_are_not_enough_the_batch_is_what_there_is(mixed, rounds):
    run = run_with(equal_but_for(mixed), options={"max_rounds": rounds})
    asked = PendingBatch(run, 4)
    found = questions_of(asked.finish(None))
    drawn = [question for part in run.driver.asked for question in part]
    kept = sorted(set(drawn) & set(mixed))
    assert len(drawn) == len(set(drawn)) == (QUESTIONS if rounds > 1 else BATCH)
    assert found == (kept or sorted(drawn[:BATCH]))
    (message,) = run.messages
    assert message.startswith(f"step 5: {len(kept)} of {len(drawn)} questions drawn in {len(run.driver.asked)} rounds")
    assert asked.metrics["dynamic/dropped"] == len(drawn) - len(kept)


def test_without_a_rule_the_first_draw_is_the_batch():
    for method, options in (("grpo", {}), ("dapo", {"dynamic_sampling": False}), ("policy_split", {})):
        run = run_with(equal_but_for(()), method, options)
        asked = PendingBatch(run, 0)
        assert questions_of(asked.finish(None)) == sorted(run.driver.asked[0])
        assert len(run.driver.asked) == 1 and not run.said and not run.messages
        assert set(asked.metrics) == {"rollout/retried", "rollout/cached_prompt_share"}


def test_every_round_is_cancelled():
    run = run_with(equal_but_for(MIXED))
    asked = PendingBatch(run, 0)
    asked.finish(None)
    asked.cancel()
    assert [batch.cancelled for batch in asked.rounds] == [1] * len(run.driver.asked)


def test_a_second_rollout_follows_the_state_and_gives_its_right_answers():
    """Every second question's auxiliary samples are right; two are trained at most, of two questions."""
    state = TrainerState(method={"entropy": 0.6})
    run = run_with(lambda question, mode, sample: float(sample < 4 or question % 2), "aepo", state=state)
    PendingBatch(run, 0)
    assert run.driver.second == [SecondRollout(0.8, questions=1, samples=4, most=1)]
    options = {"questions": 1.0, "alpha": 0.2}
    run = run_with(lambda question, mode, sample: float(question % 2), "aepo", options)
    asked = PendingBatch(run, 0)
    assert run.driver.second == [SecondRollout(1.2, questions=3, samples=4, most=2)]
    found = asked.finish(None)
    auxiliary = [rollout for rollout in found if rollout.auxiliary]
    odd = sorted(question for question in run.driver.asked[0] if question % 2)
    wanted = [(4, question) for question in odd] + [(5, question) for question in odd]
    assert sorted((rollout.sample, rollout.question) for rollout in auxiliary) == sorted(wanted[:2])
    assert len(found) == 12 + 2 and len(asked.unused) == 12 - 2 and asked.generated_tokens == 24
    assert {name: value for name, value in asked.metrics.items() if name.startswith("auxiliary")} == pytest.approx(
        {
            "auxiliary/temperature": 1.2,
            "auxiliary/responses": 12,
            "auxiliary/accuracy": len(odd) / 3,
            "auxiliary/trained": 2,
        }
    )
