"""The advantages of GRPO and Policy Split, against numbers worked out in plain Python."""

import math
import random
import statistics

import pytest
import torch

from megatron_policysplit.algorithms.advantages import (
    TokenStatistics,
    group_extremes,
    group_mean_std,
    make_batch,
    zscore,
)
from megatron_policysplit.algorithms.methods import method_named
from megatron_policysplit.algorithms.methods import policy_split as split
from megatron_policysplit.rows import Mode, share_rollouts
from tests.support.advantage_batches import EOS, partner, prompts, random_batch, rollout

EPS = 1e-6


def policy_split(batch, **settings):
    return split.advantages(batch, split.Options(**settings))


def grpo(batch):
    return method_named("grpo").signals(batch, None, {}).advantages


def correctness(batch):
    """A of each token's response, masked tokens included."""
    return zscore(batch.rewards, batch.group)[batch.row_of_token]


# --- groups (checklist 2) ---------------------------------------------------------------------------


def test_both_groups_of_a_question_hold_the_same_rewards_and_give_the_same_advantage():
    rows, batch = random_batch()
    rewards, advantage = {}, {}
    per_row = zscore(batch.rewards, batch.group)
    for row, group, reward, a in zip(rows, batch.group.tolist(), batch.rewards.tolist(), per_row.tolist(), strict=True):
        rewards.setdefault((row.key.question, row.mode), []).append(reward)
        assert advantage.setdefault(row.rollout.key, a) == a
        assert rows[batch.group.tolist().index(group)].key.group == row.key.group
    assert len(rewards) == 6
    for question in range(3):
        assert sorted(rewards[question, Mode.NORMAL]) == sorted(rewards[question, Mode.HIGH_ENTROPY])


# --- GRPO --------------------------------------------------------------------------------------------


def test_grpo_by_hand():
    rewards = [1.0, 0.0, 0.25, 0.0]
    rows = share_rollouts(
        [rollout(0, Mode.NORMAL, s, [1] * (s + 1), r) for s, r in enumerate(rewards)], prompts((0,)), (Mode.NORMAL,)
    )
    scored = [TokenStatistics(torch.zeros(row.response_length), torch.zeros(row.response_length)) for row in rows]
    masks = [torch.ones(row.response_length, dtype=torch.bool) for row in rows]
    masks[3][0] = False
    found = grpo(make_batch(rows, scored, masks))
    mean, std = statistics.mean(rewards), statistics.stdev(rewards)  # stdev is the unbiased one
    a = [(reward - mean) / (std + EPS) for reward in rewards]
    torch.testing.assert_close(found, torch.tensor([a[0], a[1], a[1], a[2], a[2], a[2], 0.0, a[3], a[3], a[3]]))


@pytest.mark.parametrize("reward", [0.0, 0.1, 1.0, -2.7])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_equal_rewards_give_exactly_zero(reward, size):
    """Also where the mean of equal numbers is not that number: 0.1 + 0.1 + 0.1 != 0.3."""
    rewards = torch.tensor([reward] * size + [1.0, 0.0])
    group = torch.tensor([0] * size + [1, 1])
    found = zscore(rewards, group)
    assert found[:size].tolist() == [0.0] * size
    torch.testing.assert_close(found[size:], torch.tensor([0.5, -0.5]) / (math.sqrt(0.5) + EPS))


def test_rewards_far_from_zero_keep_their_digits():
    rewards = torch.tensor([1000.0, 1000.0, 1001.0])
    values = rewards.tolist()
    expected = [(r - statistics.mean(values)) / (statistics.stdev(values) + EPS) for r in values]
    torch.testing.assert_close(zscore(rewards, torch.zeros(3, dtype=torch.int64)).tolist(), expected)


def test_group_statistics_against_python():
    draw = random.Random(1)
    group = [draw.randrange(3) for _ in range(40)] + [3]
    values = [draw.gauss(2, 3) for _ in group]
    mean, std = group_mean_std(torch.tensor(values), torch.tensor(group))
    highest, lowest = group_extremes(torch.tensor(values), torch.tensor(group))
    for index, g in enumerate(group):
        members = [value for value, other in zip(values, group, strict=True) if other == g]
        assert mean[index].item() == pytest.approx(statistics.mean(members), rel=1e-6)
        assert std[index].item() == pytest.approx(statistics.stdev(members) if len(members) > 1 else 0.0, rel=1e-6)
        assert highest[index].item() == pytest.approx(max(members))
        assert lowest[index].item() == pytest.approx(min(members))


# --- Policy Split by hand ----------------------------------------------------------------------------

