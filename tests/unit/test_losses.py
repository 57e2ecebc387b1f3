"""The policy loss against plain loops: clipping, aggregation, KL, entropy and importance terms."""

import math
import random
from typing import NamedTuple

import pytest
import torch

from megatron_policysplit.algorithms.loss import (
    Denominators,
    PolicyTokens,
    denominators,
    importance_weights,
    k3,
    policy_loss,
    token_weight,
)
from megatron_policysplit.algorithms.methods import build_algorithm
from megatron_policysplit.algorithms.token_signals import TokenSignals
from megatron_policysplit.config import AlgorithmConfig

NAN = float("nan")


def filled(**settings):
    """With the method's defaults in place of nulls."""
    return build_algorithm(AlgorithmConfig(name="grpo", **settings)).config


class Inputs(NamedTuple):
    """The first two arguments of `policy_loss`."""

    signals: TokenSignals
    policy: PolicyTokens

    def tensor(self, field):
        return getattr(self.policy if hasattr(self.policy, field) else self.signals, field)


def inputs(ratios, advantages, weights=None, **signals):
    """Tokens with the given ratios to an old policy of log-prob -1."""
    count = len(ratios)
    given = {
        "old_logprobs": torch.full((count,), -1.0, dtype=torch.float64),
        "advantages": torch.tensor(advantages, dtype=torch.float64),
        "importance": torch.ones(count, dtype=torch.float64),
        "weights": torch.tensor(weights or [1.0] * count, dtype=torch.float64),
    }
    logprobs = torch.tensor([math.log(ratio) - 1 for ratio in ratios], dtype=torch.float64).requires_grad_()
    entropy = torch.full((count,), 0.5, dtype=torch.float64).requires_grad_()
    return Inputs(TokenSignals(**(given | signals)), PolicyTokens(logprobs, entropy))


def plain_token_loss(ratio, advantage, config):
    gain = min(ratio * advantage, min(max(ratio, 1 - config.clip_low), 1 + config.clip_high) * advantage)
    if config.dual_clip is not None and advantage < 0:
        gain = max(gain, config.dual_clip * advantage)
    return -gain


# --- PPO clip ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [  # clip_low 0.1, clip_high 0.3; slope is d loss / d log-prob = -A r, or 0 where clipped
        (1.0, 2.0, -2.0, -2.0),
        (1.25, 2.0, -2.5, -2.5),
        (1.5, 2.0, -2.6, 0.0),  # above 1 + high with A > 0: clipped
        (1.5, -2.0, 3.0, 3.0),  # with A < 0: not
        (0.8, 2.0, -1.6, -1.6),  # below 1 - low with A > 0: not
        (0.8, -2.0, 1.8, 0.0),  # with A < 0: clipped
        (0.95, -2.0, 1.9, 1.9),
        (7.0, 0.0, 0.0, 0.0),
    ],
)
def test_clip(ratio, advantage, loss, slope):
    given = inputs([ratio], [advantage])
    out = policy_loss(*given, filled(clip_low=0.1, clip_high=0.3))
    out.loss.backward()
    assert out.loss.item() == pytest.approx(loss)
    assert given.policy.logprobs.grad.item() == pytest.approx(slope)
    assert out.clipped_tokens.item() == (slope == 0.0 and advantage != 0.0)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [  # dual clip 3: a negative advantage costs at most 3 |A|
        (2.9, -2.0, 5.8, 5.8),
        (4.0, -2.0, 6.0, 0.0),
        (4.0, 2.0, -2.4, 0.0),  # a positive one knows only the plain clip
        (0.5, -2.0, 1.6, 0.0),
    ],
)
def test_dual_clip(ratio, advantage, loss, slope):
    given = inputs([ratio], [advantage])
    out = policy_loss(*given, filled(dual_clip=3.0))
    out.loss.backward()
    assert out.loss.item() == pytest.approx(loss)
    assert given.policy.logprobs.grad.item() == pytest.approx(slope)


def test_gradient_at_ratio_one_is_whole():
    """Both branches are equal there; their gradients must not be halved or doubled."""
    given = inputs([1.0, 1.0], [2.0, -3.0])
    policy_loss(*given, filled()).loss.backward()
    assert given.policy.logprobs.grad.tolist() == [-2.0, 3.0]


