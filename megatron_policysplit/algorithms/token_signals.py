"""What a response token is trained with: the one record that goes from a method to the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass
class TokenSignals:
    """What each of T response tokens is trained with: tensors [T] fp32 without gradient.

    A method makes one for a whole batch (`Method.signals`) and fills the first block of fields.
    `signals.SignalBuilder` cuts it into rows and fills the second block, `Actor.update` joins the
    rows of a micro-batch, and `loss.policy_loss` reads it. All fields go that way alike: a new term
    of the loss is a field here and a line in `policy_loss`. A field that is None has no term.
    """

    # A method fills these.
    advantages: Tensor  # 0 for tokens that are not trained
    scale: Tensor | None = None  # factor on the policy term, importance weight included
    entropy_coef: Tensor | None = None  # weight of the entropy, besides algorithm.entropy_coef
    drift_coef: Tensor | None = None  # weight of |log pi - log pi_old|
    # Weight of the nucleus' entropy (`Method.nucleus`) in the mean over the step's rows of the sums
    # over their tokens, whatever the loss aggregation; `weights` does not multiply it.
    nucleus_coef: Tensor | None = None

    # The builder fills these.
    weights: Tensor | None = None  # share of the token in the step's loss, 0 if it is not trained
    old_logprobs: Tensor | None = None  # nats, the denominator of the ratio
    importance: Tensor | None = None  # truncated actor/engine weight, 1 where none is taken
    reference_logprobs: Tensor | None = None  # nats, of the initial policy; with a KL term only
    nucleus_threshold: Tensor | None = None  # logit above which a column is in the token's nucleus

    def map(self, change: Callable[[Tensor], Tensor]) -> TokenSignals:
        """The same fields after `change`."""
        return TokenSignals(
            **{
                name: value if value is None else change(value)
                for name, value in vars(self).items()
            }
        )

    def at(self, span: slice) -> TokenSignals:
        """The signals of a span of the tokens."""
        return self.map(lambda value: value[span])

    def split(self, lengths: Sequence[int]) -> list[TokenSignals]:
        """The signals of rows that follow each other, `lengths` tokens each."""
        columns = {
            name: value.split(list(lengths))
            for name, value in vars(self).items()
            if value is not None
        }
        return [
            TokenSignals(**{name: parts[row] for name, parts in columns.items()})
            for row in range(len(lengths))
        ]

    @classmethod
    def join(cls, rows: Sequence[TokenSignals]) -> TokenSignals:
        """The signals of rows one after the other, which all have the same fields."""
        names = [field.name for field in fields(cls) if getattr(rows[0], field.name) is not None]
        return cls(**{name: torch.cat([getattr(row, name) for row in rows]) for name in names})
