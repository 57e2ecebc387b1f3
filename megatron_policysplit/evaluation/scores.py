"""Scores of graded responses in each mode, and their table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from megatron_policysplit.config.modes import mode_label
from megatron_policysplit.evaluation.measures import (
    answer_measures,
    powers_of_two,
    variety_measures,
)
from megatron_policysplit.evaluation.responder import Response
from megatron_policysplit.rewards import Graded
from megatron_policysplit.rows import RIGHT, Mode

VARIETY_NAMES = {
    "distinct_1": "distinct words",
    "distinct_2": "distinct word pairs",
    "ngram_diversity_2": "distinct word pairs of a response",
    "self_bleu_diversity": "1 - self-BLEU",
}


JUDGE_NAMES = {
    "judge_score": "judge's score (1 to 10)",
    "judge_unparsed": "replies without a score",
    "judge_failed": "responses not judged",
}


@dataclass(frozen=True)
class ModeScores:
    """Over all questions in one mode.

    accuracy: share of right responses (pass@1). best_of_k: share of questions with a right
    response.
    unique_correct: mean number of distinct right texts per question. mean_surprisal_nats: per
    token.
    grading_errors: responses whose reward function failed; they count as wrong. pass_at: pass@k by
    k.
    variety: of the texts (`measures.variety_measures`). judge: of a judge model
    (`judge.judge_measures`), if asked.
    """

    accuracy: float
    best_of_k: float
    unique_correct: float
    mean_surprisal_nats: float
    mean_tokens: float
    truncated: float
    grading_errors: int
    pass_at: dict[int, float]
    variety: dict[str, float]
    judge: dict[str, float | int] = field(default_factory=dict)


def scores_by_mode(
    responses: Sequence[Response], graded: Sequence[Graded]
) -> dict[str, ModeScores]:
    """Mode -> scores. graded[i] belongs to responses[i]; every question has equally many responses."""
    scores = {}
    for mode in _modes_in_order(responses):
        pairs = [
            (response, grade)
            for response, grade in zip(responses, graded, strict=True)
            if response.mode == mode
        ]
        answers: dict[int, list[tuple[str, bool]]] = {}
        for response, grade in pairs:
            answers.setdefault(response.question, []).append((response.text, grade.reward > RIGHT))
        samples = len(pairs) // len(answers)
        measures = answer_measures(list(answers.values()), samples)
        surprisals = [value for response, _ in pairs for value in response.surprisals]
        scores[mode.value] = ModeScores(
            accuracy=sum(grade.reward > RIGHT for _, grade in pairs) / len(pairs),
            best_of_k=measures[f"best_of_{samples}"],
            unique_correct=measures["unique_correct"],
            mean_surprisal_nats=sum(surprisals) / len(surprisals),
            mean_tokens=len(surprisals) / len(pairs),
            truncated=sum(response.truncated for response, _ in pairs) / len(pairs),
            grading_errors=sum(grade.error is not None for _, grade in pairs),
            pass_at={k: measures[f"pass_at_{k}"] for k in powers_of_two(samples)},
            variety=variety_measures([[text for text, _ in pairs] for pairs in answers.values()]),
        )
    return scores


def variety_lines(responses: Sequence[Response]) -> list[str]:
    """`MODE: measure value, ...` for every mode with enough responses to compare."""
    lines = []
    for mode in _modes_in_order(responses):
        texts = [response.text for response in responses if response.mode == mode]
        found = variety_measures([texts]) if len(texts) > 1 else {}
        if found:
            values = ", ".join(
                f"{VARIETY_NAMES[name]} {value:.3f}" for name, value in found.items()
            )
            lines.append(f"{mode_label(mode.value)}: {values}")
    return lines


def scores_table(scores: dict[str, ModeScores], samples: int):
    """A row per measure and a column per mode, as a rich table."""
    from rich.table import Table

    table = Table("", *(mode_label(mode) for mode in scores))
    names = {
        "accuracy": "accuracy (pass@1)",
        "best_of_k": f"best of {samples}",
        "unique_correct": f"unique right answers of {samples}",
        "mean_surprisal_nats": "mean surprisal (nats/token)",
        "mean_tokens": "mean response (tokens)",
        "truncated": "truncated share",
        "grading_errors": "grading errors",
    }
    columns = [asdict(mode_scores) for mode_scores in scores.values()]
    for column in columns:
        column |= {f"pass_at_{k}": value for k, value in column["pass_at"].items()} | column[
            "variety"
        ]
        column |= column["judge"]
    names |= {f"pass_at_{k}": f"pass@{k}" for k in powers_of_two(samples)[1:]}
    sometimes = VARIETY_NAMES | JUDGE_NAMES
    names |= {
        key: name for key, name in sometimes.items() if any(key in column for column in columns)
    }
    for key, name in names.items():
        table.add_row(name, *(_cell(column.get(key)) for column in columns))
    return table


def _cell(value: float | int | None) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _modes_in_order(responses: Sequence[Response]) -> list[Mode]:
    """In the order in which they were asked for; of the first question, where all are."""
    return list(dict.fromkeys(response.mode for response in responses))
