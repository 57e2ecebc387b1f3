"""Every method against plain Python, its limits, and what it may not do (no gradient, no aliasing, no row order)."""

import math
import random
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_policysplit.algorithms import docs as method_docs
from megatron_policysplit.algorithms import methods
from megatron_policysplit.algorithms.advantages import zscore
from megatron_policysplit.algorithms.methods import build_algorithm
from megatron_policysplit.config import METHOD_NAMES, AlgorithmConfig
from megatron_policysplit.errors import ConfigError
from megatron_policysplit.rows import SecondRollout
from tests.reference import plain_methods
from tests.support.advantage_batches import random_batch

GIVEN = {  # options beside the defaults, so that a formula shows on a small batch
    "aer": [{}, {"rho": 0.9, "tau": 1.5, "rate": 0.5, "coef_max": 1.0}],
    "adaptive_entropy": [{"target": 10.0}, {"target": 1e-3}],
    "arm": [{}, {"alpha": 2.0, "share": 0.6}, {"share": 1.0}],
    "asym_grpo": [{}, {"beta_pos": 0.0, "beta_neg": 1.7}],
    "clip_cov": [{"ratio": 1.0, "low": 0.05, "high": 0.6}],
    "dapo": [{}],
    "edge_grpo": [{}, {"least": 0.9}],
    "entropy_adv": [{}, {"alpha": 5.0, "kappa": 1.0}],
    "entropy_bonus": [{"coef": 0.2}],
    "epo": [
        {},
        {"coef": 0.2, "kappa_low": 0.7, "kappa_high": 1.1, "smoothing": 3.0},
        {"coef": 0.2, "kappa_low": 0.7, "kappa_high": 1.1, "decay_steps": 10},
        {"coef": 0.2, "kappa_low": 0.7, "kappa_high": 1.1, "penalty": "released"},
    ],
    "forking_tokens": [{}, {"share": 0.55}, {"share": 1.0}],
    "kl_cov": [{"share": 0.15, "beta": 0.5}, {}],
    "siren": [{}, {"share": 0.45, "beta": 3.0}, {"share": 1.0, "beta": 3.0}],
    "steer": [{}, {"variant": "linear"}, {"low": 0.3}],
}
PLAIN = sorted(set(METHOD_NAMES) - {"policy_split"})  # which has a file of tests and a reference of its own
CASES = [(name, given) for name in PLAIN for given in GIVEN.get(name, [{}])]
STATES = {
    "aepo": {"entropy": 0.1},
    "scope": {"entropy": 0.1},
    "adaptive_entropy": {"coef": 0.3},
    "aer": {"coef": 0.02, "initial": 1.7},
    "epo": {"steps": 7.0, "history": 1.2},
    "siren": {"anchor": 0.8, "entropy": 0.7},
}
AUXILIARY = {"aepo": 2, "scope": 2}


def algorithm(name, given=None):
    return build_algorithm(AlgorithmConfig(name=name, options={name: given or {}}))


def moved(batch, seed=0):
    """The same batch after an optimizer step: its log-probs and entropies are no longer those of the ratio."""
    draw = torch.Generator().manual_seed(seed)
    shift = torch.randn(len(batch.logprobs), generator=draw)
    return replace(batch, logprobs=(batch.logprobs + shift).clamp(max=-1e-3), entropy=batch.entropy + 0.1 * shift.abs())


def seen(rows, batch):
    """What the reference is given of a batch."""
    tokens = [(row.key, t) for row in rows for t in range(row.response_length)]
    now = dict(zip(tokens, zip(batch.logprobs.tolist(), batch.entropy.tolist(), strict=True), strict=True))
    old = dict(zip(tokens, zip(batch.old_logprobs.tolist(), batch.entropy.tolist(), strict=True), strict=True))
    counted = {token for token, kept in zip(tokens, batch.mask.tolist(), strict=True) if kept}
    prompt = dict(zip([row.key for row in rows], batch.prompt_logprob.tolist(), strict=True))
    nucleus = dict(zip(tokens, batch.nucleus_entropy.tolist(), strict=True))
    return tokens, plain_methods.Seen(rows, old, now, counted, prompt, nucleus)


