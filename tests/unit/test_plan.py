"""Placement of rows: a partition that depends on the seed alone, and micro-batches that keep their bound."""

import random
from collections import Counter

import pytest

from megatron_policysplit.rows import MODES, Mode, Rollout
from megatron_policysplit.rows import share_rollouts as share_rows
from megatron_policysplit.rows.plan import make_plan
from tests.support.advantage_batches import partner


def make_rows(questions=5, per_mode=2, seed=0, longest=40):
    draw = random.Random(seed)
    rollouts = []
    for question in range(questions):
        for mode in MODES:
            for sample in range(per_mode):
                tokens = [1] * draw.randint(1, longest)
                rollouts.append(Rollout(0, question, mode, sample, tokens, [0.0] * len(tokens), "stop", [(0, 0)]))
    prompts = {q: {Mode.NORMAL: [1] * (3 + q), Mode.HIGH_ENTROPY: [1] * (9 + q)} for q in range(questions)}
    return share_rows(rollouts, prompts)


ROWS = make_rows()
# Both rows of a rollout live or die together, as `live_rows` has it.
LIVE = [row.rollout.sample == 0 or row.key.question % 2 == 0 for row in ROWS]
ALL = [True] * len(ROWS)


def plan(rows=ROWS, live=LIVE, *, replicas=1, optimizer_steps=1, max_tokens=100, seed=3, **options):
    sizes = {"optimizer_steps": optimizer_steps, "max_tokens": max_tokens}
    return make_plan(rows, live, replicas=replicas, seed=seed, **sizes, **options)


def flat(batches):
    return [index for batch in batches for index in batch]


settings = pytest.mark.parametrize(
    ("replicas", "optimizer_steps", "max_tokens"),
    [(1, 1, 100), (1, 3, 100), (2, 1, 60), (2, 4, 1), (3, 2, 10**6), (7, 20, 100)],
)


@settings
def test_every_row_exactly_once(replicas, optimizer_steps, max_tokens):
    made = plan(replicas=replicas, optimizer_steps=optimizer_steps, max_tokens=max_tokens)
    assert sorted(flat(made.steps)) == list(range(len(ROWS)))
    assert len(made.steps) == len(made.micro_batches) == optimizer_steps
    for step, shares in zip(made.steps, made.micro_batches, strict=True):
        assert len(shares) == replicas
        placed = [index for share in shares for index in flat(share.train) + flat(share.score_only)]
        assert sorted(placed) == step


@settings
def test_live_rows_are_trained_and_dead_rows_only_scored(replicas, optimizer_steps, max_tokens):
    made = plan(replicas=replicas, optimizer_steps=optimizer_steps, max_tokens=max_tokens)
    for share in sum(made.micro_batches, []):
        assert all(LIVE[index] for index in flat(share.train))
        assert not any(LIVE[index] for index in flat(share.score_only))


@settings
def test_partners_share_replica_and_step_and_stand_together(replicas, optimizer_steps, max_tokens):
    made = plan(replicas=replicas, optimizer_steps=optimizer_steps, max_tokens=max_tokens)
    place = {}
    for number, shares in enumerate(made.micro_batches):
        for replica, share in enumerate(shares):
            for name in ("train", "score_only"):
                for position, index in enumerate(flat(getattr(share, name))):
                    place[ROWS[index].key] = (number, replica, name, position)
    for key, (number, replica, name, position) in place.items():
        assert place[partner(key)][:3] == (number, replica, name)
        assert abs(place[partner(key)][3] - position) == 1


def test_optimizer_steps_depend_on_nothing_but_the_seed():
    expected = plan(optimizer_steps=3).steps
    for replicas in (1, 2, 5):
        for max_tokens in (1, 100, 10**6):
            for live in (LIVE, ALL, [False] * len(ROWS)):
                found = plan(live=live, replicas=replicas, optimizer_steps=3, max_tokens=max_tokens)
                assert found.steps == expected
    assert plan(optimizer_steps=3, seed=4).steps != expected


def test_optimizer_steps_are_even_and_shuffled():
    steps = plan(optimizer_steps=4).steps
    assert {len(step) for step in steps} == {10}  # 20 rollouts of 2 rows
    questions = [Counter(ROWS[index].key.question for index in step) for step in steps]
    assert all(len(counter) > 1 for counter in questions)
    assert all({ROWS[index].mode for index in step} == set(MODES) for step in steps)


