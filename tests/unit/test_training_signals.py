"""Masks, live rows and what each row is trained with, on small batches worked out by hand."""

import math

import pytest
import torch

from megatron_policysplit.algorithms.advantages import TokenStatistics, make_batch
from megatron_policysplit.algorithms.methods import build_algorithm, method_named, policy_split
from megatron_policysplit.algorithms.signals import RowSettings, SignalBuilder, live_rows, scored_rows, trained_mask
from megatron_policysplit.config import Config
from megatron_policysplit.rows import MODES, Mode, Rollout, share_rollouts
from megatron_policysplit.rows.plan import make_plan

PROMPTS = {q: {Mode.NORMAL: [1, 2], Mode.HIGH_ENTROPY: [3, 4, 1, 2]} for q in range(3)}


def rollout(question, mode, sample, reward, *, mask=(1, 1, 1), finish="stop", engine=None, auxiliary=False):
    length = len(mask)
    return Rollout(
        batch=0,
        question=question,
        mode=mode,
        sample=sample,
        tokens=[5] * length,
        engine_logprobs=list(engine or [-1.0] * length),
        finish_reason=finish,
        weight_versions=[(0, 0)],
        loss_mask=list(mask),
        reward=reward,
        auxiliary=auxiliary,
    )


def config(**settings):
    result = Config()
    for name, value in settings.items():
        section, key = name.split("__")
        assert hasattr(getattr(result, section), key)
        setattr(getattr(result, section), key, value)
    return result


def algorithm(settings, method="policy_split"):
    settings.algorithm.name = method
    return build_algorithm(settings.algorithm)


def train_signals(rows, old, settings, method="policy_split", reference=None):
    live = [True] * len(rows)
    plan = make_plan(rows, live, replicas=1, optimizer_steps=1, max_tokens=1000, seed=0)
    builder = builder_of(rows, old, plan, settings, method, reference=reference)
    return list(builder.for_step(0).values())


def builder_of(rows, old, plan, settings, method, **rest):
    return SignalBuilder(rows, old, plan, algorithm(settings, method), RowSettings.of(settings), **rest)


def batch(method, *answers):
    """Rows of one question per answer list; answers are `rollout` keyword dicts, dealt to the modes in turn."""
    modes = method_named(method).sampling_modes
    rollouts = [
        rollout(question, modes[index % len(modes)], index, **answer)
        for question, group in enumerate(answers)
        for index, answer in enumerate(group)
    ]
    return share_rollouts(rollouts, PROMPTS, method_named(method).training_modes)


def live(rows, method="policy_split", **settings):
    """{(question, sample)} of the live rows; both rows of a response must agree."""
    given = config(**settings)
    flags = live_rows(rows, algorithm(given, method), RowSettings.of(given))
    assert len(flags) == len(rows)
    by_rollout = {}
    for row, flag in zip(rows, flags, strict=True):
        assert by_rollout.setdefault((row.key.question, row.key.sample), flag) == flag
    return {key for key, flag in by_rollout.items() if flag}


def score(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        TokenStatistics(*(-3 * torch.rand(2, row.response_length, generator=generator)) * torch.tensor([[1.0], [-1.0]]))
        for row in rows
    ]


# --- masks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("finish", "overlong", "expected"),
    [
        ("stop", "grade", [True, False, True]),
        ("length", "grade", [True, False, True]),
        ("stop", "mask", [True, False, True]),
        ("length", "mask", [False, False, False]),
    ],
)
def test_trained_mask(finish, overlong, expected):
    row = share_rollouts([rollout(0, Mode.NORMAL, 0, 1.0, mask=(1, 0, 1), finish=finish)], PROMPTS)[0]
    mask = trained_mask(row, overlong)
    assert mask.dtype == torch.bool and mask.tolist() == expected


# --- live rows ---------------------------------------------------------------------------------------

MIXED = [{"reward": 1.0}, {"reward": 0.0}]
EQUAL = [{"reward": 0.1}] * 3 + [{"reward": 0.1}]
CENTRED = [{"reward": 0.0}, {"reward": 0.5}, {"reward": 1.0}, {"reward": 0.5}]