@pytest.mark.parametrize(("name", "given"), CASES, ids=str)
@pytest.mark.parametrize("later", [False, True], ids=["first-step", "later-step"])
def test_against_plain_python(name, given, later):
    rows, batch = random_batch(seed=3, questions=4, auxiliary=AUXILIARY.get(name, 0))
    batch = moved(batch) if later else batch
    chosen, state = algorithm(name, given), STATES.get(name, {})
    if chosen.config.clip_low < 10:
        batch = replace(batch, clip_low=chosen.config.clip_low, clip_high=chosen.config.clip_high)
    found = chosen.method.signals(batch, chosen.options, state)
    tokens, view = seen(rows, batch)
    expected, after = plain_methods.terms(name, view, chosen.options, dict(state))
    torch.testing.assert_close(found.advantages.tolist(), [expected[t].advantage for t in tokens], rtol=1e-5, atol=1e-6)
    ones, zeros = torch.ones(len(tokens)), torch.zeros(len(tokens))
    for value, field, without in (
        (found.scale, "scale", ones),
        (found.entropy_coef, "entropy", zeros),
        (found.drift_coef, "drift", zeros),
        (found.nucleus_coef, "nucleus", zeros),
    ):
        kept = batch.mask.tolist()
        wanted = [getattr(expected[t], field) for t, k in zip(tokens, kept, strict=True) if k]
        torch.testing.assert_close(
            (without if value is None else value)[batch.mask].tolist(), wanted, rtol=1e-4, atol=1e-5
        )
    assert chosen.method.next_state(dict(state), batch, chosen.options) == pytest.approx(after)


def test_the_cases_show_what_they_should():
    """Scales, weights and advantages that a wrong formula would change are there in the batch."""
    rows, batch = random_batch(seed=3, questions=4)
    for name, field in (("clip_cov", "scale"), ("forking_tokens", "scale"), ("kl_cov", "drift_coef")):
        for given in GIVEN[name][:1]:
            chosen = algorithm(name, given)
            value = getattr(chosen.method.signals(batch, chosen.options, {}), field)[batch.mask]
            assert 0 < (value != value[0]).sum() < len(value)


