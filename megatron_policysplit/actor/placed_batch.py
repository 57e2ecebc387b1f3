"""A rollout batch in place: planned on leaders, and every replica holding its micro-batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from megatron_policysplit.actor.microbatch import MicroBatch, make_microbatch
from megatron_policysplit.config import TrainConfig
from megatron_policysplit.distributed.device import width_multiple
from megatron_policysplit.distributed.layout import Layout
from megatron_policysplit.rows import Mode, Row
from megatron_policysplit.rows.kl_pairs import pairings
from megatron_policysplit.rows.plan import Plan, make_plan

StepMicroBatches = list[list[MicroBatch]]  # [optimizer step][micro-batch]


@dataclass
class PlacedBatch:
    """A rollout batch as one replica works on it. The lists are those of `ReplicaMicroBatches`."""

    plan: Plan | None  # on leaders
    train: StepMicroBatches
    train_only: StepMicroBatches
    score_only: StepMicroBatches
    compared: StepMicroBatches
    # Response length by row index, of the rows that are not scored; on leaders.
    unscored: dict[int, int] = field(default_factory=dict)

    @property
    def optimizer_steps(self) -> int:
        """How many optimizer steps the batch is trained in."""
        return len(self.train)

    def trained(self, step: int) -> list[MicroBatch]:
        """The micro-batches that optimizer step `step` trains."""
        return self.train[step] + self.train_only[step]

    def scored(self) -> Iterator[MicroBatch]:
        """The micro-batches that the score pass before the first optimizer step goes over."""
        for steps in (self.train, self.score_only, self.compared):
            for micro_batches in steps:
                yield from micro_batches

    def scored_in(self, step: int) -> list[MicroBatch]:
        """The micro-batches with the rows of optimizer step `step` that have statistics."""
        return self.train[step] + self.score_only[step]


def place_batch(
    rows: Sequence[Row],
    live: Sequence[bool],
    seed: int,
    *,
    layout: Layout,
    train: TrainConfig,
    temperatures: Mapping[Mode, float],
    kl_tokens: str,
    scored: Sequence[bool] | None = None,
    compared: Sequence[bool] | None = None,
) -> PlacedBatch:
    """Plan the batch and send every replica its micro-batches (one broadcast over the replica).

    rows, live, scored, compared: as `make_plan` takes them; read on leaders.
    temperatures: at which the log-probs of a mode's rows are taken.
    kl_tokens: log.kl_tokens, the rows whose exact KL is taken.
    """
    plan, steps, unscored = None, None, {}
    if layout.is_leader:
        # Sequence parallelism splits the tokens of a micro-batch evenly over the ranks.
        multiple = math.lcm(width_multiple(), layout.tensor if layout.sequence else 1)
        plan = make_plan(
            rows,
            live,
            scored=scored,
            compared=compared,
            replicas=layout.data,
            expert=layout.expert,
            optimizer_steps=train.optimizer_steps_per_batch,
            max_tokens=train.max_tokens_per_micro_batch,
            width_multiple=multiple,
            seed=seed,
        )
        make = partial(
            make_microbatch,
            rows,
            temperatures=temperatures,
            pairings=pairings(rows, kl_tokens),
            multiple=multiple,
        )
        replica = [step[layout.data_rank] for step in plan.micro_batches]
        steps = tuple(
            [[make(indices) for indices in getattr(step, name)] for step in replica]
            for name in ("train", "train_only", "score_only", "compared")
        )
        if scored is not None:
            unscored = {i: row.response_length for i, row in enumerate(rows) if not scored[i]}
    return PlacedBatch(plan, *layout.broadcast_from_leader(steps), unscored)
