"""What the SGLang engine takes for an answer, asks for again, and gives up on."""

import asyncio
import math
import re
from collections import Counter

import pytest

from megatron_policysplit.errors import EngineError
from megatron_policysplit.rollout.engine import Request, Sampling
from megatron_policysplit.rows import Mode
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
    half,
    half_json,
    no_json,
    payload_of,
    request,
    run,
    status,
)

OTHER_STOP = 7


def replace_entry(position, index, value):
    def edit(answer, meta, payload):
        meta["output_token_logprobs"][position][index] = value
        answer["output_ids"] = [entry[1] for entry in meta["output_token_logprobs"]]

    return edit


def short_length(answer, meta, payload):
    for tokens in (answer["output_ids"], meta["output_token_logprobs"]):
        del tokens[3:]
    meta["completion_tokens"] = meta["weight_versions"][0]["end"] = 3


def too_many(answer, meta, payload):
    answer["output_ids"].append(20)
    meta["output_token_logprobs"].append([-1.0, 20, None])
    meta["completion_tokens"] = meta["weight_versions"][0]["end"] = LIMIT + 1


def abort(answer, meta, payload):
    meta["finish_reason"] = {"type": "abort", "message": "Aborted"}
    del meta["prompt_tokens"]


def other_version(version):
    return edited(lambda answer, meta, payload: meta["weight_versions"][0].update(version=version))


