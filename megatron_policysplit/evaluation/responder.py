"""Responses of a Hugging Face model in its modes without a run, for `generate` and `eval`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING

from checkpoints_conv import read_hf_config
from megatron_policysplit.config import ModesConfig
from megatron_policysplit.config.load import load_written
from megatron_policysplit.config.model_layout import model_positions
from megatron_policysplit.data.questions import Question
from megatron_policysplit.data.response_text import end_token_ids, response_text
from megatron_policysplit.data.text import check_text
from megatron_policysplit.data.tokenizer import load_tokenizer
from megatron_policysplit.errors import ConfigError
from megatron_policysplit.rollout.engine import Request, Sampling
from megatron_policysplit.rollout.seeds import sample_seed
from megatron_policysplit.rows import Mode

if TYPE_CHECKING:
    from megatron_policysplit.data.prompts import Prompts
    from megatron_policysplit.rollout.local import LocalEngine


@dataclass(frozen=True)
class Response:
    """One response of a mode to a question, made by `Responder`."""

    question: int  # the question's id
    mode: Mode
    sample: int  # number among the responses to this question in this mode, from 0
    text: str  # without the stop token; other special tokens as they are written
    tokens: list[int]  # ids, the stop token included
    surprisals: list[float]  # -log-prob of each token at the sampling temperature, nats
    truncated: bool  # whether it ended at the token limit


def prompts_asked_for(
    config: str | None, prompt: str | None, prompt_file: str | None
) -> ModesConfig:
    """The prompts that --config, --high-entropy-prompt and --high-entropy-prompt-file ask for.

    Raises ConfigError where --config is combined with one of the other two, and for a prompt that
    is not UTF-8.
    """
    if config is None:
        check_text(prompt, "--high-entropy-prompt", ConfigError)
        return ModesConfig(high_entropy_prompt=prompt, high_entropy_prompt_file=prompt_file)
    for option, value in (
        ("--high-entropy-prompt", prompt),
        ("--high-entropy-prompt-file", prompt_file),
    ):
        if value is not None:
            raise ConfigError(
                f"--config {config} brings the prompts, and so does {option}; give one of the two"
            )
    return load_written(config).modes


class Responder:
    """A model of a Hugging Face directory that answers questions behind the prompts of its modes.

    dtype: "float32" or "bfloat16". device: as torch names it. max_batch_samples: how many responses
    are generated at once. The model is read when the first questions have been checked.
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
        # Before the slow imports, so that a bad directory is refused at once.
        self._tokenizer = load_tokenizer(path)
        from transformers.utils import logging

        from megatron_policysplit.data.prompts import PromptBuilder
        from megatron_policysplit.data.stop_tokens import stop_token_ids
        from megatron_policysplit.rollout.local import LocalEngine
        from megatron_policysplit.rollout.local_model import check_device

        logging.disable_progress_bar()
        self._hf_config = read_hf_config(path)
        self._ends = end_token_ids(path, self._tokenizer)
        self._prompts = PromptBuilder(
            self._tokenizer, modes, vocab_size=self._hf_config.get("vocab_size")
        )
        self._built: tuple[Sequence[Question], Prompts] | None = None  # the latest questions'
        self._make_engine = partial(
            LocalEngine,
            path,
            stop_token_ids(path, self._tokenizer),
            dtype=dtype,
            max_batch_samples=max_batch_samples,
            device=check_device(device),
        )

    @cached_property
    def _engine(self) -> LocalEngine:
        return self._make_engine()

    def respond(
        self,
        questions: Sequence[Question],
        modes: Sequence[Mode],
        samples: int,
        sampling: Sampling,
        seed: int,
        on_response: Callable[[], None] = lambda: None,
    ) -> list[Response]:
        """`samples` responses to every question in every mode.

        They are sorted by question, by the name of the mode and by sample.

        on_response is called after each response, in the order in which they are finished.
        Raises DataError for a question whose prompt the model cannot read, ConfigError where a
        prompt and its response may need more positions than the model has.
        """
        requests, all_prompts = [], self._build(questions)
        self._check_positions(self._longest_prompt(questions, modes), sampling.max_tokens)
        for question in questions:
            prompts = all_prompts[question.id]
            for mode in modes:
                seeds = [
                    sample_seed(seed, 0, question.id, mode, index, "evaluation")
                    for index in range(samples)
                ]
                requests.append(
                    Request(0, question.id, mode, prompts[mode], sampling, range(samples), seeds)
                )
        rollouts = asyncio.run(self._collect(requests, on_response))
        return [
            Response(
                rollout.question,
                rollout.mode,
                rollout.sample,
                response_text(self._tokenizer, rollout.tokens, self._ends),
                rollout.tokens,
                [-logprob for logprob in rollout.engine_logprobs],
                rollout.finish_reason == "length",
            )
            for rollout in sorted(rollouts, key=lambda rollout: rollout.key)
        ]

    def max_tokens(self, questions: Sequence[Question], modes: Sequence[Mode], most: int) -> int:
        """`most`, or as many tokens as the model has positions for behind the longest prompt.

        At least 1, which `respond` refuses where a prompt takes all positions. Raises DataError
        for a question whose prompt the model cannot read.
        """
        limit = model_positions(self._hf_config)
        if limit is None:
            return most
        return max(1, min(most, limit - self._longest_prompt(questions, modes)))

    def _build(self, questions: Sequence[Question]) -> Prompts:
        """The prompts of all modes; made once for a sequence that is given again."""
        if self._built is None or self._built[0] is not questions:
            self._built = questions, self._prompts.build_all(questions)
        return self._built[1]

    def _longest_prompt(self, questions: Sequence[Question], modes: Sequence[Mode]) -> int:
        """The number of tokens of the longest prompt of these modes; 0 without questions."""
        prompts = self._build(questions).values()
        return max((len(by_mode[mode]) for by_mode in prompts for mode in modes), default=0)

    def _check_positions(self, longest: int, max_tokens: int) -> None:
        """Raise ConfigError if a prompt of `longest` tokens leaves less than max_tokens."""
        limit = model_positions(self._hf_config)
        if limit is None or longest + max_tokens <= limit:
            return
        if longest >= limit:
            remedy = "leave out questions as long as that"
        else:
            remedy = f"use at most --max-tokens {limit - longest}"
        raise ConfigError(
            f"--max-tokens {max_tokens} behind a prompt of {longest} tokens makes "
            f"{longest + max_tokens} positions, more than the {limit} of the model "
            f"(max_position_embeddings in config.json); {remedy}"
        )

    async def _collect(self, requests: Sequence[Request], on_response: Callable[[], None]) -> list:
        rollouts = []
        async for rollout in self._engine.submit(requests):
            rollouts.append(rollout)
            on_response()
        return rollouts