@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_random_tokens_against_a_loop(dual_clip):
    draw = random.Random(0)
    config = filled(clip_low=0.1, clip_high=0.25, dual_clip=dual_clip)
    ratios = [math.exp(draw.gauss(0, 0.5)) for _ in range(200)]
    advantages = [draw.choice([0.0, draw.gauss(0, 1)]) for _ in ratios]
    weights = [draw.choice([0.0, draw.random()]) for _ in ratios]
    importance = [draw.random() for _ in ratios]
    out = policy_loss(
        *inputs(ratios, advantages, weights, importance=torch.tensor(importance, dtype=torch.float64)), config
    )
    terms = zip(ratios, advantages, weights, importance, strict=True)
    assert out.loss.item() == pytest.approx(sum(plain_token_loss(r, a, config) * w * i for r, a, w, i in terms))
    trained = [(r, a) for r, a, w in zip(ratios, advantages, weights, strict=True) if w > 0]
    outside = [(r, a) for r, a in trained if (a > 0 and r > 1.25) or (a < 0 and r < 0.9)]
    assert out.tokens.item() == len(trained) and out.clipped_tokens.item() == len(outside) > 0
    assert out.ratio_sum.item() == pytest.approx(sum(r for r, _ in trained))
    assert out.ratio_off_one.item() == pytest.approx(max(abs(r - 1) for r, _ in trained))


# --- aggregation -------------------------------------------------------------------------------------

ROWS = [[0.5, -1.0, 2.0], [4.0], [1.5, 1.5], []]  # token losses of a step's rows; the last row trains nothing


def plain_aggregate(how, max_response_tokens):
    rows = [row for row in ROWS if row]
    if how == "token_mean":
        tokens = [loss for row in rows for loss in row]
        return sum(tokens) / len(tokens)
    if how == "sequence_mean_token_mean":
        return sum(sum(row) / len(row) for row in rows) / len(rows)
    return sum(sum(row) / max_response_tokens for row in rows) / len(rows)


@pytest.mark.parametrize("how", ["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum_norm"])
@pytest.mark.parametrize("cuts", [[], [1], [1, 2], [2]])
def test_aggregations_over_any_packing(how, cuts):
    """Sums over micro-batches, with the weights of the whole step, are the step's mean."""
    step = denominators([len(row) for row in ROWS])
    assert step == Denominators(tokens=6, rows=3)
    total = 0.0
    bounds = [0, *cuts, len(ROWS)]
    for start, end in zip(bounds, bounds[1:], strict=False):
        part = ROWS[start:end]
        losses = [loss for row in part for loss in row]
        weights = [token_weight(len(row), step, how, 8) for row in part for _ in row]
        # At ratio 1 a token's loss is minus its advantage.
        total += policy_loss(*inputs([1.0] * len(losses), [-loss for loss in losses], weights), filled()).loss
    assert total.item() == pytest.approx(plain_aggregate(how, 8))


def test_weight_of_a_row_that_trains_nothing():
    for how in ("token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum_norm"):
        assert token_weight(0, Denominators(0, 0), how, 8) == 0.0


def test_unknown_aggregation():
    with pytest.raises(ValueError, match="unknown loss aggregation 'median'"):
        token_weight(1, Denominators(1, 1), "median", 8)


def test_skipped_rows_stay_in_the_denominators():
    """A row whose advantages are all 0 adds nothing, but the mean is over it too: skipping it changes nothing."""
    step = denominators([2, 3])
    whole = [token_weight(2, step, "token_mean", 8)] * 2 + [token_weight(3, step, "token_mean", 8)] * 3
    both = policy_loss(*inputs([1.0, 1.2, 1.0, 0.7, 2.0], [1.0, -2.0, 0.0, 0.0, 0.0], whole), filled())
    alone = policy_loss(*inputs([1.0, 1.2], [1.0, -2.0], whole[:2]), filled())
    assert both.loss.item() == pytest.approx(alone.loss.item()) == pytest.approx((-1.0 + 2.4) / 5)


def test_no_tokens_at_all():
    out = policy_loss(*inputs([], []), filled(entropy_coef=0.1))
    out.loss.backward()
    assert [value.item() for value in (out.loss, out.tokens, out.clipped_tokens, out.ratio_off_one)] == [0, 0, 0, 0]


# --- KL and entropy ----------------------------------------------------------------------------------


def test_k3_by_hand():
    logprobs, reference = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.0, -1.0, -3.0])
    expected = [math.exp(r - l) - (r - l) - 1 for l, r in zip(logprobs.tolist(), reference.tolist(), strict=True)]  # noqa: E741
    torch.testing.assert_close(k3(logprobs, reference).tolist(), expected)
    assert k3(logprobs, reference)[0] == 0 and (k3(logprobs, reference) >= 0).all()


def test_k3_estimates_the_kl():
    """Its mean over the policy's own tokens is KL(policy || reference)."""
    policy, reference = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.2, 0.5, 0.3]).log()
    expectation = (policy.exp() * k3(policy, reference)).sum()
    torch.testing.assert_close(expectation, (policy.exp() * (policy - reference)).sum())


