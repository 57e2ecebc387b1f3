"""Rollouts as JSON records, for dumps that a person or the replay engine reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_policysplit.data.questions import Question
from megatron_policysplit.rows import Rollout


def rollout_records(
    rollouts: Sequence[Rollout],
    questions: Mapping[int, Question],
    prompts: Mapping[int, str],
    text: Callable[[Rollout], str],
) -> list[dict[str, Any]]:
    """One JSON record per rollout, in the order of the rollouts.

    The record's `prompt` and `response` are text for reading; the replay engine reads `tokens`.

    Args:
        rollouts: graded rollouts.
        questions: question id -> question.
        prompts: question id -> text of the normal mode's prompt.
        text: the response text of a rollout.
    """
    return [
        {
            "batch": rollout.batch,
            "question": rollout.question,
            "mode": rollout.mode.value,
            "sample": rollout.sample,
            "auxiliary": rollout.auxiliary,
            "prompt": prompts[rollout.question],
            "response": text(rollout),
            "tokens": rollout.tokens,
            "engine_logprobs": rollout.engine_logprobs,
            "finish_reason": rollout.finish_reason,
            "weight_versions": rollout.weight_versions,
            "reward": rollout.reward,
            "reward_error": rollout.reward_error,
            "answer": questions[rollout.question].answer,
        }
        for rollout in rollouts
    ]