@pytest.mark.parametrize("max_tokens", [1, 30, 50, 77, 100, 400])
@pytest.mark.parametrize("seed", range(3))
def test_micro_batches_keep_their_bound(max_tokens, seed):
    rows = make_rows(seed=seed)
    made = plan(rows, ALL, replicas=2, max_tokens=max_tokens)
    for share in sum(made.micro_batches, []):
        for batch in share.train + share.score_only:
            padded = len(batch) * max(rows[index].length for index in batch)
            assert batch and (padded <= max_tokens or len(batch) == 1)


@pytest.mark.parametrize("max_tokens", [1, 63, 64, 150, 400, 1000])
@pytest.mark.parametrize("multiple", [2, 6, 64, 100])
def test_the_bound_counts_rounded_widths(max_tokens, multiple):
    """And no more than that: two neighbours never fit into one."""
    shares = sum(plan(live=ALL, replicas=2, max_tokens=max_tokens, width_multiple=multiple).micro_batches, [])

    def tokens(batch):
        longest = max(ROWS[index].length for index in batch)
        width = next(width for width in range(0, 10**6, multiple) if width >= longest)
        return len(batch) * width

    batches = [batch for share in shares for batch in share.train]
    assert sorted(flat(batches)) == list(range(len(ROWS)))
    assert all(tokens(batch) <= max_tokens or len(batch) == 1 for batch in batches)
    for share in shares:
        for left, right in zip(share.train, share.train[1:], strict=False):
            assert tokens([*left, right[0]]) > max_tokens


def test_micro_batches_are_filled():
    """The bound is no excuse for one row a micro-batch: two neighbours never fit into one."""
    batches = plan(live=ALL, max_tokens=150).micro_batches[0][0].train
    assert len(batches) < len(ROWS) / 2
    for left, right in zip(batches, batches[1:], strict=False):
        longest = max(ROWS[index].length for index in [*left, right[0]])
        assert (len(left) + 1) * longest > 150


def test_replicas_get_equal_cost():
    shares = plan(live=ALL, replicas=2).micro_batches[0]
    cost = [sum(ROWS[index].length for index in flat(share.train)) for share in shares]
    costliest = max(ROWS[i].length + ROWS[i + 1].length for i in range(len(ROWS) - 1))
    assert abs(cost[0] - cost[1]) <= costliest


def test_a_replica_without_work():
    one = [row.rollout.key == ROWS[0].rollout.key for row in ROWS]
    first, second = plan(live=one, replicas=2).micro_batches[0]
    assert sorted(map(len, (flat(first.train), flat(second.train)))) == [0, 2]
    assert len(flat(first.score_only)) + len(flat(second.score_only)) == len(ROWS) - 2


def test_replicas_that_share_experts_get_equal_numbers_of_micro_batches():
    """Empty ones at the end make up for what is missing; nothing else changes."""
    one = [row.rollout.key == ROWS[0].rollout.key for row in ROWS]
    added = 0
    for live in (LIVE, one, [False] * len(ROWS)):
        made = plan(live=live, replicas=6, expert=3, optimizer_steps=2, max_tokens=60)
        apart = plan(live=live, replicas=6, optimizer_steps=2, max_tokens=60)
        for shares, others in zip(made.micro_batches, apart.micro_batches, strict=True):
            for kind in ("train", "score_only"):
                ours, theirs = ([getattr(share, kind) for share in step] for step in (shares, others))
                for first in (0, 3):
                    most = max(map(len, theirs[first : first + 3]))
                    for mine, before in zip(ours[first : first + 3], theirs[first : first + 3], strict=True):
                        assert mine == before + [[]] * (most - len(before))
                        added += most - len(before)
    assert added


def test_no_live_rows_and_no_rows():
    nothing = plan(live=[False] * len(ROWS), replicas=2, optimizer_steps=2)
    assert all(share.train == [] for share in sum(nothing.micro_batches, []))
    empty = plan([], [], replicas=2, optimizer_steps=2)
    assert empty.steps == [[], []]
    assert all(share.train == share.score_only == [] for share in sum(empty.micro_batches, []))


def test_deterministic():
    assert plan(replicas=2, optimizer_steps=2) == plan(replicas=2, optimizer_steps=2)