# Two responses of one question: `o` sampled normally (2 tokens, right), `h` in high-entropy mode (3 tokens, wrong).
SURPRISE = {
    ("normal", "o"): [1.0, 0.5],
    ("high_entropy", "o"): [2.0, 0.1],
    ("normal", "h"): [3.0, 0.2, 0.9],
    ("high_entropy", "h"): [1.5, 0.4, 4.0],
}


def hand_case(entropy=None):
    """The case's batch; entropy: like SURPRISE, what the exact entropies are."""
    rows = share_rollouts(
        [rollout(0, Mode.NORMAL, 0, [1, EOS], 1.0), rollout(0, Mode.HIGH_ENTROPY, 0, [2, 3, EOS])], prompts((0,))
    )
    names = [(row.key.training_mode, "o" if row.rollout.mode == Mode.NORMAL else "h") for row in rows]
    scored = [
        TokenStatistics(-torch.tensor(SURPRISE[name]), torch.tensor((entropy or SURPRISE)[name])) for name in names
    ]
    masks = [torch.ones(row.response_length, dtype=torch.bool) for row in rows]
    return names, make_batch(rows, scored, masks)


def by_hand(surprise, *, alpha=0.5, eta=0.0, eta_normal=0.0, kappa=2.0, order="paper", double=False, how="zscore"):
    """{(training mode, response): advantages}, with nothing but Python's floats."""
    std = statistics.stdev([1.0, 0.0])
    advantage = {"o": (1.0 - 0.5) / (std + EPS), "h": (0.0 - 0.5) / (std + EPS)}
    result = {}
    for mode, other, scale in (("normal", "high_entropy", eta_normal), ("high_entropy", "normal", eta)):
        b = {
            o: [alpha * x + (1 - alpha) * y for x, y in zip(surprise[mode, o], surprise[other, o], strict=True)]
            for o in ("o", "h")
        }
        tokens = b["o"] + b["h"]
        centre, spread = statistics.mean(tokens), statistics.stdev(tokens)
        if how == "mean":
            spread = max(tokens) - min(tokens)
        for o, a in advantage.items():
            row = []
            for value in b[o]:
                z = value if how == "none" else (value - centre) / (spread + EPS)
                bound = abs(a) / kappa
                if order == "paper":
                    bonus = scale * min(max(z, -bound), bound)
                else:
                    bonus = min(max(scale * z, -bound), bound)
                row.append(a + (2 * bonus if double else bonus))
            result[mode, o] = row
    return result


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("how", ["zscore", "mean", "none"])
@pytest.mark.parametrize("eta", [0.03, 0.9])
@pytest.mark.parametrize("eta_normal", [0.0, -0.4])
@pytest.mark.parametrize("variant", ["paper", "authors_code"])
def test_policy_split_by_hand(alpha, how, eta, eta_normal, variant):
    names, batch = hand_case()
    found = policy_split(
        batch, alpha=alpha, eta=eta, eta_normal=eta_normal, kappa=2.0, normalization=how, variant=variant
    )
    code = variant == "authors_code"
    expected = by_hand(
        SURPRISE, alpha=alpha, eta=eta, eta_normal=eta_normal, order="code" if code else "paper", double=code, how=how
    )
    torch.testing.assert_close(found.tolist(), sum((expected[name] for name in names), []), rtol=1e-5, atol=1e-6)


def test_the_two_clamp_orders_differ_on_the_hand_case():
    """With eta = 0.9 the paper's bonus is at most 0.9 |A| / 2 and the code's |A| / 2: the case tells them apart."""
    paper, code = by_hand(SURPRISE, eta=0.9), by_hand(SURPRISE, eta=0.9, order="code")
    a = 0.5 / (math.sqrt(0.5) + EPS)
    assert max(paper["high_entropy", "h"]) == pytest.approx(-a + 0.9 * a / 2)
    assert max(code["high_entropy", "h"]) == pytest.approx(-a + a / 2)


def test_hand_case_uses_the_exact_entropy_when_asked():
    entropy = {key: [value * value + 0.3 for value in values] for key, values in SURPRISE.items()}
    names, batch = hand_case(entropy)
    found = policy_split(batch, eta=0.9, entropy_estimate="entropy")
    expected = by_hand(entropy, eta=0.9)
    torch.testing.assert_close(found.tolist(), sum((expected[name] for name in names), []), rtol=1e-5, atol=1e-6)
    assert not torch.equal(found, policy_split(batch, eta=0.9))


