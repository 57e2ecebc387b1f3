"""The judge at work, in the evaluations of a run and in `policysplit eval`.

In a run the chief alone sends requests, and all ranks wait for it.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from megatron_policysplit.config import JudgeConfig
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
    """The judge of a run's evaluations. Every rank makes one; only the chief sends requests.

    Making one and every method are collective over all ranks. Making one tries the judge out: it
    raises JudgeError on every rank if the judge cannot be used, StopRequested after a signal.
    """

    def __init__(
        self, settings: JudgeConfig, layout: Layout, control: Control, log: Callable[[str], None]
    ):
        self._settings, self._layout = settings, layout
        self._control, self._log = control, log
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

        A judge that fails is logged in one message and not raised. Raises StopRequested on every
        rank after a signal.

        Args:
            answers: rollouts by mode or name of eval.prompts; read on the chief.
            questions: the evaluation questions.
            text: the response text of a rollout.
        """
        judged, pairs = [], []
        if self._judge is not None:
            judged = [
                (name, rollout)
                for name, rollouts in answers.items()
                for rollout in _first(self._settings, rollouts, questions)
            ]
            pairs = _pairs([(r.question, text(r)) for _, r in judged], questions)
        # The control group's short time-out begins when the last rank is here.
        self._layout.barrier()
        requests = self._judge.judge(pairs) if self._judge is not None else None
        verdicts = self._control.attend(requests) or []
        if (message := failures(verdicts)) is not None:
            self._log(message)
        return {
            (name, r.question, r.sample): verdict
            for (name, r), verdict in zip(judged, verdicts, strict=True)
        }

    async def _open(self) -> Verdict:
        self._judge = JudgeClient(self._settings, judge_api_key(self._settings))
        return await self._judge.check()


class OfflineJudge:
    """The judge of `policysplit eval`. Making one tries the judge out; later failures go to stderr.

    keys: KEY=VALUE, those of eval.judge. Raises ConfigError or JudgeError.
    """

    def __init__(self, keys: Sequence[str]):
        # Keys that every configuration must have, though a judge needs none of them.
        required = ("model.path=none", "data.path=none", "run.dir=none")
        overrides = [*required, *(f"eval.judge.{key}" for key in keys)]
        self.settings = load_config(None, overrides).eval.judge
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
        judged = _first(self.settings, responses, questions)
        pairs = _pairs([(response.question, response.text) for response in judged], questions)
        verdicts = asyncio.run(self._judge.judge(pairs))
        if (message := failures(verdicts)) is not None:
            _warn(message)
        by_mode: dict[str, list[Verdict]] = {}
        for response, verdict in zip(judged, verdicts, strict=True):
            by_mode.setdefault(response.mode.value, []).append(verdict)
        return {
            mode: replace(mode_scores, judge=judge_measures(by_mode[mode]))
            for mode, mode_scores in scores.items()
        }


def judge_metrics(verdicts: Mapping[Key, Verdict]) -> dict[str, float]:
    """`judge_measures` of each mode or name of eval.prompts, as `eval/<mode or name>/<measure>`."""
    by_name: dict[str, list[Verdict]] = {}
    for (name, _, _), verdict in verdicts.items():
        by_name.setdefault(name, []).append(verdict)
    return {
        f"eval/{name}/{measure}": float(value)
        for name, of_name in by_name.items()
        for measure, value in judge_measures(of_name).items()
    }


def with_verdicts(
    records: Sequence[dict[str, Any]], verdicts: Mapping[Key, Verdict]
) -> list[dict[str, Any]]:
    """The rollout records; those that were judged with `judge`: {score, reply, error}."""
    result = []
    for record in records:
        verdict = verdicts.get((record["mode"], record["question"], record["sample"]))
        result.append(record if verdict is None else record | {"judge": asdict(verdict)})
    return result


def failures(verdicts: Sequence[Verdict]) -> str | None:
    """One sentence about the responses that got no reply, with the first reason; else None."""
    errors = [verdict.error for verdict in verdicts if verdict.error is not None]
    if not errors:
        return None
    return (
        f"{len(errors)} of {len(verdicts)} responses were not judged (judge_failed); the first: "
        f"{errors[0]}"
    )


def question_text(question: Question) -> str:
    """The question as the judge reads it: its one message, or several, each after its role.

    Calls of tools follow the content as JSON.
    """
    if len(question.messages) == 1:
        return question.messages[0]["content"]
    return "\n\n".join(
        f"{message['role']}: {_content_and_calls(message)}" for message in question.messages
    )


def _content_and_calls(message: Mapping[str, Any]) -> str:
    calls = message.get("tool_calls") or []
    parts = [message["content"], *(json.dumps(call, ensure_ascii=False) for call in calls)]
    return "\n".join(part for part in parts if part)


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def _first(settings: JudgeConfig, answers: Sequence, questions: Sequence[Question]) -> list:
    """The answers that are judged: the first to the first questions, as many as eval.judge says.

    answers: rollouts or responses.
    """
    ids = {question.id for question in questions[: settings.questions]}
    return [
        answer for answer in answers if answer.question in ids and answer.sample < settings.samples
    ]


def _pairs(
    answers: Sequence[tuple[int, str]], questions: Sequence[Question]
) -> list[tuple[str, str]]:
    """(question text, response text) of each pair (question id, response text)."""
    texts = {question.id: question_text(question) for question in questions}
    return [(texts[id], response) for id, response in answers]


def _no_score(settings: JudgeConfig, trial: Verdict) -> str:
    """The warning about a judge whose reply to the trial holds no score."""
    reply = " ".join(trial.reply.split())
    return (
        f"the judge {settings.model} gave a trial response no score that can be read: its reply "
        "must end in a line `Score: N` and be shorter than "
        f"eval.judge.max_tokens={settings.max_tokens}; it ended: {reply[-200:]!r}"
    )
