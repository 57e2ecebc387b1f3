"""How far engine and actor may be apart: the figures of a comparison, and their bounds.

With d = actor - engine log-prob (nats, per response token) the figures are mean |d| and mean exp(d)
- 1 - d, the k3 estimate of KL(engine || actor). At temperature 1 and above they may be, by default:

    actor      engine     mean |d|   k3
    float32    float32    0.001      1e-5
    else                  0.08       0.03

float32: kernels that only order their sums differently stay below 1e-4, GPU kernels that multiply
with TF32 near 1e-3.
bfloat16: SmolLM2-135M-Instruct on a CPU is at 0.033 to 0.041, with either side or both in bfloat16;
larger models on GPUs are said to be at 0.01 to 0.04. Twice that is the bound; a sampling
temperature off by a tenth already makes about as much. Rounding noise has k3 of 0.8 to 1.2 times
the square of mean |d|; the bounds of k3 are some four to ten times that, so that they speak of a
few tokens that are far off, not of the same noise again. A temperature T < 1 divides the logits'
noise too: the defaults grow by 1/T, and by 1/T^2 for k3. Bounds from the configuration are taken as
they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_policysplit.config import Config


@dataclass(frozen=True)
class Difference:
    """Over some response tokens, with d = actor - engine log-prob in nats: mean |d|, and k3 = mean
    exp(d) - 1 - d.
    """

    tokens: int
    mean: float
    k3: float

    @classmethod
    def of(cls, actor: Sequence[Tensor], engine: Sequence[Tensor]) -> Difference:
        """actor, engine: log-probs [T] of the same responses in the same order; at least one token."""
        d = torch.cat([value.double() for value in actor]) - torch.cat(
            [value.double() for value in engine]
        )
        return cls(len(d), float(d.abs().mean()), float((torch.expm1(d) - d).mean()))

    @classmethod
    def together(cls, parts: Sequence[Difference]) -> Difference:
        """Over the tokens of all parts."""
        tokens = sum(part.tokens for part in parts)
        mean, k3 = (
            sum(getattr(part, name) * part.tokens for part in parts) / tokens
            for name in ("mean", "k3")
        )
        return cls(tokens, mean, k3)

    @property
    def rank(self) -> float:
        """Its mean, infinite where that is not a number: to sort by."""
        return self.mean if math.isfinite(self.mean) else math.inf


@dataclass(frozen=True)
class Bounds:
    """Of mean |d| and of k3, nats."""

    mean: float
    k3: float

    def hold(self, difference: Difference) -> bool:
        return difference.mean <= self.mean and difference.k3 <= self.k3


FLOAT32, BFLOAT16 = Bounds(mean=1e-3, k3=1e-5), Bounds(mean=0.08, k3=0.03)


def choose_bounds(config: Config, temperature: float = 1.0) -> Bounds:
    """The bounds of log-probs at a temperature: the configuration's, else those for the two
    precisions.
    """
    engine = config.rollout.server.dtype if config.rollout.engine == "sglang" else None
    default = (
        FLOAT32 if {config.model.dtype, engine or config.model.dtype} == {"float32"} else BFLOAT16
    )
    noise = 1 / min(1.0, temperature)
    return Bounds(
        mean=config.agreement.max_difference or default.mean * noise,
        k3=config.agreement.max_k3 or default.k3 * noise**2,
    )
