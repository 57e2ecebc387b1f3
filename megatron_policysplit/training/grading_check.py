"""A run stops where its reward fails on every response, before anything is trained on zeros."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_policysplit.distributed.layout import Layout
from megatron_policysplit.errors import TrainingError
from megatron_policysplit.rewards import all_failed
from megatron_policysplit.rows import Rollout


class GradingCheck:
    """Looks at the first responses of a process; a reward that works once is trusted from then on.

    function: as the key `reward.function`.
    """

    def __init__(self, layout: Layout, function: str):
        self._layout, self._function, self._has_worked = layout, function, False

    def check(self, rollouts: Sequence[Rollout], of: str) -> None:
        """Raise TrainingError on every rank if the grading of all these rollouts failed.

        One broadcast over the world, the first time only. of: what the rollouts are, in words.
        rollouts: on the chief; what other ranks give is not looked at.
        """
        if self._has_worked:
            return
        failure = all_failed([rollout.reward_error for rollout in rollouts]) or ""
        failure = self._layout.broadcast_from_chief(failure)
        if failure:
            raise TrainingError(
                f"reward.function={self._function} failed on {failure} of {of}; nothing was "
                "trained on them; mend the function, or the data it needs"
            )
        self._has_worked = True
