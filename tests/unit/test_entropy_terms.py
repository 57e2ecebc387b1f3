"""Methods with an entropy term of their own: its gradient through the loss, its limits, its state over a run."""

import math
from dataclasses import replace

import pytest
import torch

from megatron_policysplit.algorithms.advantages import TokenStatistics, zscore
from megatron_policysplit.algorithms.loss import PolicyTokens, policy_loss
from megatron_policysplit.algorithms.methods import build_algorithm
from megatron_policysplit.algorithms.signals import RowSettings, SignalBuilder
from megatron_policysplit.algorithms.token_signals import TokenSignals
from megatron_policysplit.config import AlgorithmConfig, Config
from megatron_policysplit.rows.plan import make_plan
from tests.support.advantage_batches import random_batch

VOCAB = 13


def algorithm(name, given=None):
    return build_algorithm(AlgorithmConfig(name=name, options={name: given or {}}))


def entropies(logits):
    logprobs = logits.log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def entropy_gradient(chosen, state, plain_term):
    """d loss / d logits [T, V] less that of GRPO on the same batch, and that of `plain_term`(entropies of trained
    tokens, their rows, batch), by autograd."""
    rows, batch = random_batch(seed=3, questions=4)
    logits = 2 * torch.randn(len(batch.mask), VOCAB, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits.requires_grad_()
    now = entropies(logits.detach())
    batch = replace(batch, entropy=now)
    signals = chosen.method.signals(batch, chosen.options, state)

    def loss(terms):
        logprobs = logits.log_softmax(-1)[:, 0]
        given = TokenSignals(
            old_logprobs=logprobs.detach(),
            advantages=signals.advantages.double(),
            importance=torch.ones_like(now),
            weights=batch.mask / batch.mask.sum(),
            **terms,
        )
        return policy_loss(given, PolicyTokens(logprobs, entropies(logits)), chosen.config).loss

    (whole,) = torch.autograd.grad(loss({"entropy_coef": signals.entropy_coef}), logits)
    (without,) = torch.autograd.grad(loss({}), logits)
    (expected,) = torch.autograd.grad(plain_term(entropies(logits)[batch.mask], batch), logits)
    return whole - without, expected


@pytest.mark.parametrize("penalty", ["squared", "released"])
def test_epos_term_has_the_gradient_of_its_formula(penalty):
    given = {"coef": 0.3, "smoothing": 2.0, "kappa_low": 0.9, "kappa_high": 1.1, "penalty": penalty}
    state = {"steps": 150.0, "history": 1.4}

    def term(entropy, batch):
        low, high = 0.9 * 1.4, 1.1 * 1.4
        outside = torch.where(entropy > high, entropy - high, torch.where(entropy < low, low - entropy, 0.0))
        assert (outside > 0).any() and (outside == 0).any()
        smooth = (outside**2).mean() if penalty == "squared" else torch.where(outside > 0, 0.1, 0.0).mean()
        return -0.3 * (entropy.mean() - 2.0 * 0.8 * math.exp(-3) * smooth)

    found, expected = entropy_gradient(algorithm("epo", given), state, term)
    assert found.abs().max() > 1e-4
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


def test_aers_term_has_the_gradient_of_its_formula():
    def term(entropy, batch):
        total = 0.0
        for value, row in zip(entropy, batch.row_of_token[batch.mask].tolist(), strict=True):
            answers = batch.rewards[batch.group == batch.group[row]]
            accuracy = (answers > 0.5).double().mean()
            total = total - 0.02 * value * max(0.0, 1 - accuracy / 0.8)
        return total / len(entropy)

    found, expected = entropy_gradient(algorithm("aer", {"rho": 0.8}), {"coef": 0.02, "initial": 1.0}, term)
    assert found.abs().max() > 1e-5
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


def test_sirens_term_has_the_gradient_of_its_formula():
    """Through the loss, from the nuclei's entropies, which are leaves here: whole rows stand for the loss's share."""
    _, batch = random_batch(seed=3, questions=4)
    chosen, state = algorithm("siren", {"beta": 2.0, "share": 0.4}), {"anchor": 0.6, "entropy": 0.5}
    signals = chosen.method.signals(batch, chosen.options, state)
    inner = batch.nucleus_entropy.double().requires_grad_()
    rows = batch.row_of_token[batch.mask].unique().tolist()
    logprobs = batch.logprobs.double()
    out = policy_loss(
        TokenSignals(
            old_logprobs=logprobs,
            advantages=signals.advantages.double(),
            importance=torch.ones_like(logprobs),
            weights=batch.mask / batch.mask.sum(),
            nucleus_coef=signals.nucleus_coef / len(rows),
        ),
        PolicyTokens(logprobs, batch.entropy.double(), inner),
        chosen.config,
    )
    (found,) = torch.autograd.grad(out.loss, inner)
    means = []
    for row in rows:
        mine = inner[(batch.row_of_token == row) & batch.mask]
        means.append(mine.sort(descending=True).values[: math.ceil(0.4 * len(mine))].mean())
    (expected,) = torch.autograd.grad(2.0 * (torch.stack(means).mean() - 0.6) ** 2, inner)
    assert (expected != 0).any() and (expected == 0).any()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("given", "state"), [({"beta": 0.0}, {"anchor": 9.0}), ({"beta": 5.0}, {})], ids=str)
def test_siren_without_a_distance_is_dr_grpo(given, state):
    _, batch = random_batch()
    found = algorithm("siren", given).method.signals(batch, algorithm("siren", given).options, state)
    dr_grpo = algorithm("dr_grpo")
    assert torch.equal(found.advantages, dr_grpo.method.signals(batch, dr_grpo.options, {}).advantages)
    assert (found.nucleus_coef == 0).all() and found.scale is None and found.entropy_coef is None