@pytest.mark.parametrize(("name", "given"), CASES, ids=str)
def test_no_gradient_no_aliasing_and_nothing_outside_the_mask(name, given):
    _, batch = random_batch(auxiliary=AUXILIARY.get(name, 0))
    batch.logprobs.requires_grad_()
    batch.entropy.requires_grad_()
    before = {name: value.detach().clone() for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    chosen, state = algorithm(name, given), STATES.get(name, {})
    first = chosen.method.signals(batch, chosen.options, dict(state))
    kept = {field: value.clone() for field, value in vars(first).items() if value is not None}
    for value in kept.values():
        assert not value.requires_grad and value.dtype == torch.float32 and value.shape == batch.mask.shape
    assert (first.advantages[~batch.mask] == 0).all()
    for field in kept:
        getattr(first, field).add_(1.0)
    again = chosen.method.signals(batch, chosen.options, dict(state))
    for field, value in kept.items():
        assert torch.equal(getattr(again, field), value)
    for field, value in before.items():
        assert torch.equal(getattr(batch, field), value), field


@pytest.mark.parametrize(("name", "given"), CASES, ids=str)
def test_rows_that_the_method_calls_dead_have_no_loss(name, given):
    rows, batch = random_batch(seed=1, auxiliary=AUXILIARY.get(name, 0))
    chosen, state = algorithm(name, given), STATES.get(name, {})
    found = chosen.method.signals(batch, chosen.options, state)
    alive = chosen.method.live(batch.rewards, batch.group, chosen.options)
    assert len(alive) == len(rows)
    dead = ~(alive | batch.auxiliary)[batch.row_of_token]
    assert (found.advantages[dead] == 0).all()
    for value in (found.entropy_coef, found.drift_coef, found.nucleus_coef):
        assert value is None or (value[dead] == 0).all()


def test_asym_grpo_at_one_half_is_grpo_with_the_populations_deviation():
    rewards, group = torch.tensor([1.0, 0, 0, 1, 1, 0, 0, 0]), torch.tensor([0, 0, 0, 0, 0, 1, 1, 1])
    chosen = algorithm("asym_grpo", {"beta_pos": 0.5, "beta_neg": 0.5})
    from megatron_policysplit.algorithms.methods.asym_grpo import response_advantages

    expected = [(r - 0.6) / (0.6 * 0.4) ** 0.5 for r in rewards[:5].tolist()] + [0.0] * 3
    torch.testing.assert_close(response_advantages(rewards, group, chosen.options).tolist(), expected)
    plus_minus = algorithm("asym_grpo", {"beta_pos": 0.0, "beta_neg": 0.0}).options
    assert response_advantages(rewards, group, plus_minus).tolist() == [1, -1, -1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("entropy_bonus", {"coef": 0.0}),
        ("entropy_adv", {"alpha": 0.0}),
        ("forking_tokens", {"share": 1.0}),
        ("kl_cov", {"beta": 0.0}),
        ("steer", {"low": 1.0}),
        ("clip_cov", {"low": 1e6, "high": 2e6}),
        ("arm", {"alpha": 0.0}),
    ],
    ids=str,
)
def test_with_nothing_to_do_a_method_is_grpo(name, given):
    _, batch = random_batch()
    chosen = algorithm(name, given)
    found = chosen.method.signals(batch, chosen.options, {})
    torch.testing.assert_close(found.advantages, batch.on_tokens(zscore(batch.rewards, batch.group)))
    assert found.scale is None or (found.scale[batch.mask] == 1).all()
    assert found.entropy_coef is None or (found.entropy_coef == 0).all()
    assert found.drift_coef is None or (found.drift_coef == 0).all()


@pytest.mark.parametrize("cache", [None, 5, 10, 0])
def test_dapo_punishes_by_length_as_equation_13_does(cache):
    from megatron_policysplit.algorithms.methods import dapo

    options = dapo.Options(cache_tokens=cache, punishment=0.5)
    found = dapo.length_reward(torch.arange(1, 11), 10, options).tolist()
    width = 2 if cache is None else cache
    for length, value in zip(range(1, 11), found, strict=True):
        expected = 0.0 if length <= 10 - width else 0.5 * ((10 - width) - length) / width
        assert value == pytest.approx(expected)
    assert found[-1] == (-0.5 if width else 0.0)


def test_dapo_keeps_questions_with_unequal_grades():
    chosen = algorithm("dapo")
    selection = chosen.method.selection(chosen.options)
    assert selection.max_rounds == 10 and chosen.config.clip_high == 0.28
    assert [selection.keeps(rewards) for rewards in ([0, 1, 0], [1, 1], [0.2], [0.2, 0.3])] == [
        True,
        False,
        False,
        True,
    ]
    off = algorithm("dapo", {"dynamic_sampling": False})
    assert off.method.selection(off.options) is None


@pytest.mark.parametrize("name", ["aepo", "scope"])
def test_auxiliary_rows_touch_neither_groups_nor_the_entropy(name):
    """All else is as without them, and each of their trained tokens has the advantage 1."""
    chosen, state = algorithm(name), {"entropy": 0.3}
    (_, without), (_, batch) = random_batch(seed=4), random_batch(seed=4, auxiliary=3)
    kept = ~batch.auxiliary[batch.row_of_token]
    assert batch.auxiliary.sum() == 6 and kept.sum() == len(without.mask)
    entropy, logprobs = batch.entropy.clone(), batch.logprobs.clone()
    entropy[kept], logprobs[kept] = without.entropy, without.logprobs
    entropy[~kept] = 50.0
    batch = replace(batch, entropy=entropy, logprobs=logprobs)
    found, expected = (chosen.method.signals(b, chosen.options, state).advantages for b in (batch, without))
    assert torch.equal(found[kept], expected) and (found[~kept] == 1).all()
    after = chosen.method.next_state(state, batch, chosen.options)
    assert after == chosen.method.next_state(state, without, chosen.options)
    assert after["entropy"] == pytest.approx(float(without.entropy[without.mask].mean()))
    nothing = replace(batch, mask=batch.mask & ~kept)
    assert chosen.method.next_state(state, nothing, chosen.options) == state


