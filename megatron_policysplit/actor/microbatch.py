"""Rows as padded tensors: what one forward pass of the model takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_policysplit.rows import Mode, Row
from megatron_policysplit.rows.kl_pairs import Pairing


@dataclass
class MicroBatch:
    """B rows padded on the right to S tokens (causal attention never looks at the padding).

    An empty one has no rows, but `tokens` of one, for the sake of ranks that wait for this one's
    part of the work. tokens [B, S] int64. rows [B]: the rows' indices in the batch. predictors [T]:
    flat positions (b * S + s) whose hidden states predict the T response tokens `targets` [T].
    lengths [B]: response tokens per row.
    temperature [T]: of the row's mode. training_modes [B]: their names. pairings [B]: of the rows
    whose exact KL is wanted, else None. prompt_lengths [B]: tokens of each row's prompt.
    """

    tokens: Tensor
    rows: list[int]
    predictors: Tensor
    targets: Tensor
    lengths: list[int]
    temperature: Tensor
    training_modes: list[str]
    pairings: list[Pairing | None]
    prompt_lengths: list[int]

    @property
    def position_ids(self) -> Tensor:
        return torch.arange(self.tokens.shape[1]).expand_as(self.tokens)

    def select(self, hidden: Tensor) -> Tensor:
        """Hidden states [S, B, H] of the model to those that predict response tokens, [T, H]."""
        return _at(self.predictors, hidden)

    def select_prompts(self, hidden: Tensor) -> Tensor:
        """Hidden states [S, B, H] of the model to those that predict prompt tokens but each row's
        first, [P, H].
        """
        width = self.tokens.shape[1]
        positions = [
            torch.arange(length - 1) + b * width for b, length in enumerate(self.prompt_lengths)
        ]
        return _at(torch.cat(positions), hidden)

    @property
    def prompt_targets(self) -> Tensor:
        """[P] int64: the tokens that these predict."""
        return torch.cat([self.tokens[b, 1:length] for b, length in enumerate(self.prompt_lengths)])


def _at(positions: Tensor, hidden: Tensor) -> Tensor:
    """[N, H]: hidden states [S, B, H] at flat positions (b * S + s)."""
    return hidden.transpose(0, 1).reshape(-1, hidden.shape[-1])[positions.to(hidden.device)]


def make_microbatch(
    rows: Sequence[Row],
    indices: Sequence[int],
    temperatures: Mapping[Mode, float],
    pairings: Mapping[int, Pairing],
    multiple: int = 1,
) -> MicroBatch:
    """The rows at `indices` (none: an empty micro-batch) as one; pairings: by row index, where KL
    is wanted.

    multiple: what S must be a multiple of.
    """
    width = -(-max((rows[i].length for i in indices), default=1) // multiple) * multiple
    tokens = torch.zeros(max(len(indices), 1), width, dtype=torch.int64)
    nothing = torch.empty(0, dtype=torch.int64)
    predictors, targets, temperature = [nothing], [nothing], [torch.empty(0)]
    for b, index in enumerate(indices):
        row = rows[index]
        start, length = len(row.prompt), row.response_length
        tokens[b, : row.length] = torch.tensor([*row.prompt, *row.rollout.tokens])
        predictors.append(torch.arange(start - 1, start + length - 1) + b * width)
        targets.append(torch.tensor(row.rollout.tokens))
        temperature.append(torch.full((length,), temperatures[row.mode]))
    return MicroBatch(
        tokens=tokens,
        rows=list(indices),
        predictors=torch.cat(predictors),
        targets=torch.cat(targets),
        lengths=[rows[i].response_length for i in indices],
        temperature=torch.cat(temperature),
        training_modes=[rows[i].key.training_mode for i in indices],
        pairings=[pairings.get(i) for i in indices],
        prompt_lengths=[len(rows[i].prompt) for i in indices],
    )
