"""From rewards and log-probs to what every token is trained with: masks, advantages, weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from megatron_policysplit.algorithms.advantages import (
    AdvantageBatch,
    State,
    TokenStatistics,
    make_batch,
)
from megatron_policysplit.algorithms.advantages.batch import group_numbers
from megatron_policysplit.algorithms.loss import denominators, importance_weights, token_weight
from megatron_policysplit.algorithms.methods import Algorithm
from megatron_policysplit.algorithms.token_signals import TokenSignals
from megatron_policysplit.config import Config
from megatron_policysplit.rows import Row
from megatron_policysplit.rows.kl_pairs import measured_rollouts
from megatron_policysplit.rows.plan import Plan


@dataclass(frozen=True)
class RowSettings:
    """What a configuration says of the rows of a batch, besides its `algorithm` section."""

    overlong: str  # train.overlong: whether responses that were cut are trained
    max_response_tokens: int  # rollout.max_response_tokens
    kl_tokens: str  # log.kl_tokens: the rows whose exact KL is logged

    @classmethod
    def of(cls, config: Config) -> RowSettings:
        """The settings of a whole configuration."""
        longest = config.rollout.max_response_tokens
        return cls(config.train.overlong, longest, config.log.kl_tokens)


def trained_mask(row: Row, overlong: str) -> Tensor:
    """Bool [T]: response tokens that are trained; none of a cut response if train.overlong=mask."""
    if overlong == "mask" and row.rollout.finish_reason == "length":
        return torch.zeros(row.response_length, dtype=torch.bool)
    return torch.tensor(row.rollout.loss_mask, dtype=torch.bool)


def total_rewards(rows: Sequence[Row], algorithm: Algorithm, max_response_tokens: int) -> Tensor:
    """[R] fp32: what the responses were graded, and what the method adds for their lengths."""
    graded = torch.tensor([row.rollout.reward for row in rows], dtype=torch.float32)
    return graded + length_rewards(rows, algorithm, max_response_tokens)


def length_rewards(rows: Sequence[Row], algorithm: Algorithm, max_response_tokens: int) -> Tensor:
    """[R] fp32: what the method adds to the rewards for the lengths of responses; 0 with most."""
    add = algorithm.method.length_reward
    if add is None:
        return torch.zeros(len(rows))
    lengths = torch.tensor([row.response_length for row in rows], dtype=torch.int64)
    return add(lengths, max_response_tokens, algorithm.options)


def live_rows(rows: Sequence[Row], algorithm: Algorithm, settings: RowSettings) -> list[bool]:
    """Which rows can change the weights; the others are scored but not trained.

    A row without trained tokens never can. A row that the method calls dead cannot either, if the
    loss has no term beside the method's. Auxiliary rows were chosen to be trained.
    """
    trained = [bool(trained_mask(row, settings.overlong).any()) for row in rows]
    if not rows or algorithm.config.kl_coef > 0 or algorithm.config.entropy_coef > 0:
        return trained
    ordinary = [row for row in rows if not row.auxiliary]
    rewards = total_rewards(ordinary, algorithm, settings.max_response_tokens)
    alive = algorithm.method.live(rewards, group_numbers(ordinary), algorithm.options)
    dead = {row.key for row, is_live in zip(ordinary, alive.tolist(), strict=True) if not is_live}
    return [
        has_tokens and row.key not in dead for has_tokens, row in zip(trained, rows, strict=True)
    ]


def scored_rows(
    rows: Sequence[Row], live: Sequence[bool], algorithm: Algorithm, settings: RowSettings
) -> list[bool]:
    """Which rows are scored: those whose statistics something reads, be it only the logs.

    A row behind the prompt its response was sampled with is spared where the engine's log-probs
    take the place of the actor's (algorithm.old_logprobs). A row behind another prompt is spared in
    a question without a live row, if the method's statistics stay within a question.
    """
    by_engine = algorithm.config.old_logprobs == "engine"
    live_questions = {row.key[:2] for row, is_live in zip(rows, live, strict=True) if is_live}
    measured = measured_rollouts(rows, settings.kl_tokens)

    def is_scored(row: Row) -> bool:
        if row.rollout.key in measured:
            return True
        if row.on_policy:
            return not by_engine
        return not algorithm.method.within_questions or row.key[:2] in live_questions

    return [is_scored(row) for row in rows]


def with_engine_logprobs(row: Row, actor: TokenStatistics) -> TokenStatistics:
    """The engine's log-probs in place of the actor's, where it sampled behind the row's prompt."""
    if not row.on_policy:
        return actor
    logprobs = torch.tensor(row.rollout.engine_logprobs, dtype=torch.float32)
    return replace(actor, logprobs=logprobs)


