"""Responses of a Hugging Face directory in its modes, without a run: what `generate` and `eval` need."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

from megatron_policysplit.config import ModesConfig
from megatron_policysplit.config.load import load_config
from megatron_policysplit.data.questions import Question
from megatron_policysplit.errors import ConfigError, ModelError
from megatron_policysplit.evaluation.measures import answer_measures, powers_of_two, variety_measures
from megatron_policysplit.reports.run_report import mode_label
from megatron_policysplit.rewards import Graded
from megatron_policysplit.rollout.engine import Request, Sampling
from megatron_policysplit.rollout.seeds import sample_seed
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
class Response:
    """One response. tokens: its ids, the stop token kept. surprisals: -log-prob of each at its temperature, nats."""

    question: int
    mode: Mode
    sample: int
    text: str
    tokens: list[int]
    surprisals: list[float]
    truncated: bool


@dataclass(frozen=True)
class ModeScores:
    """Over all questions in one mode.

    accuracy: share of right responses (pass@1). best_of_k: share of questions with a right response.
    unique_correct: mean number of distinct right texts per question. mean_surprisal_nats: per token.
    grading_errors: responses whose reward function failed; they count as wrong. pass_at: pass@k by k.
    variety: of the texts (`measures.variety_measures`). judge: of a judge model (`judge.judge_measures`), if asked.
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


def prompts_asked_for(config: str | None, prompt: str | None, prompt_file: str | None) -> ModesConfig:
    """What --config, --high-entropy-prompt and --high-entropy-prompt-file ask for. Raises ConfigError."""
    if config is None:
        return ModesConfig(high_entropy_prompt=prompt, high_entropy_prompt_file=prompt_file)
    for option, value in (("--high-entropy-prompt", prompt), ("--high-entropy-prompt-file", prompt_file)):
        if value is not None:
            raise ConfigError(f"--config {config} brings the prompts, and so does {option}; give one of the two")
    return load_config(config, []).modes


def load_tokenizer(path: str):
    """The tokenizer of a model directory; no code of the directory is run. Raises ModelError."""
    from checkpoints_conv import read_hf_config

    read_hf_config(path)  # a wrong directory is told before the slow import
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise many kinds; each means an unreadable tokenizer
        raise ModelError(f"cannot load the tokenizer in {path}: {error}") from error


class Responder:
    """A model directory behind the prompts of all modes.

    dtype: "float32" or "bfloat16". device: as torch names it. max_batch_samples: generated together.
    """

    def __init__(
        self,
        path: str,
        modes: ModesConfig,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        max_batch_samples: int = 64,
    ):
        self._tokenizer = load_tokenizer(path)
        from transformers.utils import logging

        from megatron_policysplit.data.prompts import PromptBuilder, stop_token_ids
        from megatron_policysplit.rollout.local import LocalEngine

        logging.disable_progress_bar()
        self._prompts = PromptBuilder(self._tokenizer, modes)
        stops = stop_token_ids(path, self._tokenizer)
        self._engine = LocalEngine(path, stops, dtype=dtype, max_batch_samples=max_batch_samples, device=device)

    def respond(
        self,
        questions: Sequence[Question],
        modes: Sequence[Mode],
        samples: int,
        sampling: Sampling,
        seed: int,
        on_response: Callable[[], None] = lambda: None,
    ) -> list[Response]:
        """`samples` responses to every question in every mode, sorted by question, mode and sample."""
        requests = []
        for question in questions:
            prompts = self._prompts.build(question.messages)
            for mode in modes:
                seeds = [sample_seed(seed, 0, question.id, mode, index, "evaluation") for index in range(samples)]
                requests.append(Request(0, question.id, mode, prompts[mode], sampling, range(samples), seeds))
        rollouts = asyncio.run(self._collect(requests, on_response))
        return [
            Response(
                rollout.question,
                rollout.mode,
                rollout.sample,
                self._tokenizer.decode(rollout.tokens, skip_special_tokens=True),
                rollout.tokens,
                [-logprob for logprob in rollout.engine_logprobs],
                rollout.finish_reason == "length",
            )
            for rollout in sorted(rollouts, key=lambda rollout: rollout.key)
        ]

    async def _collect(self, requests: Sequence[Request], on_response: Callable[[], None]) -> list:
        rollouts = []
        async for rollout in self._engine.submit(requests):
            rollouts.append(rollout)
            on_response()
        return rollouts


def score(responses: Sequence[Response], graded: Sequence[Graded]) -> dict[str, ModeScores]:
    """Mode -> scores. graded[i] belongs to responses[i]; every question has equally many responses."""
    scores = {}
    for mode in _modes_of(responses):
        pairs = [(response, grade) for response, grade in zip(responses, graded, strict=True) if response.mode == mode]
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
    for mode in _modes_of(responses):
        texts = [response.text for response in responses if response.mode == mode]
        found = variety_measures([texts]) if len(texts) > 1 else {}
        if found:
            values = ", ".join(f"{VARIETY_NAMES[name]} {value:.3f}" for name, value in found.items())
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
        column |= {f"pass_at_{k}": value for k, value in column["pass_at"].items()} | column["variety"]
        column |= column["judge"]
    names |= {f"pass_at_{k}": f"pass@{k}" for k in powers_of_two(samples)[1:]}
    sometimes = VARIETY_NAMES | JUDGE_NAMES
    names |= {key: name for key, name in sometimes.items() if any(key in column for column in columns)}
    for key, name in names.items():
        table.add_row(name, *(_cell(column.get(key)) for column in columns))
    return table


def _cell(value: float | int | None) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _modes_of(responses: Sequence[Response]) -> list[Mode]:
    """In the order in which they were asked for; of the first question, where all are."""
    return list(dict.fromkeys(response.mode for response in responses))
