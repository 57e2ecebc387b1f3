"""The agreement gate: its figures against plain numpy, its rhythm, and each cause with a real actor and engine."""

import math

import numpy as np
import pytest
import torch

from megatron_policysplit.actor.layers import LayerChoice
from megatron_policysplit.algorithms.advantages import TokenStatistics
from megatron_policysplit.config import Config
from megatron_policysplit.errors import EngineError, TrainingError
from megatron_policysplit.rows import MODES, Mode, Rollout, share_rollouts
from megatron_policysplit.training.agreement.bounds import AgreementSettings, Bounds, Difference, choose_bounds
from megatron_policysplit.training.agreement.diagnosis import EXCERPT_ROWS, EXCERPT_TOKENS, Probe, excerpt
from megatron_policysplit.training.agreement.gate import AgreementGate, agreement_metrics, compare, compare_by_scoring

PROMPTS = {Mode.NORMAL: [1, 2], Mode.HIGH_ENTROPY: [9, 1, 2]}


def rollout(question=0, mode=Mode.NORMAL, sample=0, engine=(-1.0, -2.0), versions=((0, 3),)):
    return Rollout(
        batch=0,
        question=question,
        mode=mode,
        sample=sample,
        tokens=list(range(len(engine))),
        engine_logprobs=list(engine),
        finish_reason="stop",
        weight_versions=list(versions),
    )


def rows_of(rollouts):
    return share_rollouts(rollouts, {r.question: PROMPTS for r in rollouts})


def scored(rows, shift):
    """The actor's statistics: engine log-prob + shift(row) per token."""
    return [TokenStatistics(torch.tensor(r.rollout.engine_logprobs) + shift(r), torch.zeros(2)) for r in rows]


# --- figures -----------------------------------------------------------------------------------------


def test_figures_are_those_of_their_definitions():
    draw = np.random.default_rng(0)
    engine = [draw.normal(-2, 1, size) for size in (3, 1, 7)]
    d = [draw.normal(0, 0.3, len(e)) for e in engine]
    actor = [torch.tensor(e + x) for e, x in zip(engine, d, strict=True)]
    found = Difference.of(actor, [torch.tensor(e) for e in engine])
    d = np.concatenate(d)
    assert found.tokens == 11
    assert found.mean == pytest.approx(np.abs(d).mean())
    assert found.k3 == pytest.approx((np.exp(d) - 1 - d).mean())


def test_k3_estimates_the_kl_from_engine_to_actor():
    """On tokens that the engine drew; the other direction has another value here."""
    torch.manual_seed(0)
    engine, actor = torch.randn(5).log_softmax(0), torch.randn(5).log_softmax(0)
    drawn = torch.multinomial(engine.exp(), 200_000, replacement=True)
    found = Difference.of([actor[drawn]], [engine[drawn]])
    assert found.k3 == pytest.approx(float((engine.exp() * (engine - actor)).sum()), rel=0.02)
    assert found.k3 != pytest.approx(float((actor.exp() * (actor - engine)).sum()), rel=0.1)


def test_only_samples_of_the_weights_in_question_count_behind_their_own_prompt():
    rollouts = [
        rollout(0, Mode.NORMAL, 0),
        rollout(0, Mode.NORMAL, 1, versions=((0, 2),)),
        rollout(0, Mode.NORMAL, 2, versions=((0, 2), (1, 3))),
        rollout(0, Mode.HIGH_ENTROPY, 0, engine=(-1.0,)),
        rollout(0, Mode.NORMAL, 3, engine=(-70.0, -90.0)),
    ]
    rollouts[-1].auxiliary = True  # sampled at another temperature
    rows = rows_of(rollouts)
    right = {Mode.NORMAL: 0.25, Mode.HIGH_ENTROPY: -0.5}

    def shift(row):
        exact = row.on_policy and row.rollout.weight_versions == [(0, 3)]
        return right[row.mode] if exact else 100.0

    found = compare(rows, scored(rows, shift), version=3)
    assert {mode: (d.tokens, d.mean) for mode, d in found.items()} == {
        Mode.NORMAL: (2, pytest.approx(0.25)),
        Mode.HIGH_ENTROPY: (1, pytest.approx(0.5)),
    }
    assert compare(rows, scored(rows, shift), version=4) == {}
    named = agreement_metrics(found)
    assert named["agreement/difference"] == pytest.approx((2 * 0.25 + 0.5) / 3)
    assert named["agreement/high_entropy/difference"] == pytest.approx(0.5)
    assert (named["agreement/tokens"], named["agreement/normal/tokens"]) == (3, 2)
    normal, other = named["agreement/normal/k3"], named["agreement/high_entropy/k3"]
    assert named["agreement/k3"] == pytest.approx((2 * normal + other) / 3)