@pytest.mark.parametrize("method", ["grpo", "policy_split"])
def test_rows_without_an_advantage_are_not_live(method):
    rows = batch(method, MIXED, EQUAL, CENTRED)
    assert live(rows, method) == {(0, 0), (0, 1), (2, 0), (2, 2)}


@pytest.mark.parametrize("settings", [{"algorithm__kl_coef": 0.1}, {"algorithm__entropy_coef": 0.1}])
def test_terms_beside_the_advantage_keep_every_row_alive(settings):
    rows = batch("policy_split", MIXED, EQUAL)
    assert live(rows, **settings) == {(row.key.question, row.key.sample) for row in rows}


@pytest.mark.parametrize("settings", [{}, {"algorithm__kl_coef": 0.1}])
def test_rows_without_a_trained_token_are_never_live(settings):
    rows = batch("policy_split", [{"reward": 1.0, "mask": (0, 0)}, {"reward": 0.0}])
    assert live(rows, **settings) == {(0, 1)}


def test_overlong_responses_are_live_only_when_graded():
    rows = batch("policy_split", [{"reward": 1.0}, {"reward": 0.0, "finish": "length"}])
    assert live(rows, train__overlong="grade") == {(0, 0), (0, 1)}
    assert live(rows, train__overlong="mask") == {(0, 0)}
    # Its reward still counts in its group: the other response keeps its advantage.
    signals = train_signals(rows, score(rows), config(train__overlong="mask"))
    for row, signal in zip(rows, signals, strict=True):
        assert (signal.weights > 0).any() == (signal.advantages != 0).all() == (row.key.sample == 0)


def test_a_punishment_of_length_makes_equal_grades_unequal_and_comes_before_the_groups():
    """Of at most 4 tokens, 2 without punishment: the response of 4 gets -1, that of 3 gets -0.5."""
    given = {"algorithm__options": {"dapo": {"cache_tokens": 2}}, "rollout__max_response_tokens": 4}
    answers = [{"reward": 1.0, "mask": mask} for mask in ((1, 1), (1, 1, 1, 1), (1, 1, 1))]
    rows = batch("dapo", answers, [{"reward": 0.0, "mask": (1,)}, {"reward": 0.0, "mask": (1, 1)}])
    assert live(rows, "dapo", **given) == {(0, 0), (0, 1)}
    signals = train_signals(rows, score(rows), config(**given), "dapo")
    expected = [1.0 / (1 + 2e-6), -1.0 / (1 + 2e-6), 0.0, 0.0, 0.0]  # of 1, 0 and 0.5, whose deviation is a half
    for signal, value in zip(signals, expected, strict=True):
        assert signal.advantages.tolist() == pytest.approx([value] * len(signal.advantages))


def test_a_method_with_a_term_of_its_own_keeps_every_row():
    rows = batch("grpo", EQUAL)
    assert live(rows, "entropy_bonus") == {(0, sample) for sample in range(4)}
    assert live(rows, "grpo") == set()


@pytest.mark.parametrize("method", ["grpo", "policy_split"])
@pytest.mark.parametrize("variant", ["paper", "authors_code"])
def test_the_methods_promise_holds(method, variant):
    """Rows that are not live have an advantage of exactly zero at every token, and only those."""
    rows = batch(method, MIXED, EQUAL, CENTRED)
    options = {"eta": 0.9, "eta_normal": 0.4, "variant": variant}
    settings = config(algorithm__options={"policy_split": options})
    flags = live_rows(rows, algorithm(settings, method), RowSettings.of(settings))
    for flag, signal in zip(flags, train_signals(rows, score(rows), settings, method), strict=True):
        assert flag == bool((signal.advantages != 0).any())


def test_no_rows():
    """Ranks that are not leaders hold none."""
    assert live_rows([], algorithm(config()), RowSettings.of(config())) == []
    assert train_signals([], [], config()) == []


# --- signals -----------------------------------------------------------------------------------------


