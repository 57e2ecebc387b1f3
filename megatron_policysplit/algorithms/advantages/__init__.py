"""What every method is made of: the batch it sees, statistics within groups, what it returns."""

from megatron_policysplit.algorithms.advantages.batch import (
    AdvantageBatch,
    TokenStatistics,
    make_batch,
)
from megatron_policysplit.algorithms.advantages.groups import (
    EPSILON,
    centered,
    group_extremes,
    group_mean_std,
    group_sums,
    leave_one_out,
    zscore,
)
from megatron_policysplit.algorithms.advantages.method import (
    Method,
    NoOptions,
    Selection,
    State,
    all_rows,
    in_mixed_groups,
    with_advantage,
)
from megatron_policysplit.algorithms.token_signals import TokenSignals
from megatron_policysplit.rows import RIGHT, SecondRollout

__all__ = [
    "EPSILON",
    "RIGHT",
    "AdvantageBatch",
    "Method",
    "NoOptions",
    "SecondRollout",
    "Selection",
    "State",
    "TokenSignals",
    "TokenStatistics",
    "all_rows",
    "centered",
    "group_extremes",
    "group_mean_std",
    "group_sums",
    "in_mixed_groups",
    "leave_one_out",
    "make_batch",
    "with_advantage",
    "zscore",
]
