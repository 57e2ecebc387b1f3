"""A real server draws from the distribution whose log-probs it reports, and every draw is independent of the others.

Log-probs alone cannot show that: a server that repeated its random numbers after every weight sync, or gave all samples
of a prompt the same ones, would report the right ones too. So every drawn token is turned into the number in (0, 1)
that would have drawn it by inverting the cumulative probabilities, computed by transformers; the token's own share is
spread evenly by numbers of the test. If the draws are right, these are independent and uniform. The bounds let one
right server in a million fail.
"""

import asyncio
import math

import numpy as np
import pytest

from megatron_policysplit.rollout.engine import Sampling
from megatron_policysplit.rows import MODES, Mode
from tests.support.sglang import ask, connected, prompt_of, rollouts_of

pytestmark = pytest.mark.contract

ROUNDS, QUESTIONS, SAMPLES = 16, 8, 8
SIGMAS = 5.0


def drawn(server, temperature: float) -> list:
    """Rollouts of the same questions in rounds, each with new seeds and after the cache was emptied, as by a sync."""
    sampling = Sampling(temperature, 1.0, -1, 8)

    async def run() -> list:
        rollouts = []
        client = server.client()
        async with connected(server.address, concurrency=16) as engine:
            for batch in range(ROUNDS):
                await client.pause()
                await client.flush()
                await client.set_version("0")
                await client.proceed()
                engine.serve_version(0)
                requests = ask(range(QUESTIONS), SAMPLES, modes=MODES, sampling=sampling, batch=batch)
                rollouts += await rollouts_of(engine, requests)
        await client.close()
        return rollouts

    return asyncio.run(run())


@pytest.fixture(scope="module", params=[1.0, 0.7])
def uniforms(request, live, reference) -> dict[tuple, float]:
    """(round, question, mode, sample, position) -> the number that drew that token."""
    live.reset()
    spread, found = np.random.default_rng(0), {}
    for rollout in drawn(live, request.param):
        prompt = prompt_of(rollout.question, rollout.mode)
        scores = reference.distributions(0, prompt, rollout.tokens, request.param).double().exp().numpy()
        for position, token in enumerate(rollout.tokens):
            below, own = scores[position, :token].sum(), scores[position, token]
            key = (rollout.batch, rollout.question, rollout.mode, rollout.sample, position)
            found[key] = below + spread.random() * own
    return found


def test_draws_follow_the_distribution(uniforms):
    numbers = np.sort(list(uniforms.values()))
    count = len(numbers)
    assert count > 5000
    steps = np.arange(count + 1) / count
    distance = max(np.abs(numbers - steps[1:]).max(), np.abs(numbers - steps[:-1]).max())
    # Dvoretzky-Kiefer-Wolfowitz with Massart's constant: P(distance > bound) <= 2 exp(-2 n bound^2) = 1e-6
    assert distance < math.sqrt(math.log(2e6) / (2 * count)), distance


def other_round(key):
    return (key[0] + 1, *key[1:])


def other_sample(key):
    return (*key[:3], key[3] + 1, key[4])


def other_mode(key):
    return (*key[:2], Mode.HIGH_ENTROPY, *key[3:]) if key[2] == Mode.NORMAL else None


def other_question(key):
    return (key[0], key[1] + 1, *key[2:])


def next_position(key):
    return (*key[:4], key[4] + 1)


@pytest.mark.parametrize("other", [other_round, other_sample, other_mode, other_question, next_position])
def test_draws_are_independent(uniforms, other):
    pairs = np.array([(number, uniforms[other(key)]) for key, number in uniforms.items() if other(key) in uniforms])
    assert len(pairs) > 2000
    assert abs(np.corrcoef(pairs.T)[0, 1]) * math.sqrt(len(pairs)) < SIGMAS
