"""Metrics of graded, scored rows, worked out by hand."""

import math

import pytest
import torch

from megatron_policysplit.algorithms.advantages import TokenStatistics
from megatron_policysplit.rows import MODES, Mode, Rollout, share_rollouts
from megatron_policysplit.training.metrics import evaluation_metrics, mode_metrics, training_metrics
from tests.support.advantage_batches import other

NORMAL, HIGH = Mode.NORMAL, Mode.HIGH_ENTROPY
PROMPTS = {q: {NORMAL: [1], HIGH: [2, 1]} for q in (0, 1)}


def rollout(question, mode, sample, reward, length, finish="stop", error=None):
    engine = [-1.0] * length
    return Rollout(0, question, mode, sample, [5] * length, engine, finish, [(0, 0)], reward=reward, reward_error=error)


ROLLOUTS = [
    rollout(0, NORMAL, 0, 1.0, 2),
    rollout(0, NORMAL, 1, 0.25, 4, finish="length"),
    rollout(1, NORMAL, 0, 0.5, 6, finish="length"),
    rollout(0, HIGH, 0, 1.0, 1),
    rollout(1, HIGH, 0, 0.0, 3, error="timed out"),
]
# (training mode, question, sampling mode, sample) -> entropy, KL to the other mode and log-prob of each token
CONSTANT = {
    ("normal", 0, "normal", 0): (0.5, 0.1, -1.5),
    ("normal", 0, "normal", 1): (1.0, 0.2, -0.5),
    ("normal", 1, "normal", 0): (2.0, 0.3, -1.0),
    ("high_entropy", 0, "high_entropy", 0): (3.0, 0.7, -1.25),
    ("high_entropy", 1, "high_entropy", 0): (1.5, 0.9, -3.0),
}
OFF_POLICY = (50.0, 60.0, -70.0)  # rows under the other prompt: must appear in nothing


def scored(with_kl=True):
    rows = share_rollouts(ROLLOUTS, PROMPTS)
    statistics = []
    for row in rows:
        name = (row.key.training_mode, row.key.question, row.key.sampling_mode, row.key.sample)
        entropy, kl, logprob = CONSTANT.get(name, OFF_POLICY)
        *full, kl = (torch.full((row.response_length,), value) for value in (logprob, entropy, kl))
        statistics.append(TokenStatistics(*full, {other(row.mode).value: kl} if with_kl else {}))
    return rows, statistics


NORMAL_EXPECTED = {
    "reward": (1.0 + 0.25 + 0.5) / 3,
    "accuracy": 1 / 3,  # 0.5 is not above one half
    "entropy_nats": (2 * 0.5 + 4 * 1.0 + 6 * 2.0) / 12,
    "entropy_bits": (2 * 0.5 + 4 * 1.0 + 6 * 2.0) / 12 / math.log(2),
    "response_tokens": 4.0,
    "truncated_share": 2 / 3,
    "kl_nats": (2 * 0.1 + 4 * 0.2 + 6 * 0.3) / 12,
}
HIGH_EXPECTED = {
    "reward": 0.5,
    "accuracy": 0.5,
    "entropy_nats": (1 * 3.0 + 3 * 1.5) / 4,
    "entropy_bits": (1 * 3.0 + 3 * 1.5) / 4 / math.log(2),
    "response_tokens": 2.0,
    "truncated_share": 0.0,
    "kl_nats": (1 * 0.7 + 3 * 0.9) / 4,
}


def test_mode_metrics():
    rows, statistics = scored()
    assert mode_metrics(rows, statistics, NORMAL) == pytest.approx(NORMAL_EXPECTED)
    assert mode_metrics(rows, statistics, HIGH) == pytest.approx(HIGH_EXPECTED)


def test_kl_only_where_it_was_scored():
    rows, statistics = scored()
    for row, row_statistics in zip(rows, statistics, strict=True):
        if row.key.question == 0:
            row_statistics.kl = {}
    assert mode_metrics(rows, statistics, NORMAL)["kl_nats"] == pytest.approx(0.3)
    assert "kl_nats" not in mode_metrics(*scored(with_kl=False), NORMAL)


def test_kl_to_several_modes():
    """`kl_nats` of the normal mode is that to the high-entropy mode; the logs of training have every pair."""
    rows, statistics = scored()
    for row, row_statistics in zip(rows, statistics, strict=True):
        if row.mode == NORMAL:
            row_statistics.kl["third"] = 2 * row_statistics.kl["high_entropy"]
    assert mode_metrics(rows, statistics, NORMAL) == pytest.approx(NORMAL_EXPECTED)
    found = training_metrics(rows, statistics, [True] * len(rows))
    assert {name: value for name, value in found.items() if name.startswith("kl/")} == pytest.approx(
        {
            "kl/normal_to_high_entropy": NORMAL_EXPECTED["kl_nats"],
            "kl/normal_to_third": 2 * NORMAL_EXPECTED["kl_nats"],
            "kl/high_entropy_to_normal": HIGH_EXPECTED["kl_nats"],
        }
    )


def test_a_mode_that_sampled_nothing():
    rows, statistics = scored()
    only_normal = [(row, s) for row, s in zip(rows, statistics, strict=True) if row.rollout.mode == NORMAL]
    assert mode_metrics([row for row, _ in only_normal], [s for _, s in only_normal], HIGH) == {}