def test_signals_follow_their_rows():
    rows = batch("policy_split", [{"reward": 1.0, "mask": (1,)}, {"reward": 0.0, "mask": (1, 0, 1, 1)}], MIXED)
    old = score(rows)
    reference = [-torch.rand(row.response_length) for row in rows]
    signals = train_signals(rows, old, config(), reference=reference)
    assert len(signals) == len(rows)
    for row, statistics, initial, signal in zip(rows, old, reference, signals, strict=True):
        assert signal.old_logprobs is statistics.logprobs and signal.reference_logprobs is initial
        trained = signal.weights > 0
        assert trained.tolist() == [bool(m) for m in row.rollout.loss_mask]
        assert signal.advantages.shape == signal.importance.shape == (row.response_length,)
        assert (signal.advantages[~trained] == 0).all()
        assert (signal.importance == 1).all()
        expected = math.copysign(1.0, row.rollout.reward - 0.5)
        assert (signal.advantages[trained].sign() == expected).all()
    assert train_signals(rows, old, config())[0].reference_logprobs is None


def test_signals_are_those_of_the_whole_batch():
    """The advantages are the method's over all rows at once, cut up again."""
    rows = batch("policy_split", MIXED, CENTRED)
    old, settings = score(rows), config(algorithm__options={"policy_split": {"eta": 0.7}})
    whole = make_batch(rows, old, [trained_mask(row, "grade") for row in rows])
    signals = train_signals(rows, old, settings)
    together = torch.cat([signal.advantages for signal in signals])
    assert torch.equal(together, policy_split.advantages(whole, policy_split.Options(eta=0.7)))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_is_taken_under_the_sampling_prompt_for_both_rows(level):
    """min(exp(actor - engine), cap) with the actor's log-probs of the on-policy row; never the other prompt's."""
    engines = ([-1.0, -2.0, -0.2], [-0.4, -0.1, -3.0])
    rows = batch("policy_split", [{"reward": 1.0, "engine": engines[0]}, {"reward": 0.0, "engine": engines[1]}])
    old = score(rows)
    settings = config(algorithm__importance_cap=1.5, algorithm__importance_level=level)
    signals = train_signals(rows, old, settings)
    for row, signal in zip(rows, signals, strict=True):
        own = next(i for i, other in enumerate(rows) if other.rollout is row.rollout and other.on_policy)
        actor = old[own].logprobs.tolist()
        differences = [a - e for a, e in zip(actor, row.rollout.engine_logprobs, strict=True)]
        if level == "sequence":
            differences = [sum(differences)] * 3
        torch.testing.assert_close(signal.importance.tolist(), [min(math.exp(d), 1.5) for d in differences])
        assert torch.equal(signal.importance, signals[own].importance)
    assert {row.on_policy for row in rows} == {True, False} and {row.mode for row in rows} == set(MODES)


# --- auxiliary rows ------------------------------------------------------------------------------------

SECOND = {"reward": 1.0, "mask": (1, 1, 0, 1), "engine": [-9.0, -0.1, -2.0, -3.0], "auxiliary": True}


def test_auxiliary_rows_are_live_but_in_no_group():
    """Of questions whose other responses are equal, too; and they make no group of equals a mixed one."""
    rows = batch("scope", [*MIXED, SECOND], [{"reward": 0.0}] * 3 + [SECOND])
    assert live(rows, "scope") == {(0, 0), (0, 1), (0, 2), (1, 3)}
    assert live(rows, "scope", train__overlong="mask") == {(0, 0), (0, 1), (0, 2), (1, 3)}
    without = [row for row in rows if not row.auxiliary]
    settings = config()
    signals = dict(zip((row.key for row in rows), train_signals(rows, score(rows), settings, "scope"), strict=True))
    alone = train_signals(without, score(without), settings, "scope")
    for row, signal in zip(without, alone, strict=True):
        assert torch.equal(signals[row.key].advantages, signal.advantages)
    for row in rows:
        if row.auxiliary:
            assert signals[row.key].advantages.tolist() == [1.0, 1.0, 0.0, 1.0] and not row.on_policy


