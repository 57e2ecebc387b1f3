"""Policy Split's eta by optimizer step: values, the signals made with them, and the count through a resume."""

import math

import pytest
import torch

from megatron_policysplit.algorithms.advantages import TokenStatistics
from megatron_policysplit.algorithms.methods import build_algorithm, policy_split
from megatron_policysplit.algorithms.signals import RowSettings, SignalBuilder
from megatron_policysplit.config import AlgorithmConfig, Config
from megatron_policysplit.rows.plan import make_plan
from tests.support.advantage_batches import random_batch

PLAIN = {
    "linear": [0.4, 0.325, 0.25, 0.175, 0.1, 0.1, 0.1],
    "cosine": [0.1 + 0.3 * (1 + math.cos(math.pi * min(k, 4) / 4)) / 2 for k in range(7)],
    "constant": [0.4] * 7,
}


def algorithm(schedule):
    given = {"eta": 0.4, "eta_end": 0.1, "eta_steps": 4, "eta_schedule": schedule}
    return build_algorithm(AlgorithmConfig(name="policy_split", options={"policy_split": given}))


def source(chosen, state=None):
    """Of a batch that is trained in two optimizer steps."""
    rows, batch = random_batch()
    lengths = batch.offsets.diff().tolist()
    old = [TokenStatistics(*s) for s in zip(batch.logprobs.split(lengths), batch.entropy.split(lengths), strict=True)]
    plan = make_plan(rows, [True] * len(rows), replicas=1, optimizer_steps=2, max_tokens=1000, seed=0)
    return SignalBuilder(rows, old, plan, chosen, RowSettings.of(Config()), state=state), batch


def advantages_of(batch, eta, rows):
    """Policy Split's with a constant eta, of the tokens of these rows."""
    whole = policy_split.advantages(batch, policy_split.Options(eta=eta))
    by_row = whole.split(batch.offsets.diff().tolist())
    return torch.cat([by_row[row] for row in rows])


@pytest.mark.parametrize("schedule", PLAIN)
def test_each_optimizer_step_has_the_eta_of_its_number_also_after_a_resume(schedule):
    chosen, state, used = algorithm(schedule), None, []
    for _ in range(3):  # batches of two steps; the state goes through what a checkpoint holds
        made, batch = source(chosen, dict(state) if state else None)
        for step in (0, 1):
            signals = made.for_step(step)
            found = torch.cat([signal.advantages for signal in signals.values()])
            with_eta = {eta: advantages_of(batch, eta, signals) for eta in PLAIN[schedule]}
            used.append(min(with_eta, key=lambda eta: (with_eta[eta] - found).abs().max()))
            torch.testing.assert_close(found, with_eta[used[-1]], rtol=1e-6, atol=1e-7)
        state = made.state
    assert used == pytest.approx(PLAIN[schedule][:6])
    logged = {"method/step": 6.0, "method/eta": pytest.approx(PLAIN[schedule][6])}
    found = {name: value for name, value in made.metrics().items() if name.startswith("method/")}
    assert found == ({} if schedule == "constant" else logged)


def test_a_schedule_that_goes_nowhere_is_the_constant():
    _, batch = random_batch()
    for schedule in ("linear", "cosine"):
        options = policy_split.Options(eta=0.3, eta_end=0.3, eta_schedule=schedule)
        found = policy_split.signals(batch, options, policy_split.state_at(options, 17)).advantages
        assert torch.equal(found, policy_split.advantages(batch, policy_split.Options(eta=0.3)))