class SignalBuilder:
    """Makes what every token of a batch is trained with, one optimizer step after the other.

    On leaders, which hold the rows; on other ranks `rows` is empty and so is every answer. Nothing
    depends on the layout, nor, with algorithm.scope=global, on micro-batches.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        old: Sequence[TokenStatistics],
        plan: Plan | None,
        algorithm: Algorithm,
        settings: RowSettings,
        *,
        state: State | None = None,
        reference: Sequence[Tensor] | None = None,
        seed: int = 0,
    ):
        """Begin a batch.

        old: statistics of the rows before the first step. Their log-probs are the ratio's
            denominator, but where the engine's are (algorithm.old_logprobs).
        plan: None where there are no rows.
        state: the method's, after the batch before; None: that of a fresh run.
        reference: log-probs of the initial policy, with a KL term.
        seed: of what the method draws at random.
        """
        if algorithm.config.old_logprobs == "engine":
            old = [with_engine_logprobs(row, actor) for row, actor in zip(rows, old, strict=True)]
        self.rows, self.old, self.plan, self.algorithm, self.settings = (
            rows,
            old,
            plan,
            algorithm,
            settings,
        )
        self.state = state or algorithm.method.begin(algorithm.options)
        self._masks = [trained_mask(row, settings.overlong) for row in rows]
        self._reference, self._seed = reference, seed
        self._importance = _importance_by_rollout(rows, old, self._masks, algorithm)
        self._last: TokenSignals | None = None  # of the step before, over all tokens

    def for_step(
        self, step: int, current: Mapping[int, TokenStatistics] | None = None
    ) -> dict[int, TokenSignals]:
        """Row index -> signals of its tokens, for the rows of optimizer step `step`.

        current: statistics of these rows by the weights as they are, if the method is to see those
        (algorithm.statistics=step); what it computes over tokens is then over these rows' alone.
        Moves the method's state on, so call it once a step, in order.
        """
        if not self.rows:
            return {}
        method, options = self.algorithm.method, self.algorithm.options
        statistics = [(current or {}).get(index, old) for index, old in enumerate(self.old)]
        batch = self._batch(step, statistics)
        if current is not None:
            batch = replace(batch, mask=batch.mask & _token_mask(batch, self.plan.steps[step]))
        if self.algorithm.config.scope == "global":
            signals = method.signals(batch, options, self.state)
        else:
            signals = self._signals_by_micro_batch(batch, step)
        self.state, self._last = method.next_state(self.state, batch, options), signals
        return self._complete(step, signals.split(batch.offsets.diff().tolist()), statistics)

    def _batch(self, step: int, statistics: Sequence[TokenStatistics]) -> AdvantageBatch:
        return replace(
            make_batch(self.rows, statistics, self._masks),
            rewards=total_rewards(self.rows, self.algorithm, self.settings.max_response_tokens),
            old_logprobs=torch.cat([old.logprobs for old in self.old]),
            clip_low=self.algorithm.config.clip_low,
            clip_high=self.algorithm.config.clip_high,
            seed=self._seed + step,
        )

    def _signals_by_micro_batch(self, batch: AdvantageBatch, step: int) -> TokenSignals:
        """Signals of each micro-batch from statistics over its tokens alone; 0 outside of all."""
        replicas = self.plan.micro_batches[step]
        parts = [
            part for replica in replicas for part in replica.train + replica.train_only if part
        ]
        columns: dict[str, Tensor] = {}
        for number, part in enumerate(parts):
            inside = _token_mask(batch, part)
            restricted = replace(batch, mask=batch.mask & inside, seed=batch.seed * 65_537 + number)
            signals = self.algorithm.method.signals(restricted, self.algorithm.options, self.state)
            for field in fields(signals):
                value = getattr(signals, field.name)
                if value is not None:
                    outside = columns.get(field.name, torch.zeros_like(value))
                    columns[field.name] = torch.where(inside, value, outside)
        return (
            TokenSignals(**columns) if columns else TokenSignals(torch.zeros_like(batch.logprobs))
        )

    def _complete(
        self, step: int, by_row: Sequence[TokenSignals], statistics: Sequence[TokenStatistics]
    ) -> dict[int, TokenSignals]:
        """The method's signals of the step's rows with all that the trainer adds to them."""
        indices = self.plan.steps[step]
        weights = self._token_weights(indices)
        trained_rows = max(sum(bool(self._masks[i].any()) for i in indices), 1)
        complete = {}
        for i in indices:
            nucleus_coef = by_row[i].nucleus_coef
            complete[i] = replace(
                by_row[i],
                nucleus_coef=None if nucleus_coef is None else nucleus_coef / trained_rows,
                weights=weights[i],
                old_logprobs=self.old[i].logprobs,
                importance=self._importance[self.rows[i].rollout.key],
                reference_logprobs=None if self._reference is None else self._reference[i],
                nucleus_threshold=statistics[i].nucleus_threshold,
            )
        return complete

    def _token_weights(self, indices: Sequence[int]) -> dict[int, Tensor]:
        """Row index -> share [T] of each of its tokens in the loss of a step of these rows.

        Rows with an aggregation of their own (`Method.auxiliary_aggregation`) are in no
        denominator.
        """
        aggregations = {i: self._own_aggregation(self.rows[i]) for i in indices}
        counts = {i: int(self._masks[i].sum()) for i in indices}
        total = denominators([counts[i] for i in indices if aggregations[i] is None])
        common, longest = self.algorithm.config.loss_aggregation, self.settings.max_response_tokens
        return {
            i: self._masks[i] * token_weight(counts[i], total, aggregations[i] or common, longest)
            for i in indices
        }

    def _own_aggregation(self, row: Row) -> str | None:
        return self.algorithm.method.auxiliary_aggregation if row.auxiliary else None

    def metrics(self) -> dict[str, float]:
        """For the logs, once the last step's signals are made.

        importance/*: of the weights actor/engine over trained response tokens, each counted once.
        method/*: the method's state, the mean of its scale over trained tokens at the last step,
        and the mean over responses of what it adds to the reward for their length.
        """
        result = {f"method/{name}": value for name, value in self.state.items()}
        if self._last is not None and self._last.scale is not None:
            result["method/scale_mean"] = float(self._last.scale[torch.cat(self._masks)].mean())
        sampled = [index for index, row in enumerate(self.rows) if row.on_policy]
        if self.algorithm.method.length_reward is not None and sampled:
            rows, longest = [self.rows[i] for i in sampled], self.settings.max_response_tokens
            added = length_rewards(rows, self.algorithm, longest)
            result["method/length_reward_mean"] = float(added.mean())
        weights = [self._importance[self.rows[i].rollout.key][self._masks[i]] for i in sampled]
        importance = torch.cat(weights) if weights else torch.empty(0)
        if len(importance):
            result["importance/mean"] = float(importance.mean())
            result["importance/min"] = float(importance.min())
            result["importance/max"] = float(importance.max())
        return result


def _token_mask(batch: AdvantageBatch, rows: Sequence[int]) -> Tensor:
    """[T] bool: tokens of these rows."""
    selected = torch.zeros(len(batch.rewards), dtype=torch.bool)
    selected[list(rows)] = True
    return selected[batch.row_of_token]


def _importance_by_rollout(
    rows: Sequence[Row],
    old: Sequence[TokenStatistics],
    masks: Sequence[Tensor],
    algorithm: Algorithm,
) -> dict[tuple, Tensor]:
    """Rollout key -> importance weights [T], from the row under the prompt it was sampled with.

    1 for auxiliary rollouts: the engine's log-probs are those of another temperature, which is no
    error to correct.
    """
    ones = {row.rollout.key: torch.ones(row.response_length) for row in rows if row.auxiliary}
    return ones | {
        row.rollout.key: importance_weights(
            statistics.logprobs, torch.tensor(row.rollout.engine_logprobs), mask, algorithm.config
        )
        for row, statistics, mask in zip(rows, old, masks, strict=True)
        if row.on_policy
    }
