"""Rows as padded tensors: what one forward pass of the model takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_policysplit.rows import Mode, Row
from megatron_policysplit.rows.kl_pairs import Pairing
from megatron_policysplit.rows.plan import padded_width


@dataclass
class MicroBatch:
    """B rows padded on the right to S tokens (causal attention never looks at the padding).

    Together they have T response tokens. `make_microbatch` makes it on leaders; every rank of the
    replica passes it through the model. An empty micro-batch has no rows, but one row of `tokens`:
    under expert parallelism other replicas wait for this one's forward pass.
    """

    tokens: Tensor  # [B, S] int64
    rows: list[int]  # [B]: the rows' indices in the batch
    predictors: Tensor  # [T]: flat positions (b * S + s) whose hidden states predict `targets`
    targets: Tensor  # [T] int64: the response tokens, row after row
    lengths: list[int]  # [B]: response tokens per row
    temperature: Tensor  # [T]: of the row's mode
    training_modes: list[str]  # [B]
    pairings: list[Pairing | None]  # [B]: None for rows whose exact KL is not computed
    prompt_lengths: list[int]  # [B]: tokens of each row's prompt

    @property
    def position_ids(self) -> Tensor:
        """[B, S] int64: each row counts from 0."""
        return torch.arange(self.tokens.shape[1]).expand_as(self.tokens)

    def select(self, hidden: Tensor) -> Tensor:
        """Select from hidden states [S, B, H] those that predict response tokens, [T, H]."""
        return _at(self.predictors, hidden)

    def select_prompts(self, hidden: Tensor) -> Tensor:
        """Select from hidden states [S, B, H] those that predict prompt tokens, [P, H].

        Each row's first token is not among them: nothing predicts it.
        """
        width = self.tokens.shape[1]
        positions = [
            torch.arange(length - 1) + b * width for b, length in enumerate(self.prompt_lengths)
        ]
        return _at(torch.cat(positions), hidden)

    @property
    def prompt_targets(self) -> Tensor:
        """The tokens that the hidden states of `select_prompts` predict, [P] int64."""
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
    """Make one micro-batch of the rows at `indices`; of no indices an empty one.

    temperatures: by the row's mode.
    pairings: by row index, of the rows whose exact KL is computed.
    multiple: S is a multiple of this.
    """
    # An empty micro-batch still has one token, for the model to run on.
    width = padded_width(max((rows[i].length for i in indices), default=1), multiple)
    tokens = torch.zeros(max(len(indices), 1), width, dtype=torch.int64)
    # Something to concatenate where there are no rows.
    empty = torch.empty(0, dtype=torch.int64)
    predictors, targets, temperature = [empty], [empty], [torch.empty(0)]
    for b, index in enumerate(indices):
        row = rows[index]
        start, length = len(row.prompt), row.response_length
        tokens[b, : row.length] = torch.tensor([*row.prompt, *row.rollout.tokens])
        # The hidden state of a token predicts the next one.
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