def test_masked_tokens_count_in_nothing():
    """A masked token with an absurd surprise changes no other token's advantage, and its own is 0."""
    rows, batch = random_batch()
    before = policy_split(batch, eta=0.5)
    batch.logprobs = batch.logprobs.where(batch.mask, float("nan"))
    after = policy_split(batch, eta=0.5)
    assert (~batch.mask).any() and torch.equal(before, after)
    assert (after[~batch.mask] == 0).all() and after.isfinite().all()


# --- z-score (checklist 3) ---------------------------------------------------------------------------


def test_zscore_over_the_tokens_of_each_group():
    _, batch = random_batch()
    values = torch.randn(len(batch.mask), generator=torch.Generator().manual_seed(1)) * 3 + 5
    group = batch.group[batch.row_of_token]
    found = split.normalize(values, group, batch.mask, "zscore")
    assert (found[~batch.mask] == 0).all() and (~batch.mask).any()
    for g in group.unique():
        members = found[(group == g) & batch.mask].double()
        assert members.mean().item() == pytest.approx(0.0, abs=1e-6)
        assert members.std(unbiased=True).item() == pytest.approx(1.0, abs=1e-5)


def test_zscore_has_its_epsilon():
    values = torch.tensor([0.0, 2e-6])
    found = split.normalize(values, torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.bool), "zscore")
    std = statistics.stdev([0.0, 2e-6])
    torch.testing.assert_close(found.tolist(), [-1e-6 / (std + EPS), 1e-6 / (std + EPS)], rtol=1e-4, atol=0)


def test_a_group_of_one_token_and_a_group_without_any():
    values, mask = torch.tensor([4.0, 5.0, 6.0]), torch.tensor([True, False, False])
    for how, expected in (("zscore", 0.0), ("mean", 0.0), ("none", 4.0)):
        assert split.normalize(values, torch.tensor([0, 1, 1]), mask, how).tolist() == [expected, 0.0, 0.0]
        assert split.normalize(values, torch.tensor([0, 1, 1]), mask & False, how).tolist() == [0.0, 0.0, 0.0]


def test_mean_and_none_normalisation():
    values, group = torch.tensor([1.0, 2.0, 6.0]), torch.zeros(3, dtype=torch.int64)
    mask = torch.ones(3, dtype=torch.bool)
    spread = 5.0 + EPS
    torch.testing.assert_close(
        split.normalize(values, group, mask, "mean").tolist(), [-2 / spread, -1 / spread, 3 / spread]
    )
    assert split.normalize(values, group, mask, "none").tolist() == [1.0, 2.0, 6.0]


# --- bounds, limits and variants (checklist 4) -------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("eta", [0.03, 1.0, 5.0])
@pytest.mark.parametrize("kappa", [1.0, 2.0, 10.0])
@pytest.mark.parametrize("order", ["paper", "code"])
@pytest.mark.parametrize("double", [False, True])
def test_bonus_bounds(seed, eta, kappa, order, double):
    _, batch = random_batch(seed)
    a = correctness(batch)
    bonus = split.bonus(batch, a, split.Options(eta=eta, kappa=kappa, clamp_order=order, double_bonus=double))
    bound = a.abs() / kappa * (eta if order == "paper" else 1.0) * (2 if double else 1)
    assert (bonus.abs() <= bound * (1 + 1e-6)).all()
    assert (bonus[a == 0] == 0).all() and (a == 0).any()
    assert bonus.abs().max() > 0
    normal = ~batch.rows_in("high_entropy")[batch.row_of_token]
    assert (bonus[normal] == 0).all()


def test_the_bound_is_reached():
    """Otherwise the bounds above would hold for a bonus that is never clamped, or too weak."""
    _, batch = random_batch()
    a = correctness(batch)
    for order, factor in (("paper", 0.5), ("code", 1.0)):
        bonus = split.bonus(batch, a, split.Options(eta=0.5, kappa=100.0, clamp_order=order))
        assert torch.isclose(bonus.abs(), factor * a.abs() / 100).logical_and(a != 0).any()


def test_eta_zero_is_grpo_over_the_shared_rollouts():
    _, batch = random_batch()
    for variant in ("paper", "authors_code"):
        assert torch.equal(policy_split(batch, eta=0.0, variant=variant), grpo(batch))


