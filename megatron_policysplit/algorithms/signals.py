"""From rewards and statistics to what each row is trained with: masks, advantages, importance
weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from megatron_policysplit.algorithms.advantages import (
    AdvantageBatch,
    State,
    TokenSignals,
    TokenStatistics,
    make_batch,
)
from megatron_policysplit.algorithms.advantages.batch import group_numbers
from megatron_policysplit.algorithms.loss import denominators, importance_weights, token_weight
from megatron_policysplit.algorithms.methods import Algorithm
from megatron_policysplit.config import Config
from megatron_policysplit.rows import Row
from megatron_policysplit.rows.kl_pairs import measured_rollouts
from megatron_policysplit.rows.plan import Plan


@dataclass
class TrainSignal:
    """What training a row needs beside its tokens, [T] each over its response tokens; see
    `TokenSignals`.

    apart: aggregation of the row's loss where it is not the run's; its tokens are in no
    denominator.
    """

    old_logprobs: Tensor
    advantages: Tensor
    importance: Tensor
    mask: Tensor
    scale: Tensor | None = None
    entropy_coef: Tensor | None = None
    drift_coef: Tensor | None = None
    nucleus_coef: Tensor | None = None
    nucleus_threshold: Tensor | None = None
    reference_logprobs: Tensor | None = None
    apart: str | None = None


def token_weights(
    signals: Sequence[TrainSignal], step: Sequence[int], aggregation: str, max_response_tokens: int
) -> dict[int, Tensor]:
    """Row -> weights [T] of its tokens in the loss of an optimizer step of the rows `step` (indices
    of `signals`).
    """
    counts = {i: int(signals[i].mask.sum()) for i in step}
    total = denominators([counts[i] for i in step if signals[i].apart is None])
    return {
        i: signals[i].mask
        * token_weight(counts[i], total, signals[i].apart or aggregation, max_response_tokens)
        for i in step
    }


def trained_mask(row: Row, overlong: str) -> Tensor:
    """Bool [T]: response tokens that are trained; none of a cut response if train.overlong=mask."""
    if overlong == "mask" and row.rollout.finish_reason == "length":
        return torch.zeros(row.response_length, dtype=torch.bool)
    return torch.tensor(row.rollout.loss_mask, dtype=torch.bool)


def total_rewards(rows: Sequence[Row], algorithm: Algorithm, config: Config) -> Tensor:
    """[R] fp32: what the responses were graded, and what the method adds for their lengths."""
    graded = torch.tensor([row.rollout.reward for row in rows], dtype=torch.float32)
    return graded + length_rewards(rows, algorithm, config)


def length_rewards(rows: Sequence[Row], algorithm: Algorithm, config: Config) -> Tensor:
    """[R] fp32: what the method adds to the rewards for the lengths of responses; 0 with most."""
    add = algorithm.method.length_reward
    if add is None:
        return torch.zeros(len(rows))
    lengths = torch.tensor([row.response_length for row in rows], dtype=torch.int64)
    return add(lengths, config.rollout.max_response_tokens, algorithm.options)


def live_rows(rows: Sequence[Row], algorithm: Algorithm, config: Config) -> list[bool]:
    """Which rows can change the weights; the others are scored but not trained.

    A row without trained tokens never can. A row that the method calls dead cannot either, if the
    loss has no term beside the method's. Auxiliary rows were chosen to be trained.
    """
    trained = [bool(trained_mask(row, config.train.overlong).any()) for row in rows]
    if not rows or config.algorithm.kl_coef > 0 or config.algorithm.entropy_coef > 0:
        return trained
    ordinary = [row for row in rows if not row.auxiliary]
    rewards = total_rewards(ordinary, algorithm, config)
    alive = algorithm.method.live(rewards, group_numbers(ordinary), algorithm.options)
    dead = {row.key for row, value in zip(ordinary, alive.tolist(), strict=True) if not value}
    return [keeps and row.key not in dead for keeps, row in zip(trained, rows, strict=True)]


def scored_rows(
    rows: Sequence[Row], live: Sequence[bool], algorithm: Algorithm, config: Config
) -> list[bool]:
    """Which rows are scored: those whose statistics something reads, be it only the logs
    (`log.kl_tokens`).

    A row behind the prompt its response was sampled with is spared where the engine's log-probs
    take the place of the actor's (algorithm.old_logprobs). A row behind another prompt is spared in
    a question without a live row, if the method's statistics stay within a question.
    """
    engine, apart = config.algorithm.old_logprobs == "engine", algorithm.method.within_questions
    questions = {row.key[:2] for row, alive in zip(rows, live, strict=True) if alive}
    measured = measured_rollouts(rows, config.log.kl_tokens)

    def read(row: Row) -> bool:
        if row.rollout.key in measured:
            return True
        return not engine if row.on_policy else not apart or row.key[:2] in questions

    return [read(row) for row in rows]


def with_engine_logprobs(row: Row, actor: TokenStatistics) -> TokenStatistics:
    """The engine's log-probs in place of the actor's, where it sampled the response behind the
    row's prompt.
    """
    if not row.on_policy:
        return actor
    return replace(actor, logprobs=torch.tensor(row.rollout.engine_logprobs, dtype=torch.float32))


class SignalBuilder:
    """What each row of a batch is trained with, one optimizer step after the other (on leaders,
    which hold the rows).

    `state` is the method's; it moves on with every step. old: statistics before the batch's first
    step, whose log-probs are the ratio's denominator, unless the engine's are
    (algorithm.old_logprobs). Nothing depends on the layout, nor, with algorithm.scope=global, on
    micro-batches.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        old: Sequence[TokenStatistics],
        plan: Plan,
        algorithm: Algorithm,
        config: Config,
        *,
        state: State | None = None,
        reference: Sequence[Tensor] | None = None,
        seed: int = 0,
    ):
        if config.algorithm.old_logprobs == "engine":
            old = [with_engine_logprobs(row, actor) for row, actor in zip(rows, old, strict=True)]
        self.rows, self.old, self.plan, self.algorithm, self.config = (
            rows,
            old,
            plan,
            algorithm,
            config,
        )
        self.state = state or algorithm.method.begin(algorithm.options)
        self._masks = [trained_mask(row, config.train.overlong) for row in rows]
        self._reference, self._seed = reference, seed
        self._importance = _importance(rows, old, self._masks, config)
        self._last: TokenSignals | None = None

    def at(self, step: int, now: Mapping[int, TokenStatistics] | None = None) -> list[TrainSignal]:
        """One TrainSignal per row for optimizer step `step`. now: new statistics of that step's
        rows.
        """
        if not self.rows:
            return []
        statistics = [(now or {}).get(index, old) for index, old in enumerate(self.old)]
        batch = self._batch(step, statistics)
        if now is not None:
            batch = replace(batch, mask=batch.mask & self._token_mask(batch, self.plan.steps[step]))
        if self.config.algorithm.scope == "global":
            made = self._signals(batch)
        else:
            parts = [
                replica.train + replica.train_only for replica in self.plan.micro_batches[step]
            ]
            made = self._by_part(batch, [indices for part in parts for indices in part if indices])
        self.state, self._last = (
            self.algorithm.method.next_state(self.state, batch, self.algorithm.options),
            made,
        )
        lengths = batch.offsets.diff().tolist()
        columns = {
            field.name: value.split(lengths)
            for field in fields(made)
            if (value := getattr(made, field.name)) is not None
        }
        return [
            TrainSignal(
                old_logprobs=self.old[index].logprobs,
                importance=self._importance[row.rollout.key],
                mask=self._masks[index],
                nucleus_threshold=statistics[index].nucleus_threshold,
                reference_logprobs=None if self._reference is None else self._reference[index],
                apart=self.algorithm.method.auxiliary_aggregation if row.auxiliary else None,
                **{name: values[index] for name, values in columns.items()},
            )
            for index, row in enumerate(self.rows)
        ]

    def _batch(self, step: int, statistics: Sequence[TokenStatistics]) -> AdvantageBatch:
        loss = self.algorithm.config
        return replace(
            make_batch(self.rows, statistics, self._masks),
            rewards=total_rewards(self.rows, self.algorithm, self.config),
            old_logprobs=torch.cat([old.logprobs for old in self.old]),
            clip_low=loss.clip_low,
            clip_high=loss.clip_high,
            seed=self._seed + step,
        )

    def _signals(self, batch: AdvantageBatch) -> TokenSignals:
        return self.algorithm.method.signals(batch, self.algorithm.options, self.state)

    def _by_part(self, batch: AdvantageBatch, parts: Sequence[Sequence[int]]) -> TokenSignals:
        """Signals of each part (row indices) from statistics over its tokens alone; 0 for tokens of
        no part.
        """
        together: dict[str, Tensor] = {}
        for number, part in enumerate(parts):
            mine = self._token_mask(batch, part)
            made = self._signals(
                replace(batch, mask=batch.mask & mine, seed=batch.seed * 65_537 + number)
            )
            for field in fields(made):
                value = getattr(made, field.name)
                if value is not None:
                    empty = torch.zeros_like(value)
                    together[field.name] = torch.where(mine, value, together.get(field.name, empty))
        return (
            TokenSignals(**together) if together else TokenSignals(torch.zeros_like(batch.logprobs))
        )

    def metrics(self) -> dict[str, float]:
        """importance/*: of the weights actor/engine over trained response tokens, each counted
        once. method/*: the method's state, the mean of its scale over trained tokens at the batch's
        last optimizer step, and the mean over responses of what it adds to the reward for their
        length.
        """
        result = {f"method/{name}": value for name, value in self.state.items()}
        if self._last is not None and self._last.scale is not None:
            result["method/scale_mean"] = float(self._last.scale[torch.cat(self._masks)].mean())
        own = [index for index, row in enumerate(self.rows) if row.on_policy]
        if self.algorithm.method.length_reward is not None and own:
            added = length_rewards([self.rows[index] for index in own], self.algorithm, self.config)
            result["method/length_reward_mean"] = float(added.mean())
        weights = [
            self._importance[self.rows[index].rollout.key][self._masks[index]] for index in own
        ]
        together = torch.cat(weights) if weights else torch.empty(0)
        if len(together):
            result["importance/mean"] = float(together.mean())
            result["importance/min"] = float(together.min())
            result["importance/max"] = float(together.max())
        return result

    @staticmethod
    def _token_mask(batch: AdvantageBatch, rows: Sequence[int]) -> Tensor:
        """[T] bool: tokens of these rows."""
        chosen = torch.zeros(len(batch.rewards), dtype=torch.bool)
        chosen[list(rows)] = True
        return chosen[batch.row_of_token]


def _importance(
    rows: Sequence[Row], old: Sequence[TokenStatistics], masks: Sequence[Tensor], config: Config
) -> dict[tuple, Tensor]:
    """Rollout -> importance weights [T], from the row under the prompt that it was sampled with.

    1 for auxiliary rollouts: the engine's log-probs are those of another temperature, which is no
    error to correct.
    """
    ones = {row.rollout.key: torch.ones(row.response_length) for row in rows if row.auxiliary}
    return ones | {
        row.rollout.key: importance_weights(
            statistics.logprobs, torch.tensor(row.rollout.engine_logprobs), mask, config.algorithm
        )
        for row, statistics, mask in zip(rows, old, masks, strict=True)
        if row.on_policy
    }
