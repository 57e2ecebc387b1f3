"""What an advantage method sees: a batch of rows as flat tensors, on the CPU, over all replicas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_policysplit.rows import Row


@dataclass
class TokenStatistics:
    """Per response token of one row, fp32, nats: log-prob [T] and entropy [T] of the policy before
    the update.

    kl: by the name of another training mode, KL(this row's mode || that mode) [T] at the same
    tokens, where asked for. prompt_logprob: mean of the log-probs of the prompt's tokens but the
    first (0 for a prompt of one), where the method asks for it.
    nucleus_entropy, nucleus_threshold [T]: nats, and a logit (`vocab_parallel.Nucleus`), where it
    asks for these.
    scored: False for a row that nothing needed to score; everything is 0 then, unless the row was
    compared with the engine.
    """

    logprobs: Tensor
    entropy: Tensor
    kl: dict[str, Tensor] = field(default_factory=dict)
    prompt_logprob: float | None = None
    nucleus_entropy: Tensor | None = None
    nucleus_threshold: Tensor | None = None
    scored: bool = True


@dataclass
class AdvantageBatch:
    """R rows with T response tokens in all; row r's tokens are [offsets[r], offsets[r + 1]).

    rewards [R] fp32. group [R] int64: rows of one question under one training mode. modes [R]:
    names of the rows' training modes. others [R, M - 1] int64: the rows of the same response under
    the other modes (of M in all), filled up with -1. auxiliary [R] bool: of a second rollout at
    another temperature, in groups of its own; its log-probs are at the mode's temperature all the
    same. logprobs, entropy [T] fp32 nats under the row's own prompt, by the weights before the
    update. mask [T] bool: tokens that are trained, and over which statistics are taken.
    old_logprobs [T]: those of the ratio, which differ from `logprobs` only where
    algorithm.statistics=step took new ones before a later optimizer step. clip_low, clip_high: the
    loss's clip of their ratio. seed: of what a method draws at random. prompt_logprob [R] fp32: the
    mean log-prob of the tokens of the row's prompt but the first, if the method asks for it
    (`Method.prompt_logprobs`). nucleus_entropy [T] nats, of the distribution renormalised over the
    nucleus, likewise (`Method.nucleus`).
    """

    rewards: Tensor
    group: Tensor
    modes: Sequence[str]
    others: Tensor
    offsets: Tensor
    logprobs: Tensor
    entropy: Tensor
    mask: Tensor
    old_logprobs: Tensor
    auxiliary: Tensor
    clip_low: float = math.inf
    clip_high: float = math.inf
    seed: int = 0
    prompt_logprob: Tensor | None = None
    nucleus_entropy: Tensor | None = None

    @property
    def row_of_token(self) -> Tensor:
        """[T] int64: the row each token belongs to."""
        lengths = self.offsets.diff()
        return torch.repeat_interleave(torch.arange(len(lengths)), lengths)

    def on_tokens(self, per_row: Tensor) -> Tensor:
        """[T]: each row's value [R] at every token of it, 0 outside the mask."""
        return per_row[self.row_of_token] * self.mask

    @property
    def ordinary(self) -> Tensor:
        """[T] bool: trained tokens that are not of auxiliary rows."""
        return self.mask & ~self.auxiliary[self.row_of_token]

    def mean_entropy(self) -> float:
        """Over all trained tokens but those of auxiliary rows, nats; 0 without any."""
        counted = self.ordinary
        return float(self.entropy[counted].double().mean()) if counted.any() else 0.0

    def clipped(self, advantages: Tensor) -> Tensor:
        """[T] bool: tokens of these advantages [T] to which PPO's clip leaves no gradient."""
        ratio = torch.exp(self.logprobs - self.old_logprobs)
        too_high = (advantages > 0) & (ratio > 1 + self.clip_high)
        return too_high | ((advantages < 0) & (ratio < 1 - self.clip_low))

    def generator(self) -> torch.Generator:
        """For random draws, the same on every rank."""
        return torch.Generator().manual_seed(self.seed)

    def rows_in(self, mode: str) -> Tensor:
        """[R] bool: rows of this training mode."""
        return torch.tensor([name == mode for name in self.modes], dtype=torch.bool)

    def at_others(self, values: Tensor) -> Tensor:
        """[T]: for each token, the mean of `values` at the same token of the response over the rows
        of other modes.

        Raises ValueError if a row has not one of every other mode or rows of a response differ in
        length.
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
        position = torch.arange(len(row)) - self.offsets[row]
        return values[self.offsets[self.others[row]] + position[:, None]].mean(1)


def make_batch(
    rows: Sequence[Row], statistics: Sequence[TokenStatistics], masks: Sequence[Tensor]
) -> AdvantageBatch:
    """Rows (in any order) and their statistics as one `AdvantageBatch`; masks[r] is bool [T_r]."""
    lengths = torch.tensor([row.response_length for row in rows])
    logprobs = torch.cat([s.logprobs for s in statistics])
    prompts = [s.prompt_logprob for s in statistics]
    nuclei = [s.nucleus_entropy for s in statistics if s.nucleus_entropy is not None]
    return AdvantageBatch(
        rewards=torch.tensor([row.rollout.reward for row in rows], dtype=torch.float32),
        group=group_numbers(rows),
        modes=[row.mode.value for row in rows],
        others=_others(rows),
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
    """[R] int64: equal for rows of one advantage group (`RowKey.group`), counted from 0."""
    groups: dict[tuple, int] = {}
    return torch.tensor(
        [groups.setdefault(row.key.group, len(groups)) for row in rows], dtype=torch.int64
    )


def _others(rows: Sequence[Row]) -> Tensor:
    """[R, M - 1] int64: for each row the other rows of its response, in their order, filled up with
    -1.
    """
    together: dict[tuple, list[int]] = {}
    for index, row in enumerate(rows):
        together.setdefault(row.rollout.key, []).append(index)
    most = max((len(indices) for indices in together.values()), default=1)
    result = [[-1] * (most - 1) for _ in rows]
    for indices in together.values():
        for index in indices:
            result[index][: len(indices) - 1] = [other for other in indices if other != index]
    return torch.tensor(result, dtype=torch.int64).reshape(len(rows), most - 1)