def test_auxiliary_rows_have_no_importance_weight():
    """Nor are they in what is said of the weights: the engine's log-probs are those of another temperature."""
    rows = batch("aepo", [{"reward": 1.0}, {"reward": 0.0}, SECOND])
    old = [TokenStatistics(torch.full((row.response_length,), -0.5), torch.ones(row.response_length)) for row in rows]
    plan = make_plan(rows, [True] * 3, replicas=1, optimizer_steps=1, max_tokens=1000, seed=0)
    settings = config(algorithm__importance_cap=10.0)
    signals = builder_of(rows, old, plan, settings, "aepo")
    importance = [signal.importance.tolist() for signal in signals.for_step(0).values()]
    assert importance == [pytest.approx([math.exp(0.5)] * 3)] * 2 + [[1.0] * 4]
    found = signals.metrics()
    assert found["importance/min"] == found["importance/max"] == pytest.approx(math.exp(0.5))


def weights(rows, method, aggregation):
    """Of each row's tokens, where a response has 10 tokens at most."""
    given = config(algorithm__loss_aggregation=aggregation, rollout__max_response_tokens=10)
    return [signal.weights.tolist() for signal in train_signals(rows, score(rows), given, method)]


def test_rows_apart_weigh_by_the_number_of_the_others():
    """Two ordinary rows of 3 and 1 trained tokens, and an auxiliary one of 3 of its 4."""
    rows = batch("scope", [{"reward": 1.0}, {"reward": 0.0, "mask": (1, 0)}, SECOND])
    for aggregation, first, second in (
        ("token_mean", 1 / 4, 1 / 4),
        ("sequence_mean_token_mean", 1 / 6, 1 / 2),
        ("sequence_mean_token_sum_norm", 1 / 20, 1 / 20),
    ):
        expected = [[first] * 3, [second, 0.0], [1 / 6, 1 / 6, 0.0, 1 / 6]]
        assert weights(rows, "scope", aggregation) == [pytest.approx(values) for values in expected]
    assert not any(weights(rows[2:], "scope", "token_mean")[0])  # a step without any ordinary row
    expected = ([1 / 7] * 3, [1 / 7, 0.0], [1 / 7, 1 / 7, 0.0, 1 / 7])
    assert weights(rows, "aepo", "token_mean") == [pytest.approx(values) for values in expected]


# --- optimizer steps and micro-batches -----------------------------------------------------------------


def source(rows, old, settings, method, *, steps=1, max_tokens=1000, replicas=1):
    plan = make_plan(rows, [True] * len(rows), replicas=replicas, optimizer_steps=steps, max_tokens=max_tokens, seed=0)
    return builder_of(rows, old, plan, settings, method), plan


def test_a_state_moves_on_with_every_optimizer_step():
    rows = batch("adaptive_entropy", MIXED, CENTRED)
    settings = config(algorithm__options={"adaptive_entropy": {"target": 100.0, "delta": 0.25}})
    signals, _ = source(rows, score(rows), settings, "adaptive_entropy", steps=3)
    steps = [next(iter(signals.for_step(step).values())) for step in range(3)]
    assert [signal.entropy_coef[0].item() for signal in steps] == [0.0, 0.25, 0.5]
    assert signals.state == {"coef": 0.75} and signals.metrics()["method/coef"] == 0.75
    later = builder_of(rows, score(rows), signals.plan, settings, "adaptive_entropy", state=signals.state)
    assert next(iter(later.for_step(0).values())).entropy_coef[0].item() == 0.75


def kept_entropies(signals, statistics):
    """Row -> entropies of the tokens that forking_tokens keeps."""
    return {
        row: {
            round(h, 5)
            for h, is_kept in zip(statistics[row].entropy.tolist(), signal.scale.tolist(), strict=True)
            if is_kept
        }
        for row, signal in signals.items()
    }


def top(values, share):
    ranked = sorted(values, reverse=True)
    return {round(value, 5) for value in ranked[: max(1, math.ceil(share * len(ranked)))]}


