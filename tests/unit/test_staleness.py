"""The age of samples: bound by the configuration, in the metrics."""

import pytest

from megatron_policysplit.config import RolloutConfig
from megatron_policysplit.errors import TrainingError
from megatron_policysplit.rollout.staleness import check_staleness, staleness_metrics
from megatron_policysplit.rows import Mode, Rollout


def sampled_by(*versions: int) -> Rollout:
    """One token a version."""
    count = len(versions)
    return Rollout(0, 1, Mode.NORMAL, 2, [5] * count, [-1.0] * count, "stop", list(enumerate(versions)))


def test_without_overlap_only_the_trained_version_is_taken():
    check_staleness([sampled_by(4)], 4, RolloutConfig())
    for version in (3, 5):
        with pytest.raises(TrainingError, match="rollout.overlap=false"):
            check_staleness([sampled_by(4), sampled_by(version)], 4, RolloutConfig())


def test_with_overlap_the_oldest_token_counts():
    config = RolloutConfig(overlap=True, max_staleness=1)
    check_staleness([sampled_by(3, 4), sampled_by(4)], 4, config)
    with pytest.raises(TrainingError, match="rollout.max_staleness=1"):
        check_staleness([sampled_by(4, 2)], 4, config)


def test_replayed_rollouts_keep_the_versions_of_their_own_run():
    check_staleness([sampled_by(17)], 4, RolloutConfig(engine="replay"))


def test_metrics():
    assert staleness_metrics([sampled_by(3, 4), sampled_by(4), sampled_by(4), sampled_by(4)], 4) == {
        "rollout/weight_version_min": 3,
        "rollout/weight_version_max": 4,
        "rollout/staleness_mean": 0.25,
        "rollout/staleness_max": 1,
    }
