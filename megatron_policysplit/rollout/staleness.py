"""How old the weights were that sampled a batch, in versions: one version per trained batch."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_policysplit.config import RolloutConfig
from megatron_policysplit.errors import TrainingError
from megatron_policysplit.rows import Rollout


def staleness(rollout: Rollout, version: int) -> int:
    """Count the versions from the oldest weights that sampled one of its tokens to `version`."""
    return version - min(sampled for _, sampled in rollout.weight_versions)


def check_staleness(rollouts: Iterable[Rollout], version: int, config: RolloutConfig) -> None:
    """Check that no rollout is older than allowed, or newer than the weights it will train.

    Raises TrainingError otherwise. The bound is rollout.max_staleness with rollout.overlap, else 0.
    Replayed rollouts have the versions of another run and are not checked.
    """
    if config.engine == "replay":
        return
    bound = config.max_staleness if config.overlap else 0
    for rollout in rollouts:
        behind = staleness(rollout, version)
        if not 0 <= behind <= bound:
            limit = f"rollout.max_staleness={bound}" if config.overlap else "rollout.overlap=false"
            raise TrainingError(
                f"rollout {rollout.key} was sampled by weight versions {rollout.weight_versions}, "
                f"{behind} behind the version {version} that is trained; {limit} allows {bound}: "
                "an engine serves the wrong weights"
            )


def staleness_metrics(rollouts: list[Rollout], version: int) -> dict[str, float]:
    """Summarise the age of a batch for the logs.

    rollout/weight_version_min and _max are over all tokens, rollout/staleness_mean and _max over
    responses.
    """
    versions = [sampled for rollout in rollouts for _, sampled in rollout.weight_versions]
    behind = [staleness(rollout, version) for rollout in rollouts]
    return {
        "rollout/weight_version_min": float(min(versions)),
        "rollout/weight_version_max": float(max(versions)),
        "rollout/staleness_mean": sum(behind) / len(behind),
        "rollout/staleness_max": float(max(behind)),
    }