def test_training_metrics():
    rows, statistics = scored()
    live = [index % 3 != 0 for index in range(len(rows))]
    found = training_metrics(rows, statistics, live)
    expected = {f"normal/{name}": value for name, value in NORMAL_EXPECTED.items() if name != "kl_nats"}
    expected |= {f"high_entropy/{name}": value for name, value in HIGH_EXPECTED.items() if name != "kl_nats"}
    expected |= {
        "kl/normal_to_high_entropy": NORMAL_EXPECTED["kl_nats"],
        "kl/high_entropy_to_normal": HIGH_EXPECTED["kl_nats"],
        # |log-prob - engine's -1| of each token under its sampling prompt
        "actor/engine_logprob_difference": (2 * 0.5 + 4 * 0.5 + 6 * 0.0 + 1 * 0.25 + 3 * 2.0) / 16,
        "actor/rows": 10.0,
        "actor/skipped_rows": 4.0,
        "reward/errors": 1.0,
    }
    assert found == pytest.approx(expected)
    assert all(type(value) is float for value in found.values())


def test_training_metrics_of_grpo_speak_of_the_normal_mode_alone():
    rollouts = [r for r in ROLLOUTS if r.mode == NORMAL]
    rows = share_rollouts(rollouts, PROMPTS, (NORMAL,))
    statistics = [TokenStatistics(torch.zeros(r.response_length), torch.ones(r.response_length)) for r in rows]
    found = training_metrics(rows, statistics, [True] * len(rows))
    assert found["normal/entropy_nats"] == 1.0
    assert not any(name.startswith(("high_entropy/", "kl/")) for name in found)


def test_evaluation_metrics():
    """Two questions, three samples and both modes; texts decide which right answers are the same."""
    texts = {
        (0, NORMAL): [("1+2", 1.0), (" 1+2 ", 1.0), ("2+2", 0.0)],  # one right text, found twice
        (1, NORMAL): [("x", 0.0), ("y", 0.0), ("z", 0.0)],
        (0, HIGH): [("1+2", 1.0), ("2+1", 1.0), ("0+3", 1.0)],
        (1, HIGH): [("4", 1.0), ("5", 0.0), ("6", 0.0)],
    }
    rollouts, text_of = [], {}
    for (question, mode), answers in texts.items():
        for sample, (text, reward) in enumerate(answers):
            rollouts.append(rollout(question, mode, sample, reward, 2))
            text_of[rollouts[-1].key] = text
    rows = share_rollouts(rollouts, PROMPTS)
    entropy = {NORMAL: 0.5, HIGH: 2.0}
    statistics = [
        TokenStatistics(torch.full((2,), -1.0), torch.full((2,), entropy[row.mode] if row.on_policy else 50.0))
        for row in rows
    ]
    found = evaluation_metrics(rows, statistics, lambda r: text_of[r.key], 3)
    expected = {
        NORMAL: {"accuracy": 2 / 6, "reward": 2 / 6, "best_of_3": 0.5, "unique_correct": 0.5, "entropy_nats": 0.5},
        HIGH: {"accuracy": 4 / 6, "reward": 4 / 6, "best_of_3": 1.0, "unique_correct": 2.0, "entropy_nats": 2.0},
    }
    # two of three: of right, right, wrong every pair has a right one; of one right among three, 2 of 3 pairs
    expected[NORMAL] |= {"pass_at_1": 2 / 6, "pass_at_2": (1 + 0) / 2}
    expected[HIGH] |= {"pass_at_1": 4 / 6, "pass_at_2": (1 + 2 / 3) / 2}
    for mode in MODES:
        whole = expected[mode] | {"response_tokens": 2.0, "truncated_share": 0.0}
        whole["entropy_bits"] = whole["entropy_nats"] / math.log(2)
        mine = {name: value for name, value in found.items() if name.startswith(f"eval/{mode.value}/")}
        assert mine == pytest.approx({f"eval/{mode.value}/{name}": value for name, value in whole.items()})
    varied = evaluation_metrics(rows, statistics, lambda r: text_of[r.key], 3, variety=True)
    assert {name: varied[name] for name in found} == found
    # words: 1 + 2 1 + 2 2 + 2; x y z | 1 + 2 2 + 1 0 + 3; 4 5 6
    assert varied["eval/normal/distinct_1"] == pytest.approx((3 / 9 + 1) / 2)
    assert varied["eval/high_entropy/distinct_1"] == pytest.approx((5 / 9 + 1) / 2)
    assert varied["eval/high_entropy/distinct_2"] == 1.0  # question 1 has no pair of words


def test_a_second_rollout_is_counted_as_rows_and_nowhere_else():
    second = rollout(0, NORMAL, 2, 1.0, 5, error="timed out")
    second.auxiliary = True
    rows, statistics = scored()
    more = share_rollouts([*ROLLOUTS, second], PROMPTS)
    by_key = {row.key: s for row, s in zip(rows, statistics, strict=True)}
    *away, kl = (torch.full((5,), value) for value in (-70.0, 50.0, 60.0))

    def statistics_of(row):
        return by_key.get(row.key) or TokenStatistics(*away, {other(row.mode).value: kl})

    found = training_metrics(more, [statistics_of(row) for row in more], [True] * len(more))
    expected = training_metrics(rows, statistics, [True] * len(rows))
    assert found == expected | {"actor/rows": expected["actor/rows"] + 2}