@pytest.mark.parametrize(
    "engine, actor_dtype, server_dtype, expected",
    [
        ("local", "float32", None, 1e-3),
        ("local", "bfloat16", "float32", 0.08),  # the local engine has no server
        ("sglang", "float32", None, 1e-3),
        ("sglang", "float32", "bfloat16", 0.08),
        ("sglang", "bfloat16", "float32", 0.08),
        ("sglang", "bfloat16", None, 0.08),
    ],
)
def test_bounds_follow_the_precisions_and_a_low_temperature(engine, actor_dtype, server_dtype, expected):
    config = Config()
    config.rollout.engine, config.model.dtype, config.rollout.server.dtype = engine, actor_dtype, server_dtype
    settings = AgreementSettings.of(config)
    bounds = choose_bounds(settings)
    assert bounds.mean == expected and bounds.k3 > bounds.mean**2
    assert choose_bounds(settings, 1.7) == bounds
    assert choose_bounds(settings, 0.5) == Bounds(2 * bounds.mean, 4 * bounds.k3)
    config.agreement.max_difference, config.agreement.max_k3 = 0.2, 0.3
    assert choose_bounds(AgreementSettings.of(config), 0.5) == Bounds(0.2, 0.3)


@pytest.mark.parametrize("server_dtype, expected", [(None, Bounds(0.01, 5e-4)), ("bfloat16", Bounds(0.08, 0.03))])
def test_bounds_of_an_actor_that_multiplies_in_tf32(monkeypatch, server_dtype, expected):
    taken = LayerChoice(True, "a test")
    monkeypatch.setattr("megatron_policysplit.training.agreement.bounds.choose_layers", lambda wanted: taken)
    config = Config()
    config.rollout.engine, config.model.dtype, config.rollout.server.dtype = "sglang", "float32", server_dtype
    assert choose_bounds(AgreementSettings.of(config)) == expected


def test_a_difference_that_is_not_a_number_is_past_every_bound():
    bounds = Bounds(1.0, 1.0)
    assert bounds.hold(Difference(1, 1.0, 1.0))
    assert not bounds.hold(Difference(1, 0.1, 1.1)) and not bounds.hold(Difference(1, 1.1, 0.1))
    broken = Difference.of([torch.tensor([math.nan])], [torch.tensor([-1.0])])
    assert not bounds.hold(broken) and broken.rank == math.inf


def test_an_excerpt_is_spread_evenly_and_cut():
    short = rows_of([rollout(q) for q in range(3)])
    assert [row.key for row in excerpt(short)] == [row.key for row in short]
    long = rows_of([rollout(q, engine=[-1.0] * (EXCERPT_TOKENS + q)) for q in range(50)])
    long = [row for row in long if row.on_policy]
    found = excerpt(long)
    questions = [row.key.question for row in found]
    assert len(found) == EXCERPT_ROWS and questions[0] == 0 and questions == sorted(set(questions))
    assert max(b - a for a, b in zip(questions, questions[1:], strict=False)) == 2
    assert {row.response_length for row in found} == {EXCERPT_TOKENS}


# --- rhythm ------------------------------------------------------------------------------------------


class OneRank:
    """The layout of a world of one."""

    is_chief = is_leader = True

    def broadcast_from_chief(self, value):
        return value

    def all_gather_leaders(self, value):
        return [value]


class Messages:
    def __init__(self):
        self.said = []

    def message(self, text):
        self.said.append(text)


def config_with(**agreement):
    config = Config()
    config.model.dtype = "float32"
    for name, value in agreement.items():
        setattr(config.agreement, name, value)
    return config


def gate_of(config, probe=None):
    def never(*args):
        raise AssertionError("the engine was asked")

    log = Messages()
    return AgreementGate.of(config, probe or Probe(OneRank(), None, never, never), log), log


def batch(shift, version):
    rows = rows_of([rollout(0, mode, i, versions=((0, version),)) for mode in MODES for i in range(2)])
    return rows, scored(rows, shift)


def checked(gate, step, shift=0.0, sampled_with=None, served=None):
    """gate.check of the batch after `step` trained ones, whose weights have the same number."""
    rows, old = batch(lambda row: shift, step if sampled_with is None else sampled_with)
    return gate.check(step, rows, old, version=step, served=step if served is None else served)


def test_the_first_batch_and_every_so_many_steps_are_compared():
    gate, log = gate_of(config_with(every=4))
    assert [step for step in range(3, 14) if checked(gate, step)] == [3, 4, 8, 12]
    off, _ = gate_of(config_with(every=0))
    assert not any(checked(off, step, shift=9.0) for step in range(5))
    replay = config_with(every=1)
    replay.rollout.engine = "replay"
    assert not any(checked(gate_of(replay)[0], step, shift=9.0) for step in range(5))
    assert not log.said


