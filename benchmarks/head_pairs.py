"""Times a score pass with and without the exact KL between two prompts, in turns, on the CPU.

    python -m benchmarks.head_pairs [--vocabulary 32] [--hidden 64] [--responses 128]
                                    [--length 7] [--repeats 20]

Every response has two rows, which stand next to each other as the actor's do, and every token is
one of a pair. One process, one thread, fp32, 256 tokens at a time. `half` scores as many tokens as
one row of each response has, without KL: what a method with one prompt pays. Prints JSON: medians
in seconds, and the share of pairs whose tokens are both in one chunk.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

from megatron_policysplit.vocab_parallel import Head, Pairs, VocabularyShard, score

CHUNK = 256


def seconds(
    vocabulary: int, hidden_size: int, responses: int, length: int, repeats: int
) -> dict[str, float]:
    """Median seconds of each way of scoring, and the share of pairs within a chunk."""
    generator = torch.Generator().manual_seed(0)
    tokens = 2 * responses * length
    hidden = torch.randn(tokens, hidden_size, generator=generator)
    weight = torch.randn(vocabulary, hidden_size, generator=generator).div_(hidden_size**0.5)
    targets, ones = torch.randint(0, vocabulary, (tokens,), generator=generator), torch.ones(tokens)
    head = Head(weight, VocabularyShard(0, vocabulary, None), CHUNK)
    first = torch.arange(tokens).reshape(responses, 2, length)[:, 0].flatten()
    pairs = Pairs(first, first + length)
    half = slice(0, tokens // 2)
    ways = {
        "with_kl": lambda: score(head, hidden, targets, ones, pairs),
        "without_kl": lambda: score(head, hidden, targets, ones),
        "half": lambda: score(head, hidden[half], targets[half], ones[half]),
    }
    timings: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):  # the first warms up
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if repeat:
                timings[name].append(time.perf_counter() - began)
    is_within = pairs.first // CHUNK == pairs.second // CHUNK
    medians = {name: statistics.median(values) for name, values in timings.items()}
    return medians | {"meet_in_a_chunk": is_within.double().mean().item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    defaults = {"vocabulary": 32, "hidden": 64, "responses": 128, "length": 7, "repeats": 20}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = seconds(
        arguments.vocabulary,
        arguments.hidden,
        arguments.responses,
        arguments.length,
        max(1, arguments.repeats),
    )
    print(json.dumps(vars(arguments) | result))


if __name__ == "__main__":
    main()
