"""A real server follows a sharded actor by every transport: its log-probs are transformers' on the new weights."""

import asyncio
import shutil

import pytest

from tests.support.dist import run_distributed
from tests.support.sglang import ask, connected, rollouts_of
from tests.support.weight_sync import sync_config, syncing

pytestmark = pytest.mark.contract

LAYOUTS = [("tensor", 2, 1), ("tensor", 1, 2), ("distributed", 2, 1), ("distributed", 2, 2), ("disk", 1, 2)]


def push(rank, config, weights, versions):
    """Load the weights of each version into the actor and push them; what the pushes returned."""
    from megatron_policysplit.actor.weights import load_weights

    failures = []
    with syncing(config) as (sync, _, actor, _):
        for version, directory in zip(versions, weights, strict=True):
            load_weights(actor.model, directory)
            failures.append(sync.push(version))
    return failures


def saved(reference, version, directory):
    shutil.copytree(reference.path, directory)
    reference.save(version, directory)
    return str(directory)


def rollouts(address, version, requests):
    async def generate():
        async with connected(address, version) as engine:
            return await rollouts_of(engine, requests)

    return asyncio.run(generate())


@pytest.mark.parametrize(("transport", "tensor", "pipeline"), LAYOUTS)
def test_the_server_follows_the_actor(server, reference, tmp_path, transport, tensor, pipeline):
    """Twice: the second push reuses what the first made; and a second trainer comes after the first has gone."""
    config = sync_config(reference.path, tmp_path, transport, [server.address], tensor=tensor, pipeline=pipeline)
    versions = [3, 4]
    weights = [saved(reference, version, tmp_path / str(version)) for version in versions]
    results = run_distributed(push, tensor * pipeline, config, weights, versions, timeout_seconds=240)
    assert results == [[{}, {}]] * (tensor * pipeline)
    requests = ask(range(4), batch=1)
    answered = rollouts(server.address, 4, requests)
    assert all(rollout.weight_versions == [(0, 4)] for rollout in answered)
    reference.assert_agrees(answered, requests)


def test_old_weights_would_show(server, reference):
    """The comparison above can fail: other versions' log-probs are far away."""
    requests = ask(range(2))
    for rollout, request in zip(rollouts(server.address, 0, requests)[:1], requests, strict=False):
        expected = reference.logprobs(4, request.prompt, rollout.tokens)
        assert max(abs(a - b) for a, b in zip(rollout.engine_logprobs, expected, strict=True)) > 0.01
