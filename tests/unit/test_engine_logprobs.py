"""The engine's log-probs in place of the actor's (algorithm.old_logprobs): what they replace, what is still scored."""

import random

import pytest
import torch

from megatron_policysplit.algorithms.advantages import TokenStatistics
from megatron_policysplit.algorithms.checks import check_method
from megatron_policysplit.algorithms.methods import build_algorithm
from megatron_policysplit.algorithms.signals import SignalBuilder, live_rows, scored_rows
from megatron_policysplit.config import METHOD_NAMES, Config
from megatron_policysplit.errors import ConfigError
from megatron_policysplit.rows import Mode, Rollout, share_rollouts
from megatron_policysplit.rows.kl_pairs import measured_rollouts, pairings
from megatron_policysplit.rows.plan import make_plan
from megatron_policysplit.training.metrics import training_metrics

PROMPTS = {q: {Mode.NORMAL: [1, 2], Mode.HIGH_ENTROPY: [3, 1, 2]} for q in range(2)}


def rollout(question, mode, sample, reward, auxiliary=False):
    draw = random.Random(f"{question}{mode}{sample}")
    engine = [-3 * draw.random() for _ in range(3)]
    rest = {"finish_reason": "stop", "weight_versions": [(0, 0)], "reward": reward, "auxiliary": auxiliary}
    return Rollout(0, question, mode, sample, [5, 6, 7], engine, **rest)


def rows_of(method, *rewards):
    """One question for each tuple of four rewards; the method's sampling modes answer in turn."""
    chosen = algorithm(method)
    modes = chosen.method.sampling_modes
    rollouts = [rollout(q, modes[i % len(modes)], i, r) for q, group in enumerate(rewards) for i, r in enumerate(group)]
    return share_rollouts(rollouts, PROMPTS, chosen.method.training_modes)


def config(method="grpo", old="engine", kl_tokens="none", **options):
    made = Config()
    made.algorithm.name, made.algorithm.old_logprobs, made.log.kl_tokens = method, old, kl_tokens
    made.algorithm.options = {method: options} if options else {}
    return made


def algorithm(method, **options):
    return build_algorithm(config(method, **options).algorithm)


def actor_statistics(rows):
    draw = torch.Generator().manual_seed(3)
    return [TokenStatistics(-torch.rand(3, generator=draw), torch.rand(3, generator=draw)) for _ in rows]


def signals(rows, old, given):
    chosen = build_algorithm(given.algorithm)
    plan = make_plan(rows, [True] * len(rows), replicas=1, optimizer_steps=1, max_tokens=1000, seed=0)
    return SignalBuilder(rows, old, plan, chosen, given).at(0)


def spared(rows, given):
    chosen = build_algorithm(given.algorithm)
    scored = scored_rows(rows, live_rows(rows, chosen, given), chosen, given)
    return {row.key for row, there in zip(rows, scored, strict=True) if not there}


ENGINE_METHODS = "grpo dr_grpo rloo dapo asym_grpo policy_split clip_cov entropy_bonus".split()
MIXED, EQUAL = (1.0, 0.0, 0.0, 1.0), (1.0,) * 4


def test_the_engines_logprobs_stand_behind_the_sampling_prompt_alone():
    """In the ratio, and in what a method reads: Policy Split's bonus mixes them with the actor's of the other row."""
    rows = rows_of("policy_split", MIXED)
    old = actor_statistics(rows)
    found = signals(rows, old, config("policy_split", eta=0.7))
    replaced = [
        TokenStatistics(torch.tensor(row.rollout.engine_logprobs), s.entropy) if row.on_policy else s
        for row, s in zip(rows, old, strict=True)
    ]
    expected = signals(rows, replaced, config("policy_split", "actor", eta=0.7))
    assert {row.on_policy for row in rows} == {True, False}
    for row, signal, wanted, actor in zip(rows, found, expected, old, strict=True):
        assert torch.equal(signal.advantages, wanted.advantages) and torch.equal(signal.importance, torch.ones(3))
        own = torch.tensor(row.rollout.engine_logprobs)
        assert torch.equal(signal.old_logprobs, own if row.on_policy else actor.logprobs)


def test_an_auxiliary_response_keeps_the_actors():
    """The engine's are those of another temperature."""
    rows = [
        *rows_of("grpo", MIXED),
        *share_rollouts([rollout(0, Mode.NORMAL, 4, 1.0, auxiliary=True)], PROMPTS, [Mode.NORMAL]),
    ]
    old = actor_statistics(rows)
    found = signals(rows, old, config("grpo"))
    assert torch.equal(found[-1].old_logprobs, old[-1].logprobs)
    assert torch.equal(found[0].old_logprobs, torch.tensor(rows[0].rollout.engine_logprobs))


