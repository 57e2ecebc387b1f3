"""A reward tried on the questions' own answers, before anything is generated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_policysplit.data.questions import Question
from megatron_policysplit.errors import ConfigError, DataError, TrainingError
from megatron_policysplit.rewards.functions import load_reward
from megatron_policysplit.rewards.pool import Graded, RewardPool
from megatron_policysplit.rewards.readings import read_reference

_ROWS = 3  # questions whose own answers are graded
_NAMED = 3  # questions that a warning names
_FORMULAS = 50  # reference answers that math-verify is asked about, which takes it about 10 ms each


@dataclass(frozen=True)
class OwnAnswer:
    """A question's own answer, graded as if it were a response to it."""

    question: int  # its id
    response: str
    in_box: bool  # whether the response is `\\boxed{..}`
    graded: Graded


@dataclass(frozen=True)
class RewardTrial:
    """What a reward gives the questions' own answers. Made by `try_reward`."""

    function: str  # as the key reward.function
    path: str  # of the questions
    questions: int
    own_answers: list[OwnAnswer]  # of the first questions that have an answer
    # With reward.function=math only, as (question's id, its answer):
    words: list[tuple[int, str]] = field(default_factory=list)  # compared as text
    unreadable: list[tuple[int, str]] = field(default_factory=list)  # every grading will fail
    formulas: int = 0  # of which math-verify read the first `_FORMULAS`

    def line(self) -> str:
        """What the reward gives, in one line."""
        if not self.own_answers:
            return f"{self.function} (no question has an answer to try it on)"
        given = []
        for in_box in (False, True):
            rewards = [
                "error" if own.graded.error else f"{own.graded.reward:g}"
                for own in self.own_answers
                if own.in_box is in_box
            ]
            if rewards:
                form = "in \\boxed{}" if in_box else "as text"
                given.append(f"{', '.join(rewards)} {form}")
        return f"{self.function} gives the first questions' own answers {' and '.join(given)}"

    def warnings(self) -> list[str]:
        """What may be wrong with the reward or the answers, one sentence each."""
        warnings = []
        if self.unreadable:
            partly = "at least " * (self.formulas > _FORMULAS)
            warnings.append(
                f"reward.function=math cannot read {partly}{len(self.unreadable)} of "
                f"{self.questions} answers of {self.path}, whose responses all get 0 and a "
                f"grading error: {_named(self.unreadable)}; give a number, a formula or words "
                r"without digits, or mark it by \boxed{} or ####"
            )
        if self.words:
            warnings.append(
                f"reward.function=math compares {len(self.words)} of {self.questions} answers of "
                f"{self.path} as plain text: {_named(self.words)}"
            )
        failed = [own for own in self.own_answers if own.graded.error]
        if failed and not self.unreadable:
            warnings.append(
                f"reward.function={self.function} fails on {len(failed)} of "
                f"{len(self.own_answers)} own answers of {self.path}, first on question "
                f"{failed[0].question}: {failed[0].graded.error}"
            )
        return warnings


def check_questions(function: str, path: str, questions: Sequence[Question]) -> None:
    """Raise ConfigError where a built-in reward can grade none of the questions.

    `reasoning_gym` needs data of reasoning_gym; `math` and `exact` need an answer.
    """
    if function == "reasoning_gym" and not any("reasoning_gym" in q.record for q in questions):
        raise ConfigError(
            f"reward.function=reasoning_gym scores questions of reasoning_gym:NAME only, not those "
            f"of {path}; use math, exact or a function of your own"
        )
    if function in ("math", "exact") and all(q.answer is None for q in questions):
        raise ConfigError(
            f"reward.function={function} needs answers, and no question of {path} has one; use a "
            "function of your own"
        )


