"""Rollouts and the rows that train on them; the types are handed on from `rows.types`."""

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
