"""How the SGLang engine asks: together, bounded, again, and not at all; against a server in this process."""

import asyncio
from collections import Counter
from contextlib import aclosing

import pytest
from aiohttp import web

from megatron_policysplit.errors import EngineError
from megatron_policysplit.rollout import sglang
from megatron_policysplit.rollout.engine import EnginePaused
from megatron_policysplit.rollout.sglang_http import SglangClient
from megatron_policysplit.rows import MODES, Mode
from tests.support.generate_server import (
    KEY,
    LIMIT,
    RETRIES,
    STOP,
    VOCAB,
    drop,
    edited,
    gather,
    good_answer,
    make_engine,
    payload_of,
    request,
    run,
    serving,
    status,
)


def test_all_samples_of_a_prompt_behind_one_prefix_request():
    async def scenario(server, engine):
        asked = [request(q, mode, prompt=(q + 1, 2, 3, 4)) for q in range(3) for mode in MODES]
        return await gather(engine, asked), server, engine.metrics(), engine.metrics()

    rollouts, server, metrics, later = run(scenario)
    assert sorted(r.key for r in rollouts) == sorted(
        (0, q, m.value, i) for q in range(3) for m in MODES for i in range(3)
    )
    by_seed = {p["sampling_params"]["sampling_seed"]: p for p in server.seen if "sampling_seed" in p["sampling_params"]}
    assert len(by_seed) == len(rollouts)  # no seed twice, in neither mode
    for rollout in rollouts:
        seed = 1000 * rollout.question + 100 * (rollout.mode == Mode.HIGH_ENTROPY) + rollout.sample
        answer = good_answer(by_seed[seed])
        assert rollout.tokens == answer["output_ids"]
        assert rollout.engine_logprobs == [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
        assert rollout.finish_reason == ("stop" if rollout.tokens[-1] == STOP else "length")
        assert rollout.weight_versions == [(0, 3)]
        sampling = by_seed[seed]["sampling_params"]
        assert sampling["stop_token_ids"] == [STOP] and not sampling["ignore_eos"] and sampling["no_stop_trim"]
        assert (sampling["temperature"], sampling["top_p"], sampling["top_k"]) == (0.7, 1.0, -1)
        assert (sampling["min_p"], sampling["repetition_penalty"], sampling["max_new_tokens"]) == (0.0, 1.0, LIMIT)
    for key in set(server.keys):  # one routing key a question and mode: the prompt alone, then its samples
        group = [p for p, k in zip(server.seen, server.keys, strict=True) if k == key]
        assert [p["sampling_params"]["max_new_tokens"] for p in group] == [0, LIMIT, LIMIT, LIMIT]
        assert len({tuple(p["input_ids"]) for p in group}) == 1
    assert len({p["rid"] for p in server.seen}) == len(server.seen) == metrics["rollout/engine_requests"] == 24
    # 18 samples of 4 tokens. Both modes have the same prompts here: each is computed once, then its last token again
    # for every other request.
    assert metrics["rollout/prompt_tokens"] == 72 and metrics["rollout/prefill_tokens"] == 3 * 4 + 3 + 18
    assert metrics["rollout/cached_prompt_share"] == pytest.approx(1 - 33 / 72)
    assert metrics["rollout/normal/prompt_tokens"] == metrics["rollout/high_entropy/prompt_tokens"] == 36
    assert metrics[RETRIES] == 0 and later["rollout/prompt_tokens"] == 0


def test_the_first_prefix_of_a_mode_goes_alone_after_new_weights():
    async def scenario(server, engine):
        await gather(engine, [request(q, prompt=(9, 9, 9, q), samples=2) for q in range(6)])
        before, server.prefixes = server.prefixes, []
        engine.serve_version(4)
        server.version = "4"
        await gather(engine, [request(q, mode, prompt=(9, 9, 9, q)) for q in range(3) for mode in MODES])
        return before, server.prefixes

    before, after = run(scenario)
    assert before[:2] == ["begin", "end"] and before[2:4] == ["begin", "begin"]  # the others went together
    assert after[:4] == ["begin", "begin", "end", "end"] and Counter(after) == {"begin": 6, "end": 6}  # two modes


def test_a_stalled_first_prefix_does_not_hold_up_the_others(monkeypatch):
    monkeypatch.setattr(sglang, "ALONE_SECONDS", 0.05)

    async def scenario(server, engine):
        release = asyncio.Event()

        async def stall(http, payload):
            await release.wait()
            return good_answer(payload)

        server.prefix_script = [stall]
        arrived = []
        async for rollout in engine.submit([request(q) for q in range(4)]):
            arrived.append(rollout)
            if len(arrived) == 9:  # all of the other questions
                release.set()
        return arrived

    assert len(run(scenario)) == 12


def test_the_next_prefix_goes_alone_if_the_first_is_cut_off():
    async def scenario(server, engine):
        async def stall(http, payload):
            await asyncio.sleep(600)

        server.prefix_script = [stall]
        work = asyncio.create_task(gather(engine, [request()]))
        while server.prefix_script:  # until it stalls
            await asyncio.sleep(0.005)
        await engine.pause()
        with pytest.raises(EnginePaused):
            await work
        await engine.resume()
        while server.cancelled < 1:
            await asyncio.sleep(0.005)
        server.prefixes.clear()
        await gather(engine, [request(q) for q in range(4)])
        return server.prefixes

    assert run(scenario)[:2] == ["begin", "end"]


def test_a_single_sample_needs_a_prefix_request_only_as_the_first_of_its_mode():
    async def scenario(server, engine):
        await gather(engine, [request(q, samples=1) for q in range(4)])
        return [p["sampling_params"]["max_new_tokens"] for p in server.seen]

    assert Counter(run(scenario)) == {0: 1, LIMIT: 4}


def test_concurrency_is_bounded():
    async def scenario(server, engine):
        return await gather(engine, [request(q) for q in range(20)]), server

    rollouts, server = run(scenario, concurrency=2)
    assert len(rollouts) == 60 and server.most_questions == 2


def test_hundreds_of_requests_at_once():
    async def scenario(server, engine):
        server.hold = asyncio.Event()
        work = asyncio.create_task(gather(engine, [request(q, samples=2) for q in range(150)]))
        while server.holding < 300:
            await asyncio.sleep(0.01)
        server.hold.set()
        return await work

    assert len(run(scenario, concurrency=200)) == 300


def test_a_failed_prefix_request_is_asked_for_again_by_another_routing_key():
    async def scenario(server, engine):
        server.prefix_script = [
            status(500),
            edited(lambda a, m, p: m.update(finish_reason={"type": "abort"})),
            edited(lambda a, m, p: m.update(id="x")),
        ]
        return await gather(engine, [request()]), server, engine.metrics()

    rollouts, server, metrics = run(scenario)
    assert len(rollouts) == 3 and len(set(server.keys)) == 4 and len(server.seen) == 7
    assert [metrics[f"{RETRIES}/{cause}"] for cause in ("unavailable", "aborted", "damaged")] == [1, 1, 1]


def test_attempts_are_limited():
    async def scenario(server, engine):
        server.script = [edited(lambda a, m, p: m["weight_versions"][0].update(version="2"))] * 9
        with pytest.raises(
            EngineError, match=r"question 4 \(normal\) in 3 attempts .*retries=2.*'2' instead of version 3"
        ):
            await gather(engine, [request(4, samples=1)])
        return len(server.seen)

    assert run(scenario) == 1 + 3


def test_unavailability_is_limited_by_time_not_attempts():
    async def scenario(server, engine):
        server.script = [status(503)] * 1000
        with pytest.raises(EngineError, match="kept question 0 .* waiting .*unavailable_seconds=0.3.*503"):
            await gather(engine, [request()])
        return engine.metrics()[f"{RETRIES}/unavailable"]

    assert run(scenario, unavailable_seconds=0.3, retries=0) > 3


def test_a_server_that_is_not_there_is_waited_for_and_then_named():
    async def main():
        engine = make_engine("http://127.0.0.1:9", unavailable_seconds=0.1)
        engine.serve_version(0)
        try:
            with pytest.raises(EngineError, match=r"127\.0\.0\.1:9 kept question 0"):
                await gather(engine, [request()])
        finally:
            await engine.aclose()

    asyncio.run(main())


def test_a_silent_server_is_left_after_the_time_limit():
    async def scenario(server, engine):
        async def silent(http, payload):
            await asyncio.sleep(600)

        server.script = [silent]
        rollouts = await gather(engine, [request()])
        while server.cancelled < 1:
            await asyncio.sleep(0.01)
        return rollouts, engine.metrics()

    rollouts, metrics = run(scenario, request_seconds=0.5)
    assert len(rollouts) == 3 and metrics[f"{RETRIES}/time_limit"] == metrics[RETRIES] == 1


def test_versions_are_those_served_when_the_answer_comes():
    async def scenario(server, engine):
        server.hold, server.version = asyncio.Event(), "3"
        work = asyncio.create_task(gather(engine, [request(samples=1)]))
        while not server.holding:
            await asyncio.sleep(0.005)
        engine.serve_version(4)
        server.hold.set()
        while not engine.stats.modes[Mode.NORMAL].retries.total():
            await asyncio.sleep(0.005)
        server.version = "4"
        return await work

    (rollout,) = run(scenario, retries=50)
    assert rollout.weight_versions == [(0, 4)]


def test_without_stop_tokens_responses_have_full_length():
    async def scenario(server, engine):
        return await gather(engine, [request(samples=4)])

    assert [len(rollout.tokens) for rollout in run(scenario, stop_token_ids=())] == [LIMIT] * 4


def test_pause_ends_submit_and_resume_starts_afresh():
    async def scenario(server, engine):
        server.hold = asyncio.Event()
        work = asyncio.create_task(gather(engine, [request(q) for q in range(3)]))
        while server.holding < 9:
            await asyncio.sleep(0.005)
        await engine.pause()
        with pytest.raises(EnginePaused, match="again after resume"):
            await work
        with pytest.raises(EnginePaused, match="is paused"):
            await gather(engine, [request()])
        while server.cancelled < 9:  # the connections were closed, so the server stops too
            await asyncio.sleep(0.005)
        server.hold = None
        await engine.resume()
        return await gather(engine, [request(q) for q in range(3)])

    assert len(run(scenario)) == 9


def test_a_consumer_that_leaves_stops_the_server():
    async def scenario(server, engine):
        async with aclosing(engine.submit([request(q) for q in range(3)])) as stream:
            await anext(stream)
            server.hold = asyncio.Event()
        left = asyncio.create_task(gather(engine, [request(9)]))
        while server.holding < 3:
            await asyncio.sleep(0.005)
        before = server.cancelled
        left.cancel()
        with pytest.raises(asyncio.CancelledError):
            await left
        while server.cancelled < before + 3:
            await asyncio.sleep(0.005)
        server.hold = None
        return await gather(engine, [request(10)])

    assert len(run(scenario)) == 3


def test_nothing_is_sent_that_a_server_would_die_of():
    async def scenario(server, engine):
        for prompt, words in (([1, VOCAB], "outside 0 to 31"), ([-1], "outside"), ([], "is empty")):
            with pytest.raises(EngineError, match=f"prompt of question 0 .*{words}"):
                await gather(engine, [request(prompt=prompt)])
        with pytest.raises(EngineError, match="response of sequence 1 has ids outside"):
            await engine.log_probs([([1], [2]), ([1], [VOCAB])])
        return server.seen

    assert run(scenario) == []


def test_an_engine_without_weights_generates_nothing():
    async def main():
        engine = make_engine("http://127.0.0.1:9")
        with pytest.raises(EngineError, match="sync them first"):
            await gather(engine, [request()])
        with pytest.raises(EngineError, match="sync them first"):
            await engine.health()
        await engine.aclose()

    asyncio.run(main())


def test_scores_end_with_the_first_error():
    async def scenario(server, engine):
        server.script = [status(400, "Input length (9 tokens) exceeds the maximum")]
        with pytest.raises(EngineError, match="context-length"):
            await engine.log_probs([([1, 2], [4])] * 5)

    run(scenario)


def test_health_is_a_generated_token_of_the_served_weights():
    async def scenario(server, engine):
        assert await engine.health() == 3
        server.version = "default"
        with pytest.raises(EngineError, match="'default' instead of version 3"):
            await engine.health()

    run(scenario)


def test_the_key_is_sent_and_not_shown():
    async def scenario(server, engine):
        async def tell(http, payload):
            assert http.headers["Authorization"] == f"Bearer {KEY}"
            return web.Response(status=403, text=f"not allowed: {http.headers['Authorization']}")

        server.prefix_script = [tell]
        with pytest.raises(EngineError, match=r"not allowed: Bearer \*\*\*") as caught:
            await gather(engine, [request()])
        assert KEY not in repr(caught.value) and KEY not in repr(vars(caught.value))

    run(scenario)


def test_the_http_client_tells_time_limit_from_drop():
    async def main():
        async with serving() as (server, engine):
            server.script = [drop]
            client = SglangClient(engine._client.address, timeout_seconds=5)
            try:
                with pytest.raises(EngineError) as dropped:
                    await client.generate(payload_of(1))
                server.hold = asyncio.Event()
                with pytest.raises(EngineError) as silent:
                    await client.generate(payload_of(1), timeout_seconds=0.2)
            finally:
                await client.close()
            return type(dropped.value).__name__, type(silent.value).__name__, str(silent.value)

    assert asyncio.run(main())[:2] == ("EngineUnreachable", "EngineTimedOut")
