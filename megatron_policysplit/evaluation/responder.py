"""Responses of a Hugging Face model in its modes without a run, for `generate` and `eval`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_policysplit.config import ModesConfig
from megatron_policysplit.config.load import load_config
from megatron_policysplit.data.questions import Question
from megatron_policysplit.data.tokenizer import load_tokenizer
from megatron_policysplit.errors import ConfigError
from megatron_policysplit.rollout.engine import Request, Sampling
from megatron_policysplit.rollout.seeds import sample_seed
from megatron_policysplit.rows import Mode


@dataclass(frozen=True)
class Response:
    """One response of a mode to a question, made by `Responder`."""

    question: int  # the question's id
    mode: Mode
    sample: int  # number among the responses to this question in this mode, from 0
    text: str  # without special tokens
    tokens: list[int]  # ids, the stop token included
    surprisals: list[float]  # -log-prob of each token at the sampling temperature, nats
    truncated: bool  # whether it ended at the token limit


def prompts_asked_for(
    config: str | None, prompt: str | None, prompt_file: str | None
) -> ModesConfig:
    """The prompts that --config, --high-entropy-prompt and --high-entropy-prompt-file ask for.

    Raises ConfigError where --config is combined with one of the other two.
    """
    if config is None:
        return ModesConfig(high_entropy_prompt=prompt, high_entropy_prompt_file=prompt_file)
    for option, value in (
        ("--high-entropy-prompt", prompt),
        ("--high-entropy-prompt-file", prompt_file),
    ):
        if value is not None:
            raise ConfigError(
                f"--config {config} brings the prompts, and so does {option}; give one of the two"
            )
    return load_config(config, []).modes


class Responder:
    """A model of a Hugging Face directory that answers questions behind the prompts of its modes.

    dtype: "float32" or "bfloat16". device: as torch names it. max_batch_samples: how many responses
    are generated at once.
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

        logging.disable_progress_bar()
        self._prompts = PromptBuilder(self._tokenizer, modes)
        stops = stop_token_ids(path, self._tokenizer)
        self._engine = LocalEngine(
            path, stops, dtype=dtype, max_batch_samples=max_batch_samples, device=device
        )

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
        """
        requests = []
        for question in questions:
            prompts = self._prompts.build(question.messages)
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
