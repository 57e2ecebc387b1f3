"""A server in this process that speaks /generate as SGLang does, misbehaves by script, and notes what it is asked."""

import asyncio
from collections import Counter
from contextlib import asynccontextmanager

from aiohttp import web

from megatron_policysplit.rollout.engine import Request, Sampling
from megatron_policysplit.rollout.sglang import SglangEngine
from megatron_policysplit.rows import Mode

STOP, VOCAB, KEY, LIMIT = 5, 32, "a-secret-key", 6
RETRIES = "rollout/engine_retries"


def request(question=0, mode=Mode.NORMAL, samples=3, prompt=(1, 2, 3), batch=0):
    seeds = [1000 * question + 100 * (mode == Mode.HIGH_ENTROPY) + i for i in range(samples)]
    return Request(batch, question, mode, list(prompt), Sampling(0.7, 1.0, -1, LIMIT), range(samples), seeds)


def good_answer(payload, cached=0, version="3"):
    """A response that is a function of the seed: it ends with the stop token, or is as long as it may be."""
    sampling, prompt = payload["sampling_params"], payload["input_ids"]
    limit, seed = sampling["max_new_tokens"], sampling.get("sampling_seed", 0)
    tokens = [10 + (seed + i) % 20 for i in range(limit)]
    reason = {"type": "length", "length": limit}
    if limit and seed % 2 and not sampling.get("ignore_eos"):
        tokens = [*tokens[: 1 + seed % limit][:-1], STOP]
        reason = {"type": "stop", "matched": STOP}
    meta = {
        "id": payload["rid"],
        "finish_reason": reason,
        "prompt_tokens": len(prompt),
        "completion_tokens": len(tokens),
        "cached_tokens": cached,
        "weight_version": version,
        "weight_versions": [{"version": version, "start": 0, "end": len(tokens)}],
        "output_token_logprobs": [[-0.5 - 0.01 * i, token, None] for i, token in enumerate(tokens)],
    }
    if "logprob_start_len" in payload:
        given = prompt[payload["logprob_start_len"] :]
        meta["input_token_logprobs"] = [[None, given[0], None], *([-0.1 * t, t, None] for t in given[1:])]
    return {"text": "", "output_ids": tokens, "meta_info": meta}


class Server:
    """script: what happens to the n-th request for a sample (or for scores); then, and else, a good answer.

    An entry takes (http request, payload) and returns an answer or a web.Response.
    """

    def __init__(self):
        self.script, self.seen, self.keys, self.cancelled = [], [], [], 0
        self.prefix_script = []
        self.prefixes = []  # the order in which prefix requests began and ended
        self.holding = 0
        self.questions = Counter()  # in flight, by routing key
        self.most_questions = 0
        self.hold = None
        self.cached = set()
        self.version = "3"

    async def generate(self, http):
        payload = await http.json()
        key = http.headers.get("X-SMG-Routing-Key")
        self.seen.append(payload)
        self.keys.append(key)
        is_prefix = payload["sampling_params"]["max_new_tokens"] == 0 and "logprob_start_len" not in payload
        self.questions[key] += 1
        self.prefixes += ["begin"] * is_prefix
        self.most_questions = max(self.most_questions, len(self.questions))
        try:
            await asyncio.sleep(0.005)
            if self.hold is not None and not is_prefix:
                self.holding += 1
                await self.hold.wait()
            script = self.prefix_script if is_prefix else self.script
            if script and (step := script.pop(0)) is not None:
                answer = await step(http, payload)
            else:
                answer = good_answer(payload, self._cached(payload["input_ids"]), self.version)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.prefixes += ["end"] * is_prefix
            self.questions[key] -= 1
            self.questions += Counter()
        return answer if isinstance(answer, web.StreamResponse) else web.json_response(answer)

    def _cached(self, ids):
        known = next((n for n in range(len(ids) - 1, 0, -1) if tuple(ids[:n]) in self.cached), 0)
        self.cached |= {tuple(ids[:n]) for n in range(1, len(ids) + 1)}
        return known


@asynccontextmanager
async def serving(**options):
    """A server, and an engine that is told it serves version 3."""
    server = Server()
    app = web.Application(client_max_size=2**26)
    app.router.add_post("/generate", server.generate)
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    address = f"http://127.0.0.1:{runner.addresses[0][1]}"
    engine = make_engine(address, **options)
    engine.serve_version(3)
    try:
        yield server, engine
    finally:
        await engine.aclose()
        await runner.cleanup()


def make_engine(address, **options):
    defaults = {
        "api_key": KEY,
        "stop_token_ids": [STOP],
        "vocab_size": VOCAB,
        "concurrency": 8,
        "request_seconds": 30.0,
        "retries": 2,
        "unavailable_seconds": 30.0,
        "backoff_seconds": 0.01,
    }
    return SglangEngine(address, **(defaults | options))


async def gather(engine, requests):
    return [rollout async for rollout in engine.submit(requests)]


def run(scenario, **options):
    async def main():
        async with serving(**options) as (server, engine):
            return await asyncio.wait_for(scenario(server, engine), 60)

    return asyncio.run(main())


def edited(edit):
    """A step of a script: the good answer after `edit(answer, meta, payload)`."""

    async def step(http, payload):
        answer = good_answer(payload)
        edit(answer, answer["meta_info"], payload)
        return answer

    return step


def status(code, text="no reason"):
    async def step(http, payload):
        return web.json_response({"error": {"message": text}}, status=code)

    return step


async def drop(http, payload):
    http.transport.close()
    return web.Response()


async def half(http, payload):
    response = web.StreamResponse(headers={"Content-Length": "5000", "Content-Type": "application/json"})
    await response.prepare(http)
    await response.write(b'{"output_ids": [1,')
    http.transport.close()
    return response


async def half_json(http, payload):
    return web.Response(body=b'{"output_ids": [1, 2', content_type="application/json")


async def no_json(http, payload):
    return web.Response(text="<html>busy</html>")


def payload_of(seed):
    return {"rid": "", "input_ids": [1], "sampling_params": {"max_new_tokens": LIMIT, "sampling_seed": seed}}