def try_reward(
    function: str, timeout_seconds: float, data: Mapping[str, Sequence[Question]]
) -> list[RewardTrial]:
    """Have a reward grade the first questions' own answers, in a process and within its time limit.

    Each is graded as it stands, and but for `exact` and `reasoning_gym` in a box. Less than full
    marks are no error: a task may reward none of its own answers. For `math` every reference answer
    is read, too, and the first formulas among them by math-verify.

    data: sets of questions by where they come from, as messages name it. Returns one trial a set.
    Raises ConfigError for a function that cannot work (`load_reward`, `check_questions`, or one
    whose process ends before it grades), DataError if `math` can read no answer of a set at all.
    """
    load_reward(function)
    for path, questions in data.items():
        check_questions(function, path, questions)
    plans = [_plan(function, path, questions) for path, questions in data.items()]
    try:
        # One process for all sets: to start it takes longer than its gradings.
        with RewardPool(function, 1, timeout_seconds) as pool:
            graded = iter(pool.grade([item for plan in plans for item in plan.items()]))
    except TrainingError as error:
        raise ConfigError(str(error)) from error
    return [plan.trial(function, [next(graded) for _ in plan.items()]) for plan in plans]


@dataclass(frozen=True)
class _Plan:
    """What a trial has graded of one set of questions. Made by `_plan`."""

    path: str
    questions: int
    answered: int  # questions with an answer
    own: list[tuple[Question, str, bool]]  # question, response, whether it is in a box
    words: list[tuple[int, str]]
    unreadable: list[tuple[int, str]]  # by `read_reference`
    formulas: list[Question]

    def items(self) -> list[tuple[str, Question]]:
        """(response, question) of the own answers, then of the formulas that are asked about."""
        # A box's contents do not matter here: math reads the reference answer first.
        asked = [(r"\boxed{0}", question) for question in self.formulas[:_FORMULAS]]
        return [(response, question) for question, response, _ in self.own] + asked

    def trial(self, function: str, graded: Sequence[Graded]) -> RewardTrial:
        """The trial, from what `items` were graded. Raises DataError if no answer can be read."""
        own, asked = graded[: len(self.own)], graded[len(self.own) :]
        unreadable = self.unreadable + [
            (question.id, question.answer)
            for question, result in zip(self.formulas[:_FORMULAS], asked, strict=True)
            if result.error is not None
        ]
        unreadable.sort()
        if unreadable and len(unreadable) == self.answered:
            raise DataError(
                f"reward.function=math can read none of the {self.answered} answers of "
                f"{self.path}: {_named(unreadable)}; give a number, a formula or words without "
                r"digits, or mark it by \boxed{} or ####"
            )
        own_answers = [
            OwnAnswer(question.id, response, in_box, result)
            for (question, response, in_box), result in zip(self.own, own, strict=True)
        ]
        return RewardTrial(
            function,
            self.path,
            self.questions,
            own_answers,
            self.words,
            unreadable,
            len(self.formulas),
        )


def _plan(function: str, path: str, questions: Sequence[Question]) -> _Plan:
    answered = [question for question in questions if question.answer is not None]
    forms = (False,) if function in ("exact", "reasoning_gym") else (False, True)
    own = [
        (question, _response(function, question.answer, in_box), in_box)
        for question in answered[:_ROWS]
        for in_box in forms
    ]
    words, unreadable, formulas = _references(answered) if function == "math" else ([], [], [])
    return _Plan(path, len(questions), len(answered), own, words, unreadable, formulas)


def _response(function: str, answer: str, in_box: bool) -> str:
    """A question's own answer as a response; in a box for `math` what it reads as the answer."""
    if not in_box:
        return answer
    if function == "math":
        try:
            answer = read_reference(answer).text
        except ValueError:
            pass  # which the grading says
    return rf"\boxed{{{answer}}}"


def _references(
    questions: Sequence[Question],
) -> tuple[list[tuple[int, str]], list[tuple[int, str]], list[Question]]:
    """Answers that `math` compares as text, those it cannot read, and questions with a formula."""
    words, unreadable, formulas = [], [], []
    for question in questions:
        try:
            reading = read_reference(question.answer)
        except ValueError:
            unreadable.append((question.id, question.answer))
            continue
        if reading.words is not None:
            words.append((question.id, question.answer))
        elif reading.is_formula:
            formulas.append(question)
    return words, unreadable, formulas


def _named(answers: Sequence[tuple[int, str]]) -> str:
    """The first answers with their questions' ids."""
    texts = []
    for id, answer in answers[:_NAMED]:
        text = answer if len(answer) <= 40 else answer[:37] + "..."
        texts.append(f"question {id}: {text!r}")
    return ", ".join(texts) + (", ..." if len(answers) > _NAMED else "")