FAILURES = {
    "500": (status(500), "unavailable"),
    "502": (status(502), "unavailable"),
    "503": (status(503), "unavailable"),
    "504": (status(504), "unavailable"),
    "429": (status(429), "unavailable"),
    "dropped": (drop, "unavailable"),
    "half answer": (half, "unavailable"),
    "half JSON": (half_json, "unavailable"),
    "abort": (edited(abort), "aborted"),
    "no JSON": (no_json, "damaged"),
    "sent twice on the way": (status(400, "Duplicate request ID detected: 17"), "damaged"),
    "no meta_info": (edited(lambda a, m, p: a.pop("meta_info")), "damaged"),
    "another request's": (edited(lambda a, m, p: m.update(id="0" * 32)), "damaged"),
    "another prompt's": (edited(lambda a, m, p: m.update(prompt_tokens=2)), "damaged"),
    "tokens cut": (edited(lambda a, m, p: a["output_ids"].pop()), "damaged"),
    "log-probs cut": (edited(lambda a, m, p: m["output_token_logprobs"].pop()), "damaged"),
    "no log-probs": (edited(lambda a, m, p: m.pop("output_token_logprobs")), "damaged"),
    "other ids": (edited(lambda a, m, p: a["output_ids"].__setitem__(0, 30)), "damaged"),
    "count": (edited(lambda a, m, p: m.update(completion_tokens=1)), "damaged"),
    "null log-prob": (edited(replace_entry(1, 0, None)), "damaged"),
    "NaN log-prob": (edited(replace_entry(1, 0, math.nan)), "damaged"),
    "infinite log-prob": (edited(replace_entry(1, 0, -math.inf)), "damaged"),
    "positive log-prob": (edited(replace_entry(1, 0, 0.01)), "damaged"),
    "outside the vocabulary": (edited(replace_entry(1, 1, VOCAB)), "damaged"),
    "negative id": (edited(replace_entry(1, 1, -1)), "damaged"),
    "too short": (edited(short_length), "damaged"),
    "too long": (edited(too_many), "damaged"),
    "no finish": (edited(lambda a, m, p: m.update(finish_reason=None)), "damaged"),
    "odd finish": (edited(lambda a, m, p: m.update(finish_reason={"type": "what"})), "damaged"),
    "stop without its token": (
        edited(lambda a, m, p: m.update(finish_reason={"type": "stop", "matched": 5})),
        "damaged",
    ),
    "no cached_tokens": (edited(lambda a, m, p: m.pop("cached_tokens")), "damaged"),
    "no versions": (edited(lambda a, m, p: m.pop("weight_versions")), "damaged"),
    "version gap": (edited(lambda a, m, p: m["weight_versions"][0].update(start=1)), "damaged"),
    "version end": (edited(lambda a, m, p: m["weight_versions"][0].update(end=2)), "damaged"),
    "older version": (other_version("2"), "wrong_version"),
    "newer version": (other_version("4"), "wrong_version"),
    "before the first sync": (other_version("default"), "wrong_version"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_what_is_not_whole_is_asked_for_again(name):
    step, cause = FAILURES[name]

    async def scenario(server, engine):
        asked = request(samples=3)
        asked = Request(*[*asked.__dict__.values()][:-1], seeds=[20, 21, 22])
        server.script = [step]  # hits whichever sample comes first: one with full length or one that stops
        rollouts = await gather(engine, [asked])
        return rollouts, [p["sampling_params"].get("sampling_seed") for p in server.seen], engine.metrics()

    rollouts, seeds, metrics = run(scenario)
    assert sorted(r.sample for r in rollouts) == [0, 1, 2]
    for rollout in rollouts:
        assert rollout.tokens == good_answer(payload_of(20 + rollout.sample))["output_ids"]
    assert metrics[RETRIES] == metrics[f"{RETRIES}/{cause}"] == metrics["rollout/normal/engine_retries"] == 1
    assert Counter(seeds) == {None: 1, 20: 2, 21: 1, 22: 1}  # the failed one again, and only that


def test_another_samples_answer_is_not_taken_twice():
    async def scenario(server, engine):
        first = []

        async def remember(http, payload):
            first.append(good_answer(payload))
            return first[0]

        async def repeat(http, payload):
            return first[0]

        server.script = [remember, repeat, repeat]
        return await gather(engine, [request()]), engine.metrics()

    rollouts, metrics = run(scenario)
    assert sorted(r.sample for r in rollouts) == [0, 1, 2] and metrics[f"{RETRIES}/damaged"] == 2


def finish(reason):
    return edited(lambda answer, meta, payload: meta.update(finish_reason=reason))


ERRORS = {
    "too long": (status(400, "The input (200 tokens) is longer than the model's context length"), "max_prompt_tokens"),
    "key": (status(401, f"wrong key {KEY}"), "api_key_variable"),
    "refused": (status(422, "cannot read it"), "SGLang server"),
    "bad request": (status(400, "top_p must be in (0, 1]"), "top_p"),
    "out of KV space": (status(500, "Out of memory even after retracting all other requests"), "mem-fraction-static"),
    "aborted for KV space": (
        finish({"type": "abort", "message": "Out of memory even after retracting", "status_code": None}),
        "max-total-tokens",
    ),
    "foreign stop": (finish({"type": "stop", "matched": OTHER_STOP}), f"at {OTHER_STOP},.*none of.*{STOP}"),
    "stop string": (finish({"type": "stop", "matched": "</s>"}), "'</s>'"),
    "not finite": (finish({"type": "stop", "matched": "NaN happened"}), "not finite"),
    "missed stop": (edited(replace_entry(2, 1, STOP)), f"after token {STOP}"),
    "missed stop at the end": (edited(replace_entry(-1, 1, STOP)), f"after token {STOP}"),
    "cut by the server": (
        edited(lambda a, m, p: (short_length(a, m, p), m["finish_reason"].update(length=3))),
        "at 3 of rollout.max_response_tokens=6",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_no_repetition_can_mend_is_an_error_at_once(name):
    step, words = ERRORS[name]

    async def scenario(server, engine):
        server.hold = asyncio.Event()  # the others are still being generated
        asked = Request(0, 0, Mode.NORMAL, [1], Sampling(1.0, 1.0, -1, LIMIT), range(3), [20, 22, 24])
        server.script = [step]
        work = asyncio.create_task(gather(engine, [asked]))
        while server.holding < 3:
            await asyncio.sleep(0.005)
        release(server)
        with pytest.raises(EngineError) as caught:
            await work
        return str(caught.value), len(server.seen)

    def release(server):
        held, server.hold = server.hold, None
        held.set()

    message, seen = run(scenario)
    assert re.search(words, message) and "http://127.0.0.1" in message and KEY not in message
    assert seen == 4


def test_weight_versions_become_spans_and_staleness_is_bounded():
    def spans(answer, meta, payload):
        meta["weight_versions"] = [{"version": "2", "start": 0, "end": 4}, {"version": "3", "start": 4, "end": LIMIT}]

    def stale(answer, meta, payload):
        meta["weight_versions"] = [{"version": "1", "start": 0, "end": 1}, {"version": "3", "start": 1, "end": LIMIT}]

    async def scenario(server, engine):
        server.script = [edited(stale), edited(spans)]
        asked = Request(0, 0, Mode.NORMAL, [1], Sampling(1.0, 1.0, -1, LIMIT), [0], [20])
        return await gather(engine, [asked]), engine.metrics()

    (rollout,), metrics = run(scenario, max_staleness=1)
    assert rollout.weight_versions == [(0, 2), (4, 3)] and metrics[f"{RETRIES}/wrong_version"] == 1


def test_scores_are_of_the_response_tokens():
    def last_id_is_called_zero(answer, meta, payload):
        assert meta["input_token_logprobs"][-1][1] == VOCAB - 1
        meta["input_token_logprobs"][-1][1] = 0

    def other_tokens(answer, meta, payload):
        meta["input_token_logprobs"][-1][1] = 6

    async def scenario(server, engine):
        server.script = [edited(last_id_is_called_zero), edited(other_tokens), status(503)]
        first = await engine.log_probs([([1, 2], [4, VOCAB - 1])])
        return (
            first,
            await engine.log_probs([([1, 2, 3], [4]), ([1], [7, 8, 9])]),
            server.seen,
            await engine.log_probs([]),
        )

    first, scores, seen, nothing = run(scenario, concurrency=1)
    assert first == [pytest.approx([-0.4, -0.1 * (VOCAB - 1)])] and nothing == []
    assert scores == [pytest.approx([-0.4]), pytest.approx([-0.7, -0.8, -0.9])]
    assert len(seen) == 5 and {p["sampling_params"]["temperature"] for p in seen} == {1.0}
    assert {p["sampling_params"]["max_new_tokens"] for p in seen} == {0}
    assert [(p["input_ids"], p["logprob_start_len"]) for p in seen[-1:]] in ([([1, 7, 8, 9], 0)], [([1, 2, 3, 4], 2)])