def test_a_huge_bound_leaves_the_bonus_unclamped():
    """kappa -> 0 lifts the clamp: A + eta B; and kappa -> infinity leaves nothing but A."""
    _, batch = random_batch()
    a, row = correctness(batch), batch.row_of_token
    surprise = -batch.logprobs
    b = 0.5 * surprise + 0.5 * batch.at_others(surprise)
    z = split.normalize(b, batch.group[row], batch.mask, "zscore")
    eta = 0.3 * batch.rows_in("high_entropy")[row]
    expected = ((a + (eta * z).where(a != 0, 0.0)) * batch.mask).float()
    torch.testing.assert_close(policy_split(batch, eta=0.3, kappa=1e-9, clamp_order="paper"), expected)
    torch.testing.assert_close(policy_split(batch, eta=0.3, kappa=1e-9, clamp_order="code"), expected)
    torch.testing.assert_close(policy_split(batch, eta=0.3, kappa=1e12), grpo(batch), rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("settings", "order", "double"),
    [
        ({}, "paper", False),
        ({"variant": "authors_code"}, "code", True),
        ({"variant": "authors_code", "clamp_order": "paper"}, "paper", True),
        ({"variant": "authors_code", "double_bonus": False}, "code", False),
        ({"clamp_order": "code"}, "code", False),
        ({"double_bonus": True}, "paper", True),
    ],
)
def test_variant_resolution(settings, order, double):
    assert (split.clamp_order(split.Options(**settings)), split.double_bonus(split.Options(**settings))) == (
        order,
        double,
    )
    _, batch = random_batch()
    assert torch.equal(
        policy_split(batch, eta=0.7, **settings), policy_split(batch, eta=0.7, clamp_order=order, double_bonus=double)
    )


def test_eta_normal_moves_the_normal_mode_only():
    _, batch = random_batch()
    plain, moved = policy_split(batch, eta=0.3), policy_split(batch, eta=0.3, eta_normal=0.3)
    high = batch.rows_in("high_entropy")[batch.row_of_token]
    assert torch.equal(plain[high], moved[high])
    assert not torch.equal(plain[~high], moved[~high])


# --- gradients, aliasing, pairing (checklist 4, 5) ---------------------------------------------------


@pytest.mark.parametrize("name", ["grpo", "policy_split"])
@pytest.mark.parametrize("estimate", ["logprob", "entropy"])
def test_no_gradient_and_no_aliasing(name, estimate):
    _, batch = random_batch()
    batch.logprobs.requires_grad_()
    batch.entropy.requires_grad_()
    inputs = {name: value.detach().clone() for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    options = split.Options(eta=0.5, entropy_estimate=estimate)
    first = method_named(name).signals(batch, options, {}).advantages
    assert not first.requires_grad
    kept = first.clone()
    first += 1.0  # the code that the paper's authors released added its bonus twice for want of this
    assert torch.equal(method_named(name).signals(batch, options, {}).advantages, kept)
    for field, before in inputs.items():
        assert torch.equal(getattr(batch, field), before), field


def test_partner_values_are_those_of_the_same_token():
    rows, batch = random_batch()
    ids = torch.arange(len(batch.mask)).float()
    mirrored = batch.at_others(ids)
    offsets = batch.offsets.tolist()
    for r, row in enumerate(rows):
        p = next(i for i, other in enumerate(rows) if other.key == partner(row.key))
        assert mirrored[offsets[r] : offsets[r + 1]].tolist() == list(range(offsets[p], offsets[p + 1]))


def test_unpaired_or_misaligned_rows_are_an_error():
    rows, batch = random_batch()
    scored = [TokenStatistics(torch.zeros(r.response_length), torch.zeros(r.response_length)) for r in rows]
    masks = [torch.ones(r.response_length, dtype=torch.bool) for r in rows]
    alone = make_batch(rows[1:], scored[1:], masks[1:])
    with pytest.raises(ValueError, match="a row has no partner"):
        alone.at_others(alone.logprobs)
    batch.offsets = batch.offsets.clone()
    batch.offsets[1] += 1
    with pytest.raises(ValueError, match="differ in length"):
        batch.at_others(batch.logprobs)


def test_row_order_does_not_matter():
    rows, batch = random_batch()
    order = list(range(len(rows)))
    random.Random(5).shuffle(order)
    split_by_row = lambda values: values.split(batch.offsets.diff().tolist())  # noqa: E731
    logprobs, entropy, mask = map(split_by_row, (batch.logprobs, batch.entropy, batch.mask))
    shuffled = make_batch(
        [rows[i] for i in order], [TokenStatistics(logprobs[i], entropy[i]) for i in order], [mask[i] for i in order]
    )
    found = policy_split(shuffled, eta=0.5).split(shuffled.offsets.diff().tolist())
    expected = split_by_row(policy_split(batch, eta=0.5))
    for position, i in enumerate(order):
        torch.testing.assert_close(found[position], expected[i], rtol=1e-6, atol=1e-6)