def test_kl_term():
    reference = torch.tensor([-2.0, -0.3], dtype=torch.float64)
    given = inputs([1.0, 1.1], [0.0, 0.0], [0.25, 0.5], reference_logprobs=reference)
    out = policy_loss(*given, filled(kl_coef=0.7))
    out.loss.backward()
    differences = [-2.0 + 1.0, -0.3 - (math.log(1.1) - 1)]
    assert out.loss.item() == pytest.approx(
        sum(0.7 * w * (math.exp(d) - d - 1) for d, w in zip(differences, (0.25, 0.5), strict=True))
    )
    expected = [0.7 * w * (1 - math.exp(d)) for d, w in zip(differences, (0.25, 0.5), strict=True)]
    torch.testing.assert_close(given.policy.logprobs.grad.tolist(), expected)


def test_entropy_bonus_has_a_gradient_and_is_off_by_default():
    given = inputs([1.0, 1.0], [1.0, -1.0], [0.25, 0.75])
    out = policy_loss(*given, filled(entropy_coef=0.2))
    assert out.loss.requires_grad
    out.loss.backward()
    assert given.policy.entropy.grad.tolist() == pytest.approx([-0.2 * 0.25, -0.2 * 0.75])
    assert out.loss.item() == pytest.approx(-0.25 + 0.75 - 0.2 * 0.5)
    given = inputs([1.0, 1.0], [1.0, -1.0])
    policy_loss(*given, filled()).loss.backward()
    assert given.policy.entropy.grad is None or (given.policy.entropy.grad == 0).all()


def test_metrics_carry_no_gradient():
    out = policy_loss(*inputs([1.1], [1.0]), filled())
    assert not any(value.requires_grad for value in (out.ratio_sum, out.ratio_off_one, out.clipped_tokens, out.tokens))


# --- what is not trained -----------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [NAN, float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize(
    "field", ["logprobs", "old_logprobs", "advantages", "importance", "entropy", "reference_logprobs"]
)
def test_untrained_tokens_reach_neither_loss_nor_gradient(poison, field):
    config = filled(kl_coef=0.1, entropy_coef=0.1, dual_clip=3.0)

    def run(value):
        reference = torch.tensor([-0.7, -0.9, -1.2], dtype=torch.float64)
        given = inputs([1.1, 1.3, 0.9], [1.0, -1.0, 2.0], [0.4, 0.0, 0.6], reference_logprobs=reference)
        if value is not None:
            with torch.no_grad():
                given.tensor(field)[1] = value
        out = policy_loss(*given, config)
        out.loss.backward()
        return out, given

    (clean, clean_inputs), (out, given) = run(None), run(poison)
    for name in ("loss", "ratio_sum", "ratio_off_one", "clipped_tokens", "tokens"):
        assert getattr(out, name).item() == getattr(clean, name).item(), name
    assert (
        torch.equal(given.policy.logprobs.grad, clean_inputs.policy.logprobs.grad)
        and given.policy.logprobs.grad[1] == 0
    )
    assert (
        torch.equal(given.policy.entropy.grad, clean_inputs.policy.entropy.grad) and given.policy.entropy.grad[1] == 0
    )


@pytest.mark.parametrize("field", ["logprobs", "old_logprobs", "advantages", "importance"])
def test_nan_in_a_trained_token_is_not_hidden(field):
    given = inputs([1.0, 1.0], [1.0, -1.0])
    with torch.no_grad():
        given.tensor(field)[0] = NAN
    assert policy_loss(*given, filled()).loss.isnan()


# --- importance weights ------------------------------------------------------------------------------

ACTOR, ENGINE = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.5, -1.0, -0.6])  # differences 0.5, -1, 0.1
ALL = torch.ones(3, dtype=torch.bool)


def test_importance_weights_are_off_by_default():
    assert importance_weights(ACTOR, ENGINE, ALL, filled()).tolist() == [1.0, 1.0, 1.0]


def test_importance_weights_per_token():
    found = importance_weights(ACTOR, ENGINE, ALL, filled(importance_cap=1.2))
    torch.testing.assert_close(found.tolist(), [1.2, math.exp(-1.0), math.exp(0.1)], rtol=1e-6, atol=0)


def test_importance_weights_per_response():
    config = filled(importance_cap=2.0, importance_level="sequence")
    found = importance_weights(ACTOR, ENGINE, ALL, config)
    torch.testing.assert_close(found.tolist(), [math.exp(-0.4)] * 3, rtol=1e-6, atol=0)
    capped = importance_weights(ENGINE, ACTOR, ALL, filled(importance_cap=1.3, importance_level="sequence"))
    torch.testing.assert_close(capped.tolist(), [1.3] * 3)


def test_importance_of_a_response_leaves_untrained_tokens_out():
    """They were not sampled by the policy, and hold whatever their source put there."""
    mask = torch.tensor([True, False, True])
    engine = torch.tensor([-1.5, NAN, -0.6])
    found = importance_weights(ACTOR, engine, mask, filled(importance_cap=9.0, importance_level="sequence"))
    torch.testing.assert_close(found.tolist(), [math.exp(0.6)] * 3, rtol=1e-6, atol=0)
