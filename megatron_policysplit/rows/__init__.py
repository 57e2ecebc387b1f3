"""Rollouts, and the rows that train on them: the names of `rows.types`."""

from megatron_policysplit.rows.types import (
    MODES,
    RIGHT,
    Mode,
    Rollout,
    Row,
    RowKey,
    SecondRollout,
    modes_in,
    share_rollouts,
)

__all__ = [
    "MODES",
    "RIGHT",
    "Mode",
    "Rollout",
    "Row",
    "RowKey",
    "SecondRollout",
    "modes_in",
    "share_rollouts",
]