@pytest.mark.parametrize(
    ("entropy", "temperature", "most"), [(0.0, 1.2, 60), (0.5, 1.2, 60), (0.5001, 0.8, 30), (3.0, 0.8, 30)]
)
def test_aepo_samples_hot_up_to_the_target_and_cold_above(entropy, temperature, most):
    chosen = algorithm("aepo")
    asked = chosen.method.second_rollout(chosen.options, {"entropy": entropy}, 512, 5)
    assert asked == SecondRollout(temperature, questions=128, samples=5, most=most)
    assert chosen.method.begin(chosen.options) == {"entropy": 0.0}
    assert chosen.method.second_rollout(chosen.options, {"entropy": entropy}, 3, 2).most == 1
    assert chosen.config.dual_clip == 3.0


@pytest.mark.parametrize(
    ("entropy", "temperature"), [(0.0, 1.2), (0.35, 1.15), (0.5, 1.0), (0.6, 0.9), (0.7, 0.8), (4.0, 0.8)]
)
def test_scope_samples_as_far_from_1_as_the_entropy_is_from_its_target(entropy, temperature):
    chosen = algorithm("scope")
    asked = chosen.method.second_rollout(chosen.options, {"entropy": entropy}, 512, 8)
    assert asked.temperature == pytest.approx(temperature)
    assert (asked.questions, asked.samples, asked.most) == (64, 1, None)
    few = algorithm("scope", {"alpha": 0.5})
    for questions, samples, expected in ((512, 8, (512, 4)), (4, 2, (4, 1)), (2, 1, (1, 1))):
        asked = few.method.second_rollout(few.options, {"entropy": entropy}, questions, samples)
        assert (asked.questions, asked.samples) == expected
    assert chosen.method.second_rollout(chosen.options, {"entropy": entropy}, 4, 8).questions == 1


def test_policy_split_takes_the_correctness_of_another_method():
    from megatron_policysplit.algorithms.methods import asym_grpo, policy_split

    _, batch = random_batch()
    options = policy_split.Options(eta=0.0, correctness="asym_grpo", beta_pos=0.7, beta_neg=0.2)
    expected = asym_grpo.response_advantages(batch.rewards, batch.group, asym_grpo.Options(0.7, 0.2))
    assert torch.equal(policy_split.advantages(batch, options), batch.on_tokens(expected))
    bound = policy_split.advantages(batch, replace(options, eta=50.0, clamp_order="code")) - batch.on_tokens(expected)
    assert 0 < bound.abs().max() <= expected.abs().max() / options.kappa + 1e-6


def test_clip_cov_draws_as_many_as_it_should_and_the_same_again():
    _, batch = random_batch(seed=2, questions=6)
    chosen = algorithm("clip_cov", {"ratio": 0.05, "low": 0.0, "high": 100.0})
    first, second, other = (
        chosen.method.signals(replace(batch, seed=seed), chosen.options, {}).scale for seed in (1, 1, 2)
    )
    wanted = max(1, int(0.05 * int(batch.mask.sum())))
    assert (first == 0).sum() == (other == 0).sum() == wanted > 1
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_options_are_checked():
    for options, told in [
        ({"kl_cov": {"beta": -1}}, "algorithm.options.kl_cov.beta=-1.0 is not allowed; it must be at least 0"),
        ({"kl_cov": {"beta": "x"}}, "algorithm.options.kl_cov.beta=x is not a number"),
        ({"kl_cov": {"betta": 1}}, "unknown key algorithm.options.kl_cov.betta; the options of kl_cov are share, beta"),
        ({"grpo": {"eta": 1}}, "unknown key algorithm.options.grpo.eta; grpo has none"),
        ({"eta": 1}, "unknown key algorithm.options.eta; it holds options by method"),
        ({"grpo": 1}, "algorithm.options.grpo=1 is not a mapping"),
    ]:
        with pytest.raises(ConfigError) as error:
            build_algorithm(AlgorithmConfig(name="grpo", options=options))
        assert told in str(error.value)


