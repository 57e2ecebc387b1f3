"""Rollout sharing: every response under both prompts, token for token."""

import random

import pytest

from megatron_policysplit.algorithms.methods import method_named
from megatron_policysplit.rows import MODES, Mode, Rollout, share_rollouts
from tests.support.advantage_batches import EOS, partner, prompts, rollout


def test_share_gives_every_response_under_both_prompts_token_for_token():
    rollouts = [rollout(q, mode, s, [q, s, EOS]) for q in (0, 1) for mode in MODES for s in (0, 1)]
    given = prompts((0, 1))
    rows = share_rollouts(rollouts, given)
    assert len(rows) == 2 * len(rollouts) == len({row.key for row in rows})
    by_key = {row.key: row for row in rows}
    for row in rows:
        other = by_key[partner(row.key)]
        assert partner(other.key) == row.key and {row.mode, other.mode} == set(MODES)
        assert other.rollout.tokens == row.rollout.tokens and row.rollout.tokens[-1] == EOS
        normal, high = sorted((row, other), key=lambda row: row.mode == Mode.HIGH_ENTROPY)
        assert list(high.prompt) == [7, 7, 7, *normal.prompt]
        assert row.on_policy == (row.key.training_mode == row.key.sampling_mode)
    assert sum(row.on_policy for row in rows) == len(rollouts)


def test_share_does_not_depend_on_the_order_of_arrival():
    rollouts = [rollout(q, mode, s, [1, EOS]) for q in (0, 1) for mode in MODES for s in (0, 1)]
    shuffled = rollouts[:]
    random.Random(3).shuffle(shuffled)
    assert shuffled != rollouts
    assert [row.key for row in share_rollouts(shuffled, prompts((0, 1)))] == [
        row.key for row in share_rollouts(rollouts, prompts((0, 1)))
    ]


def test_share_for_grpo_gives_the_normal_rows_alone():
    method = method_named("grpo")
    rows = share_rollouts([rollout(0, Mode.NORMAL, 0, [1, EOS])], prompts((0,)), method.training_modes)
    assert [row.mode for row in rows] == [Mode.NORMAL]


def test_a_rollout_with_unequal_lists_is_an_error():
    with pytest.raises(ValueError, match="has 2 tokens, 1 log-probs and 2 mask entries"):
        Rollout(0, 0, Mode.NORMAL, 0, [1, 2], [-1.0], "stop", [(0, 0)])
    with pytest.raises(ValueError, match="has 0 tokens"):
        Rollout(0, 0, Mode.NORMAL, 0, [], [], "stop", [(0, 0)])
