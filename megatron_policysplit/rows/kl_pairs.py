"""Which pairs of a rollout's rows the exact KL between modes is computed for, for the logs.

One row of a rollout, the hub, is paired with each of its other rows. Pure functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from megatron_policysplit.rows.types import Mode, Row, RowKey


class Pairing(NamedTuple):
    """The pairs of one row whose KL is computed. Made by `pairings`; scoring reads it."""

    rollout: int  # number of the rollout, the same for all of its rows
    hub: bool  # whether this is the row that all others of the rollout are paired with
    pairs: int  # number of pairs that the row is in: 1, or for the hub one with each other row


def measured_rollouts(rows: Sequence[Row], kl_tokens: str) -> set[tuple]:
    """Keys of the rollouts whose rows are scored for the logs.

    kl_tokens: `log.kl_tokens`; `all`, `none`, or `sample` for the first rollout of every question
    and sampling mode.
    """
    if kl_tokens == "none":
        return set()
    keys = [row.rollout.key for row in rows]
    if kl_tokens == "all":
        return set(keys)
    first_rollouts: dict[tuple, tuple] = {}
    for key in keys:
        first_rollouts.setdefault(key[:3], key)  # batch, question, sampling mode
    return set(first_rollouts.values())


def pairings(rows: Sequence[Row], kl_tokens: str) -> dict[int, Pairing]:
    """Row index -> pairing, for all rows of the `measured_rollouts` that have several rows.

    The hub is the row of the normal mode, or the first row if the normal mode is not trained.
    """
    measured = measured_rollouts(rows, kl_tokens)
    rollouts: dict[RowKey, list[int]] = {}
    for index, row in enumerate(rows):
        # Without its training mode the key names the rollout, auxiliary ones apart.
        rollouts.setdefault(row.key._replace(training_mode=""), []).append(index)
    result: dict[int, Pairing] = {}
    for number, members in enumerate(rollouts.values()):
        if len(members) < 2 or rows[members[0]].rollout.key not in measured:
            continue
        normal = [index for index in members if rows[index].key.training_mode == Mode.NORMAL.value]
        hub = (normal or members)[0]
        for index in members:
            result[index] = Pairing(number, index == hub, len(members) - 1 if index == hub else 1)
    return result