@pytest.mark.parametrize("replicas", [1, 2])
def test_quantiles_are_over_all_tokens_or_those_of_a_micro_batch(replicas):
    rows, given = batch("forking_tokens", MIXED, CENTRED), {"forking_tokens": {"share": 0.4}}
    old = score(rows)
    everything = [h for s in old for h in s.entropy.tolist()]
    whole, _ = source(rows, old, config(algorithm__options=given), "forking_tokens", max_tokens=10, replicas=replicas)
    found = set().union(*kept_entropies(whole.for_step(0), old).values())
    assert found == top(everything, 0.4)
    settings = config(algorithm__options=given, algorithm__scope="micro")
    micro, plan = source(rows, old, settings, "forking_tokens", max_tokens=10, replicas=replicas)
    kept = kept_entropies(micro.for_step(0), old)
    parts = [part for share in plan.micro_batches[0] for part in share.train]
    assert len(parts) >= 3
    for part in parts:
        mine = [h for index in part for h in old[index].entropy.tolist()]
        assert set().union(*(kept[index] for index in part)) == top(mine, 0.4)
    assert set().union(*kept.values()) != found


def test_new_statistics_are_over_the_rows_of_their_step():
    """Rewards still count in whole groups, and the ratio keeps the log-probs from before the batch."""
    rows, given = batch("forking_tokens", MIXED, CENTRED), {"forking_tokens": {"share": 0.4}}
    old, new = score(rows), score(rows, seed=1)
    settings = config(algorithm__options=given, algorithm__statistics="step")
    signals, plan = source(rows, old, settings, "forking_tokens", steps=2)
    signals.for_step(0)
    second = signals.for_step(1, {index: new[index] for index in plan.steps[1]})
    assert set(second) == set(plan.steps[1])
    alike = train_signals(rows, old, settings, "forking_tokens")  # in a single step
    mine = [h for index in plan.steps[1] for h in new[index].entropy.tolist()]
    kept = kept_entropies(second, new)
    assert set().union(*(kept[index] for index in plan.steps[1])) == top(mine, 0.4)
    for index in plan.steps[1]:
        assert torch.equal(second[index].advantages, alike[index].advantages)
        assert second[index].old_logprobs is old[index].logprobs


def test_rows_that_nothing_reads_are_not_scored():
    """Question 0 has an advantage, question 1 has none: its rows behind the other prompt are there for their KL."""
    rows = batch("policy_split", [{"reward": float(i < 2)} for i in range(4)], [{"reward": 1.0}] * 4)
    unread = {row.key for row in rows if row.key.question == 1 and not row.on_policy}
    assert len(unread) == 4

    def left_out(method="policy_split", **settings):
        asked = config(**settings)
        chosen = algorithm(asked, method)
        row_settings = RowSettings.of(asked)
        there = scored_rows(rows, live_rows(rows, chosen, row_settings), chosen, row_settings)
        return {row.key for row, scored in zip(rows, there, strict=True) if not scored}

    assert left_out(log__kl_tokens="none") == unread
    assert left_out(log__kl_tokens="all") == set() == left_out(log__kl_tokens="none", algorithm__entropy_coef=0.1)
    # one rollout of each sampling mode has its KL taken, in both of its rows
    assert left_out(log__kl_tokens="sample") == {key for key in unread if key.sample > 1}
    assert left_out("adaptive_entropy", log__kl_tokens="none") == set()


def test_an_unscored_question_changes_no_other_signal():
    rows = batch("policy_split", [{"reward": float(i < 2)} for i in range(4)], [{"reward": 1.0}] * 4)
    draw = torch.Generator().manual_seed(5)
    full = [TokenStatistics(-torch.rand(3, generator=draw), torch.rand(3, generator=draw)) for _ in rows]
    blank = TokenStatistics(torch.zeros(3), torch.zeros(3))
    part = [blank if row.key.question == 1 and not row.on_policy else s for row, s in zip(rows, full, strict=True)]
    for one, other in zip(train_signals(rows, full, config()), train_signals(rows, part, config()), strict=True):
        assert torch.equal(one.advantages, other.advantages)
