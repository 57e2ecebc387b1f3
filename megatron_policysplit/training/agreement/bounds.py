"""How far apart engine and actor may be: the figures of a comparison, and their bounds.

With d = actor - engine log-prob (nats, per response token), the figures are mean |d| and mean
exp(d) - 1 - d. The second is the k3 estimate of KL(engine || actor). The default bounds at
temperature 1 and above:

    actor      engine     mean |d|   k3
    float32    float32    0.001      1e-5
    TF32       float32    0.01       5e-4
    else                  0.08       0.03

- float32: kernels that only order their sums differently stay below 1e-4.
- TF32: what a float32 actor multiplies in on a GPU, for Transformer Engine has no other kernels. A
  random toy model with logits up to 10 was at 0.0033 and 9e-6 on an H200.
- bfloat16: SmolLM2-135M-Instruct on a CPU is at 0.033 to 0.041, with either side or both in
  bfloat16; larger models on GPUs are said to be at 0.01 to 0.04. The bound is twice that. A
  sampling temperature off by a tenth already makes about as much.
- k3: rounding noise has a k3 of 0.8 to 1.2 times the square of mean |d|. The bounds of k3 are four
  to ten times that, so they catch a few tokens that are far off, not the same noise again.
- Temperature: T < 1 divides the logits' noise too, so the defaults grow by 1/T, and by 1/T^2 for
  k3. Bounds from the configuration are not scaled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_policysplit.actor.layers import choose_layers
from megatron_policysplit.config import AgreementConfig, Config
from megatron_policysplit.config.modes import temperatures_by_mode
from megatron_policysplit.rows import Mode


@dataclass(frozen=True)
class AgreementSettings:
    """What the gate, its bounds and its diagnosis need of a run's configuration."""

    agreement: AgreementConfig
    temperatures: Mapping[Mode, float]  # at which each mode samples
    engine: str  # rollout.engine
    transport: str  # weight_sync.transport; read where engine is "sglang"
    actor_dtype: str  # model.dtype
    engine_dtype: str  # what the engine computes in
    tf32: bool  # whether the actor multiplies float32 in TF32

    @classmethod
    def of(cls, config: Config) -> AgreementSettings:
        """The settings of a run. An engine without a dtype of its own computes in the actor's."""
        is_sglang, dtype = config.rollout.engine == "sglang", config.model.dtype
        return cls(
            agreement=config.agreement,
            temperatures=temperatures_by_mode(config.rollout, config.modes),
            engine=config.rollout.engine,
            transport=config.weight_sync.transport,
            actor_dtype=dtype,
            engine_dtype=(config.rollout.server.dtype if is_sglang else None) or dtype,
            tf32=choose_layers(config.model.layers).transformer_engine,
        )


@dataclass(frozen=True)
class Difference:
    """How far apart actor and engine are on some response tokens, d = actor - engine log-prob."""

    tokens: int
    mean: float  # mean |d|, nats
    k3: float  # mean exp(d) - 1 - d, nats

    @classmethod
    def of(cls, actor: Sequence[Tensor], engine: Sequence[Tensor]) -> Difference:
        """The difference over all tokens of some responses; at least one token.

        actor, engine: log-probs [T] of the same responses in the same order.
        """
        # In float64: in float32 expm1(d) - d loses k3 to rounding where d is small.
        actor_logprobs, engine_logprobs = (
            torch.cat([value.double() for value in side]) for side in (actor, engine)
        )
        d = actor_logprobs - engine_logprobs
        return cls(len(d), float(d.abs().mean()), float((torch.expm1(d) - d).mean()))

    @classmethod
    def merge(cls, parts: Sequence[Difference]) -> Difference:
        """The difference over the tokens of all parts."""
        tokens = sum(part.tokens for part in parts)
        mean, k3 = (
            sum(getattr(part, name) * part.tokens for part in parts) / tokens
            for name in ("mean", "k3")
        )
        return cls(tokens, mean, k3)

    @property
    def rank(self) -> float:
        """A key to sort by: the mean, or infinity where the mean is not a finite number."""
        return self.mean if math.isfinite(self.mean) else math.inf


@dataclass(frozen=True)
class Bounds:
    """The largest mean |d| and the largest k3 (nats) at which engine and actor agree."""

    mean: float
    k3: float

    def hold(self, difference: Difference) -> bool:
        """Whether a difference is within both bounds; one that is not a number never is."""
        return difference.mean <= self.mean and difference.k3 <= self.k3


FLOAT32, TF32 = Bounds(mean=1e-3, k3=1e-5), Bounds(mean=0.01, k3=5e-4)
BFLOAT16 = Bounds(mean=0.08, k3=0.03)


def choose_bounds(settings: AgreementSettings, temperature: float = 1.0) -> Bounds:
    """The bounds for log-probs at a temperature.

    They are agreement.max_difference and agreement.max_k3 where given, else the defaults for the
    precisions of actor and engine.
    """
    if {settings.actor_dtype, settings.engine_dtype} == {"float32"}:
        default = TF32 if settings.tf32 else FLOAT32
    else:
        default = BFLOAT16
    noise = 1 / min(1.0, temperature)
    return Bounds(
        mean=settings.agreement.max_difference or default.mean * noise,
        k3=settings.agreement.max_k3 or default.k3 * noise**2,
    )
