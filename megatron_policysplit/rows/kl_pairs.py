"""Which rows of a rollout are compared by the exact KL: its hub with every other. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from megatron_policysplit.rows.types import Mode, Row, RowKey


class Pairing(NamedTuple):
    """Of a row whose KL is wanted. rollout: a number shared by the rows of one rollout. hub:
    whether it is the one that all others are compared with. pairs: of how many pairs it is part,
    the hub of as many as there are others.
    """

    rollout: int
    hub: bool
    pairs: int


def measured_rollouts(rows: Sequence[Row], kl_tokens: str) -> set[tuple]:
    """Keys of the rollouts that are scored for the logs: all, none, or with `sample` one a question
    and sampling mode.

    kl_tokens: `log.kl_tokens`.
    """
    if kl_tokens == "none":
        return set()
    keys = [row.rollout.key for row in rows]
    if kl_tokens == "all":
        return set(keys)
    first: dict[tuple, tuple] = {}
    for key in keys:
        first.setdefault(key[:3], key)
    return set(first.values())


def pairings(rows: Sequence[Row], kl_tokens: str) -> dict[int, Pairing]:
    """Row index -> pairing, for the rollouts with several rows whose KL is wanted; kl_tokens:
    `log.kl_tokens`.

    The hub is the row of the normal mode, or the first where none is trained. `sample` takes one
    rollout per question and sampling mode.
    """
    measured = measured_rollouts(rows, kl_tokens)
    rollouts: dict[RowKey, list[int]] = {}
    for index, row in enumerate(rows):
        rollouts.setdefault(row.key._replace(training_mode=""), []).append(index)
    found: dict[int, Pairing] = {}
    for number, members in enumerate(rollouts.values()):
        if len(members) < 2 or rows[members[0]].rollout.key not in measured:
            continue
        normal = [index for index in members if rows[index].key.training_mode == Mode.NORMAL.value]
        hub = (normal or members)[0]
        for index in members:
            found[index] = Pairing(number, index == hub, len(members) - 1 if index == hub else 1)
    return found
