"""`reasoning_gym`: the task's own scorer."""

from __future__ import annotations

import functools
import json
import re

import reasoning_gym

from megatron_policysplit.data import Question

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def reward(response: str, question: Question) -> float:
    """The score in [0, 1] of the text in the last <answer>..</answer>, or of the whole response without them."""
    origin = question.record.get("reasoning_gym")
    if origin is None:
        raise ValueError(f"question {question.id} is not of data.path=reasoning_gym:NAME, which this reward needs")
    tagged = _ANSWER.findall(response)
    dataset = _dataset(origin["name"], json.dumps(origin["options"], sort_keys=True))
    return dataset.score_answer((tagged[-1] if tagged else response).strip(), entry=question.record)


@functools.lru_cache(maxsize=16)
def _dataset(name: str, options: str):
    return reasoning_gym.create_dataset(name, **json.loads(options))
