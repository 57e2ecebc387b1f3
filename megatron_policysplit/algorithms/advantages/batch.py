"""The batch that a method computes advantages from: rows as flat CPU tensors, over all replicas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_policysplit.rows import Row


@dataclass
class TokenStatistics:
    """Statistics of one row under its own prompt, at its T response tokens.

    Score passes make them (`actor/scoring.py`); methods, metrics and the comparison of engine and
    actor read them.
    """

    logprobs: Tensor  # [T] fp32, nats; of the policy before the update
    entropy: Tensor  # [T] fp32, nats; over the whole vocabulary
    # By the name of another training mode: KL(this row's mode || that mode) at the same tokens, [T]
    # fp32, nats. Only for rows whose KL is logged (`log.kl_tokens`).
    kl: dict[str, Tensor] = field(default_factory=dict)
    # Mean log-prob of the prompt's tokens except the first, nats; 0 for a prompt of one token. None
    # unless the method has `prompt_logprobs`.
    prompt_logprob: float | None = None
    # Of each token's top-p nucleus, [T] fp32: the entropy in nats of the distribution renormalised
    # over it, and the threshold that logits in the nucleus reach (`vocab_parallel.Nucleus`). None
    # unless the method has a `nucleus`.
    nucleus_entropy: Tensor | None = None
    nucleus_threshold: Tensor | None = None
    # False for a row that nothing had to score. Its values are then 0, unless the row was scored
    # for the comparison with the engine alone.
    scored: bool = True


@dataclass
class AdvantageBatch:
    """R rows, trained under M modes, with T response tokens in all, one row after the other.

    Made by `make_batch` and completed by `signals.SignalBuilder`; methods compute token signals
    from it.
    """

    rewards: Tensor  # [R] fp32
    group: Tensor  # [R] int64; equal for the rows of one question under one training mode
    modes: Sequence[str]  # [R]; name of each row's training mode
    others: Tensor  # [R, M - 1] int64; rows of the same response under the other modes, then -1
    offsets: Tensor  # [R + 1] int64; row r has the tokens from offsets[r] to offsets[r + 1] - 1
    # Under the row's own prompt, by the weights before the batch, or before the optimizer step with
    # algorithm.statistics=step; [T] fp32, nats.
    logprobs: Tensor
    entropy: Tensor
    mask: Tensor  # [T] bool; tokens that are trained, and that statistics are taken over
    # [T] fp32, nats; the denominator of the loss's ratio. They differ from `logprobs` only at a
    # later optimizer step with algorithm.statistics=step.
    old_logprobs: Tensor
    # [R] bool; rows of a second rollout, which was sampled at another temperature. They are in
    # groups of their own. Their log-probs are at the mode's temperature, like those of other rows.
    auxiliary: Tensor
    clip_low: float = math.inf  # the loss clips the ratio to [1 - clip_low, 1 + clip_high]
    clip_high: float = math.inf
    seed: int = 0  # of random draws, see `generator`
    # [R] fp32, nats; mean log-prob of the prompt's tokens except the first. None unless the method
    # has `prompt_logprobs`.
    prompt_logprob: Tensor | None = None
    # [T] fp32, nats; entropy of the distribution renormalised over the nucleus. None unless the
    # method has a `nucleus`.
    nucleus_entropy: Tensor | None = None

    @property
    def row_of_token(self) -> Tensor:
        """[T] int64: index of the row that each token belongs to."""
        lengths = self.offsets.diff()
        return torch.repeat_interleave(torch.arange(len(lengths)), lengths)

    def on_tokens(self, per_row: Tensor) -> Tensor:
        """[T]: the value of each token's row, from `per_row` [R]; 0 outside the mask."""
        return per_row[self.row_of_token] * self.mask

    @property
    def ordinary(self) -> Tensor:
        """[T] bool: trained tokens of rows that are not auxiliary."""
        return self.mask & ~self.auxiliary[self.row_of_token]

    def mean_entropy(self) -> float:
        """Mean entropy in nats over the trained tokens of ordinary rows; 0 if there are none."""
        ordinary = self.ordinary
        return float(self.entropy[ordinary].double().mean()) if ordinary.any() else 0.0

    def clipped(self, advantages: Tensor) -> Tensor:
        """[T] bool: tokens that PPO's clip leaves without a gradient, given `advantages` [T]."""
        ratio = torch.exp(self.logprobs - self.old_logprobs)
        too_high = (advantages > 0) & (ratio > 1 + self.clip_high)
        return too_high | ((advantages < 0) & (ratio < 1 - self.clip_low))

    def generator(self) -> torch.Generator:
        """A new generator for random draws; it gives the same numbers on every rank."""
        return torch.Generator().manual_seed(self.seed)

    def rows_in(self, mode: str) -> Tensor:
        """[R] bool: rows of this training mode."""
        return torch.tensor([name == mode for name in self.modes], dtype=torch.bool)

    def at_others(self, values: Tensor) -> Tensor:
        """[T]: mean of `values` [T] at the same response token over the rows of the other modes.

        Raises ValueError if a response lacks a row of some mode, or if its rows differ in length.
        """
        if self.others.shape[1] == 0 or (self.others < 0).any():
            raise ValueError(
                "a row has no partner: this method needs every response under the prompts of all "
                "modes"
            )
        lengths = self.offsets.diff()
        if not torch.equal(lengths[:, None].expand_as(self.others), lengths[self.others]):
            raise ValueError(
                "a row and its partner differ in length: the response tokens were not shared "
                "exactly"
            )
        row = self.row_of_token
        position = torch.arange(len(row)) - self.offsets[row]  # of the token within its response
        return values[self.offsets[self.others[row]] + position[:, None]].mean(1)


