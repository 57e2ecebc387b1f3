"""What the `sglang` engine gets from a real server, against transformers' log-probs on the same weights."""

import asyncio
import shutil

import pytest

from megatron_policysplit.rollout.engine import EnginePaused, Sampling
from megatron_policysplit.rollout.sglang_http import EngineRefused, SglangClient
from megatron_policysplit.rows import MODES, Mode
from tests.support.sglang import STOP_TOKENS, TOLERANCE, ask, connected, keys, prompt_of, rollouts_of

pytestmark = pytest.mark.contract


def sampling(temperature=1.0, top_p=1.0, top_k=-1, max_tokens=12):
    return Sampling(temperature, top_p, top_k, max_tokens)


def generate(address, requests, **settings):
    async def run():
        async with connected(address, **settings) as engine:
            return await rollouts_of(engine, requests), engine.metrics()

    return asyncio.run(run())


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_logprobs_are_those_of_transformers_at_the_temperature(server, reference, temperature):
    requests = ask(range(6), samples=3, modes=MODES, sampling=sampling(temperature))
    rollouts, _ = generate(server.address, requests)
    assert all(rollout.weight_versions == [(0, 0)] for rollout in rollouts)
    reference.assert_agrees(rollouts, requests)


def test_a_wrong_temperature_would_show(server, reference):
    """The comparison above can fail."""
    requests = ask([1], samples=1, sampling=sampling(0.7))
    (rollout,), _ = generate(server.address, requests)
    at_one = reference.logprobs(0, requests[0].prompt, rollout.tokens, temperature=1.0)
    assert max(abs(a - b) for a, b in zip(rollout.engine_logprobs, at_one, strict=True)) > 100 * TOLERANCE


@pytest.mark.parametrize("filters", [{"top_p": 0.5}, {"top_k": 2}])
def test_logprobs_are_of_the_unfiltered_distribution(server, reference, filters):
    requests = ask(range(4), sampling=sampling(1.5, **filters))
    rollouts, _ = generate(server.address, requests)
    reference.assert_agrees(rollouts, requests)


def test_the_stop_token_is_kept_and_nothing_follows_it(server):
    requests = ask(range(8), samples=4, sampling=sampling(1.5, max_tokens=24))
    rollouts, _ = generate(server.address, requests)
    for rollout in rollouts:
        *before, last = rollout.tokens
        assert not set(before) & set(STOP_TOKENS)
        if rollout.finish_reason == "stop":
            assert last in STOP_TOKENS
        else:
            assert rollout.finish_reason == "length" and last not in STOP_TOKENS and len(rollout.tokens) == 24
    assert {rollout.finish_reason for rollout in rollouts} == {"stop", "length"}


def test_every_given_stop_token_ends_a_response(server):
    requests = ask(range(6), samples=4, sampling=sampling(2.0, max_tokens=24))
    stops = (5, *range(6, 16))
    rollouts, _ = generate(server.address, requests, stop_token_ids=stops)
    ends = {rollout.tokens[-1] for rollout in rollouts if rollout.finish_reason == "stop"}
    assert len(ends) > 2 and ends <= set(stops)
    assert all(not set(rollout.tokens[:-1]) & set(stops) for rollout in rollouts)


def test_without_stop_tokens_every_response_has_its_full_length(server):
    requests = ask(range(4), samples=4, sampling=sampling(2.0, max_tokens=40))
    rollouts, _ = generate(server.address, requests, stop_token_ids=())
    assert {len(rollout.tokens) for rollout in rollouts} == {40}
    assert any(5 in rollout.tokens for rollout in rollouts)


def test_the_samples_of_a_prompt_differ(server):
    rollouts, _ = generate(server.address, ask([1], samples=8, sampling=sampling(2.0)))
    assert len({tuple(rollout.tokens) for rollout in rollouts}) > 1


def test_a_prompt_is_computed_once_for_all_its_samples(server):
    """The server's own count: the whole prompt once, then the last token alone for every sample."""
    samples, length = 8, 64
    requests = ask(range(3), samples=samples, length=length)
    server.call("flush")
    _, metrics = generate(server.address, requests)
    prompt = len(requests[0].prompt)
    assert metrics["rollout/prompt_tokens"] == 3 * samples * prompt
    assert metrics["rollout/prefill_tokens"] <= 3 * (prompt + samples)
    assert metrics["rollout/cached_prompt_share"] >= 1 - (prompt + samples) / (samples * prompt)


def test_the_high_entropy_prefix_is_shared_by_all_questions(server):
    """Only the first question computes the system turn; `flush` makes it be computed again.

    An engine asks for the first prefix by itself, after which the sample computes the last token again.
    """
    requests = [ask([question], samples=1, modes=[Mode.HIGH_ENTROPY]) for question in range(3)]
    shared = 8

    def prefilled(request):
        return generate(server.address, request)[1]["rollout/high_entropy/prefill_tokens"]

    server.call("flush")
    whole = len(requests[0][0].prompt)
    assert prefilled(requests[0]) == whole + 1
    assert prefilled(requests[1]) <= whole + 1 - shared
    server.call("flush")
    assert prefilled(requests[2]) == whole + 1