@pytest.mark.parametrize(
    ("name", "given", "state", "coef"),
    [
        ("epo", {"coef": 0.0}, {"steps": 3.0, "history": 0.1}, 0.0),
        ("epo", {"coef": 0.2, "smoothing": 0.0}, {"steps": 3.0, "history": 0.1}, 0.2),
        ("epo", {"coef": 0.2}, {"steps": 0.0, "history": 0.0}, 0.2),
        ("epo", {"coef": 0.2, "penalty": "released"}, {"steps": 3.0, "history": 0.1}, 0.2),
        ("aer", {}, {"coef": 0.0, "initial": 1.0}, 0.0),
    ],
    ids=str,
)
def test_limits_are_grpo_and_the_plain_bonus(name, given, state, coef):
    _, batch = random_batch()
    found = algorithm(name, given).method.signals(batch, algorithm(name, given).options, state)
    assert torch.equal(found.advantages, batch.on_tokens(zscore(batch.rewards, batch.group)))
    assert torch.equal(found.entropy_coef[batch.mask], torch.full((int(batch.mask.sum()),), coef))


def test_epos_penalty_fades():
    from megatron_policysplit.algorithms.methods.epo import smoothing_weight

    found = [smoothing_weight(step, 150) for step in (0, 75, 76, 150, 10_000)]
    assert found == pytest.approx([1.0, 0.8 + 0.2 * math.exp(-2), 0.8 * math.exp(-3 / 75)] + [0.8 * math.exp(-3)] * 2)


# --- state -------------------------------------------------------------------------------------------


def scored(rows, entropy):
    """Every token has this entropy, over its nucleus too."""
    return [
        TokenStatistics(torch.full((n,), -1.0), torch.full((n,), entropy), nucleus_entropy=torch.full((n,), entropy))
        for n in (row.response_length for row in rows)
    ]


def after(chosen, measured, state=None):
    """The state after one batch of a step for each mean entropy in `measured`; `state` as from a checkpoint."""
    rows, _ = random_batch()
    plan = make_plan(rows, [True] * len(rows), replicas=1, optimizer_steps=1, max_tokens=1000, seed=0)
    made = None
    for entropy in measured:
        made = SignalBuilder(rows, scored(rows, entropy), plan, chosen, RowSettings.of(Config()), state=state)
        signals, state = made.for_step(0), made.state
    return state, signals, made


@pytest.mark.parametrize("name", ["epo", "aer", "siren"])
def test_a_state_taken_up_again_goes_on_as_if_nothing_had_been(name):
    chosen, measured = (
        algorithm(name, {"aer": {"rate": 0.01, "tau": 0.9, "rho": 1.0}}.get(name)),
        [0.5, 0.7, 0.3, 0.4, 0.2],
    )
    straight, signals, made = after(chosen, measured)
    first, _, _ = after(chosen, measured[:2])
    again, repeated, _ = after(chosen, measured[2:], state=dict(first))
    assert again == straight and first != straight
    field = "nucleus_coef" if name == "siren" else "entropy_coef"
    found, expected = (
        torch.cat([getattr(signal, field) for signal in each]) for each in (repeated.values(), signals.values())
    )
    assert torch.equal(found, expected) and found.any()
    assert {key: made.metrics()[f"method/{key}"] for key in straight} == straight


def test_epos_history_is_the_mean_of_the_steps_before():
    chosen = algorithm("epo", {"coef": 1.0, "kappa_high": 1.0})
    state, signals, _ = after(chosen, [0.5, 0.7, 0.9])
    assert state == pytest.approx({"steps": 3.0, "history": 0.7})
    weight = 0.8 + 0.2 * math.exp(-2 * 2 / 75)  # the third step: 0.9 nats, 0.6 before it
    assert signals[0].entropy_coef.tolist() == pytest.approx([1 - weight * 2 * 0.3] * len(signals[0].entropy_coef))


def test_aers_scale_follows_the_distance_to_a_share_of_the_first_batchs_entropy():
    chosen = algorithm("aer", {"tau": 0.5, "rate": 0.1, "coef_max": 0.03})
    states = [after(chosen, [1.0, 0.4, 0.1, 0.45, 0.9][: count + 1])[0] for count in range(5)]
    assert [state["initial"] for state in states] == [1.0] * 5
    assert [state["coef"] for state in states] == pytest.approx([0.0, 0.01, 0.03, 0.03, 0.0], abs=1e-6)


def test_sirens_anchor_is_of_the_first_batch():
    state, signals, _ = after(algorithm("siren", {"beta": 1.0}), [0.5, 0.7, 0.9])
    assert state == pytest.approx({"anchor": 0.5, "entropy": 0.9})
    trained = [signal.weights > 0 for signal in signals.values()]
    rows = sum(bool(mask.any()) for mask in trained)  # the mean is over the step's rows
    for signal, mask in zip(signals.values(), trained, strict=True):
        # All entropies of a response are equal here.
        expected = -2 * (0.9 - 0.5) / max(int(mask.sum()), 1) * mask / rows
        torch.testing.assert_close(signal.nucleus_coef, expected)


@pytest.mark.parametrize("name", ["epo", "aer", "siren"])
def test_a_batch_without_trained_tokens_leaves_the_state(name):
    _, batch = random_batch()
    chosen = algorithm(name)
    begun = chosen.method.begin(chosen.options)
    assert chosen.method.next_state(begun, replace(batch, mask=batch.mask & False), chosen.options) == begun