def make_batch(
    rows: Sequence[Row], statistics: Sequence[TokenStatistics], masks: Sequence[Tensor]
) -> AdvantageBatch:
    """One batch of `rows`, in any order, with their statistics; masks[r] is [T_r] bool."""
    lengths = torch.tensor([row.response_length for row in rows])
    logprobs = torch.cat([s.logprobs for s in statistics])
    prompts = [s.prompt_logprob for s in statistics]
    nuclei = [s.nucleus_entropy for s in statistics if s.nucleus_entropy is not None]
    return AdvantageBatch(
        rewards=torch.tensor([row.rollout.reward for row in rows], dtype=torch.float32),
        group=group_numbers(rows),
        modes=[row.mode.value for row in rows],
        others=_rows_of_other_modes(rows),
        offsets=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        logprobs=logprobs,
        entropy=torch.cat([s.entropy for s in statistics]),
        mask=torch.cat(list(masks)),
        old_logprobs=logprobs,
        auxiliary=torch.tensor([row.auxiliary for row in rows], dtype=torch.bool),
        prompt_logprob=None if None in prompts else torch.tensor(prompts, dtype=torch.float32),
        nucleus_entropy=torch.cat(nuclei) if nuclei else None,
    )


def group_numbers(rows: Sequence[Row]) -> Tensor:
    """[R] int64: number of each row's advantage group (`RowKey.group`), counted from 0."""
    groups: dict[tuple, int] = {}
    return torch.tensor(
        [groups.setdefault(row.key.group, len(groups)) for row in rows], dtype=torch.int64
    )


def _rows_of_other_modes(rows: Sequence[Row]) -> Tensor:
    """[R, M - 1] int64: for each row the other rows of its response, in their order, then -1.

    M is the largest number of rows that a response has.
    """
    rows_of_response: dict[tuple, list[int]] = {}
    for index, row in enumerate(rows):
        rows_of_response.setdefault(row.rollout.key, []).append(index)
    largest = max((len(indices) for indices in rows_of_response.values()), default=1)
    result = [[-1] * (largest - 1) for _ in rows]
    for indices in rows_of_response.values():
        for index in indices:
            result[index][: len(indices) - 1] = [other for other in indices if other != index]
    # The shape is explicit because an empty list would otherwise lose its second dimension.
    return torch.tensor(result, dtype=torch.int64).reshape(len(rows), largest - 1)