def test_nulls_are_filled_by_the_method_and_given_values_stay():
    assert algorithm("dr_grpo").config.loss_aggregation == "sequence_mean_token_sum_norm"
    assert (algorithm("grpo").config.clip_low, algorithm("grpo").config.loss_aggregation) == (0.2, "token_mean")
    assert algorithm("clip_cov").config.clip_high == 1.0
    assert build_algorithm(AlgorithmConfig(name="clip_cov", clip_high=0.3)).config.clip_high == 0.3


def test_the_order_of_rows_does_not_matter():
    rows, batch = random_batch(seed=3, questions=4, auxiliary=2)
    order = list(range(len(rows)))
    random.Random(5).shuffle(order)
    lengths = batch.offsets.diff().tolist()
    from megatron_policysplit.algorithms.advantages import TokenStatistics, make_batch

    per_row = [value.split(lengths) for value in (batch.logprobs, batch.entropy, batch.mask, batch.nucleus_entropy)]
    shuffled = make_batch(
        [rows[i] for i in order],
        [
            TokenStatistics(
                per_row[0][i],
                per_row[1][i],
                prompt_logprob=batch.prompt_logprob[i].item(),
                nucleus_entropy=per_row[3][i],
            )
            for i in order
        ],
        [per_row[2][i] for i in order],
    )
    for name, given in CASES:
        chosen, state = algorithm(name, given), STATES.get(name, {})
        expected, found = (chosen.method.signals(b, chosen.options, state) for b in (batch, shuffled))
        for field in ("advantages", "scale", "entropy_coef", "drift_coef", "nucleus_coef"):
            if getattr(expected, field) is None:
                continue
            parts = getattr(found, field).split(shuffled.offsets.diff().tolist())
            for position, i in enumerate(order):
                torch.testing.assert_close(parts[position], getattr(expected, field).split(lengths)[i])


def test_the_page_of_methods_is_that_of_the_files():
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    assert page == method_docs.render(), "run: python -m megatron_policysplit.algorithms.docs > docs/methods.md"


def test_the_method_of_the_documentation_works(monkeypatch):
    """docs/new_method.md's block, as a file of the package would be."""
    page = (Path(__file__).parents[2] / "docs" / "new_method.md").read_text()
    module = types.ModuleType("megatron_policysplit.algorithms.methods.documented")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(page.split("```python\n")[1].split("```")[0], module.__dict__)
    monkeypatch.setattr(methods, "METHOD_NAMES", (*METHOD_NAMES, "documented"))
    given = AlgorithmConfig(name="documented", options={"documented": {"coef": 0.25}})
    chosen = build_algorithm(given)
    assert (chosen.config.clip_high, chosen.method.begin(chosen.options)) == (0.28, {"coef": 0.25})
    rows, batch = random_batch()
    found = chosen.method.signals(batch, chosen.options, {"coef": 0.25}).advantages
    lengths = batch.offsets.diff().tolist()
    parts = zip(*(value.split(lengths) for value in (found, batch.logprobs, batch.mask)), strict=True)
    for (part, logprobs, mask), a in zip(parts, zscore(batch.rewards, batch.group).tolist(), strict=True):
        if mask.any():
            expected = a * math.exp(0.25 * logprobs[mask].mean())
            torch.testing.assert_close(part[mask], torch.full_like(part[mask], expected))
    assert chosen.method.next_state({"coef": 0.25}, batch, chosen.options) == {"coef": 0.25 * 0.99}
