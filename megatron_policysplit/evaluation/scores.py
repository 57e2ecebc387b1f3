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
    """Scores of one mode over all questions, made by `scores_by_mode`.

    `eval --output` writes the fields under these names.
    """

    accuracy: float  # share of right responses (pass@1)
    best_of_k: float  # share of questions with a right response
    unique_correct: float  # mean number of distinct right texts per question
    mean_surprisal_nats: float  # per token
    mean_tokens: float  # mean length of a response
    truncated: float  # share of responses that ended at the token limit
    grading_errors: int  # responses whose reward function failed; they count as wrong
    pass_at: dict[int, float]  # k -> pass@k
    variety: dict[str, float]  # `measures.variety_measures` of the texts
    judge: dict[str, float | int] = field(default_factory=dict)  # `judge_client.judge_measures`


def scores_by_mode(
    responses: Sequence[Response], graded: Sequence[Graded]
) -> dict[str, ModeScores]:
    """Mode's name -> its scores, in the order of the responses' modes.

    graded[i] belongs to responses[i]; every question has equally many responses.
    """
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
        measures = variety_measures([texts]) if len(texts) > 1 else {}
        if measures:
            values = (f"{VARIETY_NAMES[name]} {value:.3f}" for name, value in measures.items())
            lines.append(f"{mode_label(mode.value)}: {', '.join(values)}")
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
        column |= {f"pass_at_{k}": value for k, value in column["pass_at"].items()}
        column |= column["variety"] | column["judge"]
    # From pass@2 on: pass@1 is the accuracy.
    names |= {f"pass_at_{k}": f"pass@{k}" for k in powers_of_two(samples)[1:]}
    optional = VARIETY_NAMES | JUDGE_NAMES
    names |= {
        key: name for key, name in optional.items() if any(key in column for column in columns)
    }
    for key, name in names.items():
        table.add_row(name, *(_cell(column.get(key)) for column in columns))
    return table


def _cell(value: float | int | None) -> str:
    """A number as the table shows it; a dash where nothing was measured."""
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _modes_in_order(responses: Sequence[Response]) -> list[Mode]:
    """The modes in the order of their first responses."""
    return list(dict.fromkeys(response.mode for response in responses))
