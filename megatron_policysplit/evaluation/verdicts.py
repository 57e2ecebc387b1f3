"""The judge at work: in the evaluations of a run, where all ranks wait for the chief's requests,
and in `eval`.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from megatron_policysplit.config import Config, JudgeConfig
from megatron_policysplit.config.checks import check_judge_keys
from megatron_policysplit.config.load import load_config
from megatron_policysplit.data.questions import Question
from megatron_policysplit.errors import ConfigError
from megatron_policysplit.evaluation.judge_client import JudgeClient, Verdict, judge_measures
from megatron_policysplit.evaluation.judge_prompt import judge_api_key

if TYPE_CHECKING:
    from megatron_policysplit.distributed.control import Control
    from megatron_policysplit.distributed.layout import Layout
    from megatron_policysplit.evaluation.responder import Response
    from megatron_policysplit.evaluation.scores import ModeScores
    from megatron_policysplit.rows import Rollout

Key = tuple[str, int, int]  # mode or name of eval.prompts, question, sample


class EvaluationJudge:
    """eval.judge of a run. Every method is collective over all ranks; the chief alone sends
    requests.

    Building it tries the judge out: JudgeError on every rank if it cannot be used, StopRequested
    after a signal.
    """

    def __init__(
        self, config: Config, layout: Layout, control: Control, log: Callable[[str], None]
    ):
        self._settings, self._layout, self._control, self._log = (
            config.eval.judge,
            layout,
            control,
            log,
        )
        self._judge: JudgeClient | None = None
        layout.barrier()
        trial = control.attend(self._open() if layout.is_chief else None)
        if trial is not None and trial.score is None:
            log(_no_score(self._settings, trial))

    def verdicts(
        self,
        answers: Mapping[str, Sequence[Rollout]],
        questions: Sequence[Question],
        text: Callable[[Rollout], str],
    ) -> dict[Key, Verdict]:
        """Verdicts on the first responses to the first questions, on the chief; {} elsewhere.

        answers: by mode or name of eval.prompts, on the chief. A judge that fails is told by one
        message, not raised. Raises StopRequested on every rank after a signal.
        """
        chosen, pairs = [], []
        if self._judge is not None:
            chosen = [
                (name, rollout)
                for name, some in answers.items()
                for rollout in _first(self._settings, some, questions)
            ]
            pairs = _pairs([(r.question, text(r)) for _, r in chosen], questions)
        # The control group's short time-out begins when the last rank is here.
        self._layout.barrier()
        found = (
            self._control.attend(self._judge.judge(pairs) if self._judge is not None else None)
            or []
        )
        if (said := failures(found)) is not None:
            self._log(said)
        return {
            (name, r.question, r.sample): verdict
            for (name, r), verdict in zip(chosen, found, strict=True)
        }

    async def _open(self) -> Verdict:
        self._judge = JudgeClient(self._settings, judge_api_key(self._settings))
        return await self._judge.check()


class OfflineJudge:
    """The judge of `policysplit eval`, tried out when it is built. What goes wrong later is said on
    stderr.

    keys: KEY=VALUE, those of eval.judge. Raises ConfigError or JudgeError.
    """

    def __init__(self, keys: Sequence[str]):
        needed = (
            "model.path=none",
            "data.path=none",
            "run.dir=none",
        )  # what a run needs, and a judge does not
        self.settings = load_config(
            None, [*needed, *(f"eval.judge.{key}" for key in keys)]
        ).eval.judge
        if self.settings.url is None:
            raise ConfigError(
                "--judge needs the address of a server; give --judge url=http://host:port/v1, too"
            )
        check_judge_keys(self.settings)
        self._judge = JudgeClient(self.settings, judge_api_key(self.settings))
        trial = asyncio.run(self._judge.check())
        if trial.score is None:
            _warn(_no_score(self.settings, trial))

    def judge(
        self,
        scores: Mapping[str, ModeScores],
        responses: Sequence[Response],
        questions: Sequence[Question],
    ) -> dict[str, ModeScores]:
        """The scores, with the judge's measures of the first responses to the first questions."""
        chosen = _first(self.settings, responses, questions)
        pairs = _pairs([(response.question, response.text) for response in chosen], questions)
        verdicts = asyncio.run(self._judge.judge(pairs))
        if (said := failures(verdicts)) is not None:
            _warn(said)
        by_mode: dict[str, list[Verdict]] = {}
        for response, verdict in zip(chosen, verdicts, strict=True):
            by_mode.setdefault(response.mode.value, []).append(verdict)
        return {
            mode: replace(found, judge=judge_measures(by_mode[mode]))
            for mode, found in scores.items()
        }


def judge_metrics(verdicts: Mapping[Key, Verdict]) -> dict[str, float]:
    """`eval/<mode or name>/<measure>` (`judge_measures`)."""
    by_name: dict[str, list[Verdict]] = {}
    for (name, _, _), verdict in verdicts.items():
        by_name.setdefault(name, []).append(verdict)
    return {
        f"eval/{n}/{measure}": float(v)
        for n, some in by_name.items()
        for measure, v in judge_measures(some).items()
    }


def with_verdicts(
    records: Sequence[dict[str, Any]], verdicts: Mapping[Key, Verdict]
) -> list[dict[str, Any]]:
    """Rollout records, those that were judged with `judge`: score, reply, error."""
    found = [
        verdicts.get((record["mode"], record["question"], record["sample"])) for record in records
    ]
    return [
        r | {"judge": asdict(v)} if v is not None else r
        for r, v in zip(records, found, strict=True)
    ]


def failures(verdicts: Sequence[Verdict]) -> str | None:
    """One sentence about the responses that got no reply, with the first reason; None if all got
    one.
    """
    errors = [verdict.error for verdict in verdicts if verdict.error is not None]
    if not errors:
        return None
    return f"{len(errors)} of {len(verdicts)} responses were not judged (judge_failed); the first: {errors[0]}"


def question_text(question: Question) -> str:
    """What the judge reads as the question: the message, or of several each with its role."""
    if len(question.messages) == 1:
        return question.messages[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in question.messages)


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def _first(settings: JudgeConfig, answers: Sequence, questions: Sequence[Question]) -> list:
    """The first eval.judge.samples of `answers` (rollouts or responses) to the first
    eval.judge.questions.
    """
    wanted = {question.id for question in questions[: settings.questions]}
    return [
        answer
        for answer in answers
        if answer.question in wanted and answer.sample < settings.samples
    ]


def _pairs(
    answers: Sequence[tuple[int, str]], questions: Sequence[Question]
) -> list[tuple[str, str]]:
    texts = {question.id: question_text(question) for question in questions}
    return [(texts[id], response) for id, response in answers]


def _no_score(settings: JudgeConfig, trial: Verdict) -> str:
    said = " ".join(trial.reply.split())
    return (
        f"the judge {settings.model} gave a trial response no score that can be read: its reply "
        "must end in a line "
        f"`Score: N` and be shorter than eval.judge.max_tokens={settings.max_tokens}; it ended: "
        f"{said[-200:]!r}"
    )