def test_rows_whose_logprobs_are_there_are_not_scored():
    for method in ENGINE_METHODS:
        rows = rows_of(method, MIXED, EQUAL)
        assert spared(rows, config(method)) == {row.key for row in rows if row.on_policy or row.key.question == 1}, (
            method
        )
        assert spared(rows, config(method, "actor")) <= {row.key for row in rows if not row.on_policy}, method
    assert not all(row.on_policy for row in rows_of("policy_split", MIXED))


def test_methods_that_need_more_refuse():
    """Entropies, a pass of their own, a second temperature, or a term that rounding would switch on."""
    for method in METHOD_NAMES:
        given = config(method)
        if method in ENGINE_METHODS:
            check_method(given)
            continue
        with pytest.raises(ConfigError, match=f"algorithm.name={method} .*set algorithm.old_logprobs=actor"):
            check_method(given)
    with pytest.raises(ConfigError, match="algorithm.name=policy_split with these options"):
        check_method(config("policy_split", entropy_estimate="entropy"))
    check_method(config("kl_cov", "actor"))


def test_the_methods_read_no_entropy():
    """Signals and state of those that take the engine's log-probs are the same whatever the entropies are."""
    for method in ENGINE_METHODS:
        rows = rows_of(method, MIXED, EQUAL)
        old = actor_statistics(rows)
        blank = [TokenStatistics(s.logprobs, torch.full((3,), torch.nan)) for s in old]
        for one, other in zip(signals(rows, old, config(method)), signals(rows, blank, config(method)), strict=True):
            for name, value in vars(one).items():
                assert value is None or isinstance(value, str) or torch.equal(value, getattr(other, name)), (
                    method,
                    name,
                )


def test_the_logs_have_their_share_scored():
    rows = rows_of("policy_split", MIXED, EQUAL)
    assert spared(rows, config("policy_split", kl_tokens="all")) == set()
    measured = measured_rollouts(rows, "sample")
    assert measured == {(0, q, mode, s) for q in (0, 1) for mode, s in (("normal", 0), ("high_entropy", 1))}
    kept = {row.key for row in rows if row.rollout.key in measured}
    everything = spared(rows, config("policy_split"))
    assert spared(rows, config("policy_split", kl_tokens="sample")) == everything - kept
    assert {rows[index].key for index in pairings(rows, "sample")} == kept
    alone = rows_of("grpo", MIXED)
    assert {row.key for row in alone} - spared(alone, config(kl_tokens="sample")) == {alone[0].key}


def test_what_was_not_scored_is_in_no_mean():
    rows = rows_of("grpo", MIXED)
    blank = TokenStatistics(torch.zeros(3), torch.zeros(3), scored=False)
    there = TokenStatistics(torch.tensor(rows[2].rollout.engine_logprobs) + 0.5, torch.full((3,), 1.25))
    found = training_metrics(rows, [blank, blank, there, blank], [True] * 4)
    assert found["normal/entropy_nats"] == 1.25
    assert found["actor/engine_logprob_difference"] == pytest.approx(0.5)
    none = training_metrics(rows, [blank] * 4, [True] * 4)
    assert none.keys() == found.keys() - {
        "normal/entropy_nats",
        "normal/entropy_bits",
        "actor/engine_logprob_difference",
    }


def flat(batches):
    return sorted(index for batch in batches for index in batch)


def test_the_plan_trains_what_it_does_not_score_and_compares_it_apart():
    """Scored rows stand in the same micro-batches whether others are compared or not; those too, whatever is scored."""
    rows = rows_of("policy_split", MIXED, EQUAL)
    live = [row.key.question == 0 for row in rows]
    scored = [not row.on_policy for row in rows]
    compared = [not there for there in scored]
    sizes = {"replicas": 2, "expert": 2, "optimizer_steps": 1, "max_tokens": 15, "seed": 0}
    (shares,) = make_plan(rows, live, scored=scored, compared=compared, **sizes).micro_batches
    found = {name: flat(sum((getattr(part, name) for part in shares), [])) for name in vars(shares[0])}
    everything = range(len(rows))
    assert found["train"] == [i for i in everything if live[i] and scored[i]]
    assert found["train_only"] == [i for i in everything if live[i] and not scored[i]]
    assert found["score_only"] == [i for i in everything if scored[i] and not live[i]]
    assert found["compared"] == [i for i in everything if compared[i]]
    for name in found:
        assert len({len(getattr(part, name)) for part in shares}) == 1
        for batch in (batch for part in shares for batch in getattr(part, name)):
            assert len(batch) * max((rows[i].length for i in batch), default=0) <= 15
    (without,) = make_plan(rows, live, scored=scored, **sizes).micro_batches
    for part, same in zip(shares, without, strict=True):
        assert (part.train, part.train_only, part.score_only) == (same.train, same.train_only, same.score_only)
        assert not flat(same.compared)
