"""Measures what a second mode costs in generation: prefill tokens, cached share, tokens per second.

    python -m benchmarks.rollout --model runs/smollm2/model --python .venv-sglang/bin/python
    python -m benchmarks.rollout --model runs/smollm2/model --address http://127.0.0.1:30000

Single mode: all samples of a question in the normal mode. Dual mode: half of them in each, the
high-entropy half behind one system prompt. Every response has the same length (stop tokens are
ignored), questions are random token ids, new in every repetition, and the prefix cache is emptied
before each. Single and dual take turns after one unmeasured round.

Prefill tokens are the server's own figures: what its answers say of each request and, where it was
started with --enable-metrics, its counter of prefill tokens, which must agree. "at least" is the
lowest number that any engine can reach: every prefix once, and the last token of its prompt for
each response. Needs a server that nobody else uses: its weight version is set to 0 for the run and
back after it. The last line of the output is the result as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_policysplit.rollout.engine import Request, Sampling
from megatron_policysplit.rollout.sglang import SglangEngine
from megatron_policysplit.rollout.sglang_http import EngineRefused, SglangClient
from megatron_policysplit.rows import Mode
from megatron_policysplit.serving.servers import Server, ServerSpec

COUNTER = re.compile(
    r'^sglang:realtime_tokens_total\{[^}]*mode="prefill_compute"[^}]*\} (\S+)$', re.MULTILINE
)
KINDS = ("single", "dual")


@dataclass
class Measured:
    """Figures of one rollout batch."""

    responses: int
    response_tokens: int
    prompt_tokens: int
    prefill_tokens: int  # computed, by the server's answers
    counted: int | None  # computed, by the server's counter; None if it has none
    at_least: int  # the fewest prefill tokens that are possible
    requests: int
    retries: int
    seconds: float


def requests(kind: str, options: argparse.Namespace, vocab_size: int, seed: int) -> list[Request]:
    """A batch of new questions, so that the prefix cache knows none of them."""
    draw = random.Random(f"{kind}/{seed}")

    def ids(count: int) -> list[int]:
        return [draw.randrange(vocab_size) for _ in range(count)]

    system = ids(options.system_tokens)
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=-1, max_tokens=options.response_tokens)
    share = {Mode.NORMAL: options.samples}
    if kind == "dual":
        share = {Mode.NORMAL: options.samples // 2, Mode.HIGH_ENTROPY: options.samples // 2}
    batch = []
    for question in range(options.questions):
        question_ids = ids(options.question_tokens)
        for mode, count in share.items():
            prompt = question_ids if mode == Mode.NORMAL else system + question_ids
            seeds = [draw.getrandbits(62) for _ in range(count)]
            batch.append(Request(seed, question, mode, prompt, sampling, range(count), seeds))
    return batch


def fewest(batch: Sequence[Request]) -> int:
    """Prefill tokens of a batch if every prefix is computed once.

    One for each node of the prompts' trie, and the last token of its prompt for each response.
    """
    nodes = {
        tuple(request.prompt[: end + 1]) for request in batch for end in range(len(request.prompt))
    }
    return len(nodes) + sum(len(request.samples) for request in batch)


async def measure(
    kind: str, options: argparse.Namespace, engine: SglangEngine, client: SglangClient, seed: int
):
    """Generate one batch of this kind on an empty prefix cache."""
    batch = requests(kind, options, options.vocab_size, seed)
    await client.flush()
    engine.serve_version(0)
    engine.metrics()  # empties `engine.stats`
    before, began = await prefill_counter(client), time.perf_counter()
    responses = [rollout async for rollout in engine.submit(batch)]
    seconds = time.perf_counter() - began
    after, stats = await prefill_counter(client), engine.stats
    lengths = {len(rollout.tokens) for rollout in responses}
    if lengths != {options.response_tokens}:
        raise SystemExit(
            f"responses have {sorted(lengths)} tokens instead of {options.response_tokens}"
        )
    return Measured(
        responses=len(responses),
        response_tokens=len(responses) * options.response_tokens,
        prompt_tokens=sum(mode.prompt_tokens for mode in stats.modes.values()),
        prefill_tokens=sum(mode.prefill_tokens for mode in stats.modes.values()),
        counted=None if before is None or after is None else round(after - before),
        at_least=fewest(batch),
        requests=stats.requests,
        retries=sum(mode.retries.total() for mode in stats.modes.values()),
        seconds=seconds,
    )


async def prefill_counter(client: SglangClient) -> float | None:
    """Prefill tokens that the server has computed since its start; None if it does not count."""
    try:
        text = await client.call("GET", "/metrics")
    except EngineRefused:
        return None
    values = COUNTER.findall(text)
    return sum(map(float, values)) if values else None


@asynccontextmanager
async def address(options: argparse.Namespace) -> AsyncIterator[str]:
    """The address of the given server, or of one that is started and ended here."""
    if options.address:
        yield options.address
        return
    with tempfile.TemporaryDirectory() as directory:
        server = Server(
            ServerSpec(
                index=0,
                python=options.python,
                model=options.model,
                dtype=options.dtype,
                tensor=1,
                host="127.0.0.1",
                port=options.port,
                seed=0,
                log=Path(directory) / "server.log",
                start_seconds=900.0,
                arguments={
                    "enable-metrics": True,
                    **dict(flag.split("=", 1) for flag in options.server_flag),
                },
            )
        )
        server.start()
        client = SglangClient(server.address)
        try:
            await server.ready(client)
            yield server.address
        finally:
            await client.close()
            server.close()


async def run(options: argparse.Namespace) -> dict[str, list[Measured]]:
    """Measure `repeats` batches of each kind, in turns, after one that is not measured."""
    async with address(options) as url:
        client = SglangClient(url, timeout_seconds=60.0)
        engine = SglangEngine(
            url,
            api_key=None,
            stop_token_ids=(),
            vocab_size=options.vocab_size,
            concurrency=options.concurrency,
            request_seconds=3600.0,
            retries=0,
            unavailable_seconds=60.0,
        )
        version = await client.version()
        try:
            await client.set_version("0")
            measured: dict[str, list[Measured]] = {kind: [] for kind in KINDS}
            for repeat in range(options.repeats + 1):
                for kind in KINDS:
                    batch = await measure(kind, options, engine, client, repeat)
                    if repeat:
                        measured[kind].append(batch)
                        print(f"{kind} {repeat}: {asdict(batch)}", flush=True)
            return measured
        finally:
            await client.set_version(version)
            await engine.aclose()
            await client.close()


def summary(batches: Sequence[Measured]) -> dict[str, float | int | bool | None]:
    """Summarise the repetitions of one kind; a count that may vary comes with its range."""
    speeds = [batch.response_tokens / batch.seconds for batch in batches]
    per_response = [batch.prefill_tokens / batch.responses for batch in batches]
    counted = [batch.counted for batch in batches]
    return {
        "responses": batches[0].responses,
        "requests": batches[0].requests,
        "retries": sum(batch.retries for batch in batches),
        "prompt_tokens_per_response": batches[0].prompt_tokens / batches[0].responses,
        "prefill_tokens_per_response": statistics.mean(per_response),
        "prefill_tokens_per_response_min": min(per_response),
        "prefill_tokens_per_response_max": max(per_response),
        "at_least_per_response": statistics.mean(
            batch.at_least / batch.responses for batch in batches
        ),
        "cached_share": 1
        - sum(b.prefill_tokens for b in batches) / sum(b.prompt_tokens for b in batches),
        "counter_agrees": None
        if None in counted
        else all(b.counted == b.prefill_tokens for b in batches),
        "tokens_per_s_mean": statistics.mean(speeds),
        "tokens_per_s_min": min(speeds),
        "tokens_per_s_max": max(speeds),
        "tokens_per_s_stdev": statistics.stdev(speeds) if len(speeds) > 1 else 0.0,
    }


def table(results: dict[str, dict]) -> str:
    """The summaries of both kinds side by side, as text."""
    agrees = {True: "agrees", False: "DIFFERS", None: "none kept"}
    rows: list[tuple[str, ...]] = [("", *results)]
    for name, text in (
        ("responses a batch", lambda r: f"{r['responses']}"),
        ("prompt tokens a response", lambda r: f"{r['prompt_tokens_per_response']:.1f}"),
        ("prefill tokens computed a response", lambda r: f"{r['prefill_tokens_per_response']:.2f}"),
        ("  at least", lambda r: f"{r['at_least_per_response']:.2f}"),
        ("  server's counter", lambda r: agrees[r["counter_agrees"]]),
        ("cached share of prompt tokens", lambda r: f"{r['cached_share']:.3f}"),
        ("response tokens/s, mean", lambda r: f"{r['tokens_per_s_mean']:.1f}"),
        (
            "  lowest to highest",
            lambda r: f"{r['tokens_per_s_min']:.1f} to {r['tokens_per_s_max']:.1f}",
        ),
        ("  standard deviation", lambda r: f"{r['tokens_per_s_stdev']:.1f}"),
        ("repeated requests", lambda r: f"{r['retries']}"),
    ):
        rows.append((name, *(text(result) for result in results.values())))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--model", required=True, help="directory of the Hugging Face model that is served"
    )
    parser.add_argument("--address", help="a server that runs already; without it one is started")
    parser.add_argument(
        "--python", help="interpreter of the environment that has SGLang, to start a server"
    )
    parser.add_argument(
        "--port", type=int, default=0, help="of the server that is started; 0 takes a free one"
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument(
        "--server-flag", action="append", default=[], metavar="NAME=VALUE", help="of the server"
    )
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8, help="of a question, an even number")
    parser.add_argument("--question-tokens", type=int, default=64)
    parser.add_argument(
        "--system-tokens", type=int, default=100, help="of the high-entropy mode's system prompt"
    )
    parser.add_argument("--response-tokens", type=int, default=32)
    parser.add_argument(
        "--concurrency", type=int, default=64, help="questions in a mode that are asked at once"
    )
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if not options.address and not options.python:
        parser.error("either --address or --python is needed")
    if options.samples % 2 or options.samples < 2:
        parser.error("--samples must be even: dual mode takes half from each mode")
    options.vocab_size = json.loads((Path(options.model) / "config.json").read_text())["vocab_size"]
    return options


if __name__ == "__main__":
    options = parse()
    measured = asyncio.run(run(options))
    results = {kind: summary(batches) for kind, batches in measured.items()}
    print(table(results))
    print(json.dumps({"settings": vars(options), "results": results}))
