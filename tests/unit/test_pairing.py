"""Which rows are compared by the exact KL."""

import pytest

from megatron_policysplit.rows import MODES, Mode, Rollout, Row, RowKey, share_rollouts
from megatron_policysplit.rows.kl_pairs import Pairing, pairings
from tests.support.advantage_batches import partner


def rollout(question, sample, mode=Mode.NORMAL, auxiliary=False):
    return Rollout(0, question, mode, sample, [5], [-1.0], "stop", [(0, 0)], auxiliary=auxiliary)


def two_modes():
    rollouts = [rollout(question, sample, mode) for question in (0, 1) for sample in (0, 1) for mode in MODES]
    prompts = {question: {Mode.NORMAL: [1], Mode.HIGH_ENTROPY: [2, 1]} for question in (0, 1)}
    return share_rollouts([*rollouts, rollout(0, 2, auxiliary=True)], prompts)


def by_rollout(rows, found):
    """Rollout number -> keys of its rows, the hub first."""
    groups = {}
    for index, pairing in sorted(found.items(), key=lambda item: not item[1].hub):
        groups.setdefault(pairing.rollout, []).append(rows[index].key)
    return groups


def test_two_modes():
    rows = two_modes()
    found = pairings(rows, "all")
    assert sorted(found) == list(range(len(rows))) and {pairing.pairs for pairing in found.values()} == {1}
    groups = by_rollout(rows, found)
    assert len(groups) == 9
    for hub, other in groups.values():
        assert hub.training_mode == "normal" and other == partner(hub)


def test_a_sample_is_one_rollout_of_each_question_and_sampling_mode():
    rows = two_modes()
    groups = by_rollout(rows, pairings(rows, "sample"))
    chosen = {(hub.question, hub.sampling_mode, hub.sample) for hub, _ in groups.values()}
    assert chosen == {(question, mode.value, 0) for question in (0, 1) for mode in MODES}
    assert pairings(rows, "none") == {}


@pytest.mark.parametrize(
    "modes, hub",
    [(["high_entropy", "low", "normal"], "normal"), (["high_entropy", "low"], "high_entropy"), (["normal"], None)],
)
def test_a_hub_and_any_number_of_others(modes, hub):
    rows = [Row(RowKey(0, 0, mode, "normal", 0), [1], rollout(0, 0)) for mode in modes]
    expected = {
        index: Pairing(0, mode == hub, len(modes) - 1 if mode == hub else 1) for index, mode in enumerate(modes)
    }
    assert pairings(rows, "all") == (expected if hub else {})