def test_scores_of_given_responses(server, reference):
    sequences = [(prompt_of(question), [7, 26, 9 + question, 5]) for question in range(4)]

    async def run():
        async with connected(server.address) as engine:
            return await engine.log_probs(sequences)

    for (prompt, response), scores in zip(sequences, asyncio.run(run()), strict=True):
        assert scores == pytest.approx(reference.logprobs(0, prompt, response), abs=TOLERANCE)


def test_rollouts_carry_the_version_that_the_server_was_given(server, reference):
    server.call("set_version", "7")
    assert server.call("version") == "7"
    rollouts, _ = generate(server.address, ask(range(3)), version=7)
    assert {tuple(rollout.weight_versions) for rollout in rollouts} == {((0, 7),)}


def in_flight(server, between, *, max_tokens=400, **settings):
    """Rollouts of long requests, the metrics, and what `between(client)` gave while the server generated them."""

    async def run():
        client = SglangClient(server.address, timeout_seconds=20.0)
        requests = ask(range(4), samples=1, sampling=sampling(max_tokens=max_tokens))
        async with connected(server.address, stop_token_ids=(), **settings) as engine:
            work = asyncio.ensure_future(rollouts_of(engine, requests))
            await asyncio.sleep(0.3)
            given = await between(client)
            await client.close()
            return await work, requests, engine.metrics(), given

    return asyncio.run(run())


def test_a_version_that_changes_in_mid_response_gives_spans(server):
    async def change(client):
        await client.call("POST", "/pause_generation", {"mode": "in_place"})
        await client.set_version("1")
        await client.proceed()

    rollouts, _, _, _ = in_flight(server, change, version=1, max_staleness=1)
    spans = [rollout.weight_versions for rollout in rollouts]
    assert all([version for _, version in span] == [0, 1] for span in spans)
    assert all(0 < span[1][0] < 400 for span in spans)


def test_a_response_of_two_versions_is_asked_for_again_when_none_may_be_older(server):
    async def change(client):
        await client.call("POST", "/pause_generation", {"mode": "in_place"})
        await client.set_version("1")
        await client.proceed()

    rollouts, _, metrics, _ = in_flight(server, change, version=1)
    assert all(rollout.weight_versions == [(0, 1)] for rollout in rollouts)
    assert metrics["rollout/engine_retries/wrong_version"] == 4


def test_a_paused_server_aborts_and_the_rest_comes_from_the_new_weights(server, reference, tmp_path):
    """What the abort cut off is never delivered; after `proceed` everything is there, by one version."""
    directory = shutil.copytree(reference.path, tmp_path / "model")
    reference.save(1, directory)

    async def update(client):
        await client.pause()
        await client.update_from_disk(str(directory))
        await client.flush()
        await client.set_version("1")
        await client.proceed()

    rollouts, requests, metrics, _ = in_flight(server, update, version=1)
    reference.assert_agrees(rollouts, requests)
    assert all(rollout.weight_versions == [(0, 1)] for rollout in rollouts)
    assert {len(rollout.tokens) for rollout in rollouts} == {400}
    assert metrics["rollout/engine_retries/aborted"] == 4


def test_pausing_the_engine_ends_its_requests_on_the_server_too(server):
    async def run():
        client = SglangClient(server.address, timeout_seconds=20.0)
        async with connected(server.address, stop_token_ids=()) as engine:
            requests = ask(range(4), samples=2, sampling=sampling(max_tokens=480))
            work = asyncio.ensure_future(rollouts_of(engine, requests))
            await asyncio.sleep(0.3)
            await engine.pause()
            with pytest.raises(EnginePaused):
                await work
            with pytest.raises(EnginePaused):
                await rollouts_of(engine, requests)
            for _ in range(100):  # the server looks for clients that left every four seconds
                try:
                    await client.flush()
                    break
                except EngineRefused:
                    await asyncio.sleep(0.1)
            else:
                raise AssertionError("the server still generates what nobody waits for")
            await engine.resume()
            short = ask(range(4), sampling=sampling(max_tokens=4))
            assert [rollout.key for rollout in await rollouts_of(engine, short)] == keys(short)
            await client.close()

    asyncio.run(run())


def test_the_cache_is_not_flushed_under_running_requests(server):
    async def flush(client):
        with pytest.raises(EngineRefused) as refused:
            await client.flush()
        return refused.value.status

    _, _, _, status = in_flight(server, flush)
    assert status == 400


def test_a_weight_session_opens_once_and_ends_once(server):
    server.call("pause")
    server.call("begin_update")
    with pytest.raises(EngineRefused, match="already open"):
        server.call("begin_update")
    server.call("end_update")
    with pytest.raises(EngineRefused, match="no weight-update session is open"):
        server.call("end_update")


def test_buckets_need_a_session(server):
    server.call("pause")
    with pytest.raises(EngineRefused, match="between begin_weight_update"):
        server.call("update_from_distributed", ["model.norm.weight"], ["float32"], [[128]], "no group")
