"""Times how the prompts of a data set are built: together, and one question after the other.

    python -m benchmarks.prompts --model DIR [--model DIR ...] [--questions 100000] [--repeats 3]
                                 [--output FILE.json]

The questions are made up: word problems of some 50 tokens with numbers of their own. For each the
prompts of both modes are rendered by the model's chat template and made into ids by its tokenizer,
as before a training. The two ways take turns, `--repeats` times; their ids must be equal, which
says little for a tokenizer that does not know the words, as the quickstart's. Loading the tokenizer
is not counted. The last line is JSON, with one entry for each model.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_policysplit.config import ModesConfig
from megatron_policysplit.data.prompts import PromptBuilder, Prompts
from megatron_policysplit.data.questions import Question
from megatron_policysplit.data.tokenizer import load_tokenizer

TEXT = (
    "If {0} apples cost {1} coins and a basket holds {2} of them, what do {3} baskets cost, and "
    "how many of {4} coins remain when they are paid?"
)


def main() -> None:
    arguments = _arguments()
    results = []
    for model in arguments.model:
        result = measure(model, arguments.questions, arguments.repeats)
        print(model)
        for way, seconds in result["seconds"].items():
            span = f"({seconds['lowest']:.1f} to {seconds['highest']:.1f})"
            print(f"  {way:12s} {seconds['median']:.1f} s {span}")
        print(f"  ratio        {result['ratio']:.2f}")
        results.append(result)
    report = {
        "models": results,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "tokenizers": version("tokenizers"),
        "transformers": version("transformers"),
    }
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", action="append", required=True, help="a directory with a tokenizer; repeatable"
    )
    parser.add_argument("--questions", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def make_questions(count: int) -> list[Question]:
    """Questions that differ, so that no tokenizer's cache holds them whole."""
    texts = (
        TEXT.format(index, 3 * index, index % 7 + 2, index + 5, 1000 * index)
        for index in range(count)
    )
    return [
        Question(index, [{"role": "user", "content": text}], None, {})
        for index, text in enumerate(texts)
    ]


def measure(model: str, count: int, repeats: int) -> dict[str, Any]:
    """Build the prompts of `count` questions both ways in turns; return seconds and their ratio."""
    builder = PromptBuilder(load_tokenizer(model), ModesConfig(), date="2025-01-01")
    questions = make_questions(count)
    ways: dict[str, Callable[[Sequence[Question]], Prompts]] = {
        "one by one": lambda asked: {each.id: builder.build(each.messages) for each in asked},
        "together": builder.build_all,
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    tokens = 0
    for _ in range(repeats):
        results = []
        for way, build in ways.items():
            began = time.perf_counter()
            results.append(build(questions))
            seconds[way].append(time.perf_counter() - began)
        if results[0] != results[1]:
            raise SystemExit("the two ways make different prompts")
        tokens = sum(len(ids) for by_mode in results[0].values() for ids in by_mode.values())
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    return {
        "model": Path(model).name,
        "questions": count,
        "prompts": 2 * count,
        "tokens_per_prompt": tokens / (2 * count),
        "seconds": {
            way: {"median": medians[way], "lowest": min(times), "highest": max(times)}
            for way, times in seconds.items()
        },
        "ratio": medians["one by one"] / medians["together"],
    }


if __name__ == "__main__":
    main()