def test_breaches_warn_are_compared_again_at_once_and_end_the_run_when_they_go_on(monkeypatch):
    asked = []

    def diagnose(breach, *args):
        asked.append(breach)
        return "the weather"

    monkeypatch.setattr("megatron_policysplit.training.agreement.gate.diagnose", diagnose)
    gate, log = gate_of(config_with(every=10, breaches=2))
    assert checked(gate, 0)["agreement/breaches"] == 0
    assert checked(gate, 10, shift=0.2)["agreement/breaches"] == 1
    (said,) = log.said
    assert "mean |log-prob difference| 0.2 nats (bound 0.001)" in said
    assert "before step 11; the run ends after 2 such comparisons in a row" in said
    assert checked(gate, 11)["agreement/breaches"] == 0  # the next batch is compared at once, and is fine again
    assert checked(gate, 12) == {}
    checked(gate, 20, shift=0.2)
    assert not asked
    with pytest.raises(TrainingError, match="before step 22, in comparison 2 in a row .*; likely cause: the weather"):
        checked(gate, 21, shift=0.2)
    (breach,) = asked
    assert breach.sampled and (breach.past, breach.compared) == (2, 2)
    assert [row.mode for row in breach.rows] == [row.rollout.mode for row in breach.rows] == [breach.mode] * 2


def test_only_the_responses_that_disagree_are_looked_at(monkeypatch):
    found = []
    monkeypatch.setattr(
        "megatron_policysplit.training.agreement.gate.diagnose", lambda breach, *args: found.append(breach) or ""
    )
    gate, _ = gate_of(config_with(every=1, breaches=1))
    rows, old = batch(lambda row: 0.5 if row.on_policy and row.rollout.sample == 1 else 0.0, version=0)
    with pytest.raises(TrainingError):
        gate.check(0, rows, old, version=0, served=0)
    assert [row.rollout.sample for row in found[0].rows] == [1] and (found[0].past, found[0].compared) == (1, 2)


def test_one_mode_past_the_bound_is_enough_and_is_named():
    gate, log = gate_of(config_with(every=1))
    rows, old = batch(lambda row: 0.0015 if row.mode == Mode.HIGH_ENTROPY else 0.0, version=0)
    metrics = gate.check(0, rows, old, version=0, served=0)
    assert metrics["agreement/difference"] < 1e-3 < metrics["agreement/high_entropy/difference"]
    assert "disagree on 4 tokens of the high_entropy mode" in log.said[0]


class ScoringActor:
    """Log-probs are those of the samples; nothing is placed anywhere."""

    hf_config = {}

    def place(self, rows, live, seed, temperature):
        assert temperature == 1.0 and not any(live)
        return rows

    def log_probs(self, rows):
        return scored(rows, lambda row: 0.0)


def probe_with(engine_shift, asked):
    def score(sequences):
        asked.append(sequences)
        assert all(list(prompt) in PROMPTS.values() for prompt, _ in sequences)
        return [[-1.0 + engine_shift, -2.0 + engine_shift] for _ in sequences]

    return Probe(OneRank(), ScoringActor(), score, lambda: None)


def test_samples_of_older_weights_are_compared_by_the_engines_scores():
    asked = []
    probe = probe_with(0.0, asked)
    gate, log = gate_of(config_with(every=5), probe)
    assert checked(gate, 5, shift=7.0, sampled_with=4)["agreement/difference"] == 0
    assert len(asked) == 1 and len(asked[0]) == 4  # on-policy rows only
    # Engines that hold other weights than the actor cannot be asked; the comparison stays due.
    gate, log = gate_of(config_with(every=5), probe)
    assert checked(gate, 5, sampled_with=4, served=4) == {} and len(asked) == 1
    assert checked(gate, 6, sampled_with=5)["agreement/tokens"] == 8
    wrong, log = gate_of(config_with(every=5), probe_with(0.25, []))
    metrics = checked(wrong, 5, sampled_with=4)
    assert metrics["agreement/difference"] == pytest.approx(0.25) and metrics["agreement/breaches"] == 1
    assert set(compare_by_scoring(batch(lambda row: 0, 0)[0], probe)) == set(MODES)


def test_an_engine_that_cannot_be_asked_leaves_the_figures():
    def refused(sequences):
        raise EngineError("http://somewhere does not answer")

    gate, _ = gate_of(config_with(every=1, breaches=1), Probe(OneRank(), ScoringActor(), refused, lambda: None))
    with pytest.raises(TrainingError, match="0.2 nats .*unknown, because .*http://somewhere does not answer"):
        checked(gate, 0, shift=0.2)
