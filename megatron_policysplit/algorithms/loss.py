"""The policy loss: pure functions of flat token tensors, without Megatron.

The loss of an optimizer step is a weighted *sum* over its tokens. The weights hold the global
denominators, so micro-batch losses simply add up, whatever the packing and the layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from megatron_policysplit.algorithms.token_signals import TokenSignals
from megatron_policysplit.config import AlgorithmConfig


@dataclass
class PolicyTokens:
    """What the policy that is trained says of T response tokens, [T] fp32 nats, with gradient."""

    logprobs: Tensor
    entropy: Tensor
    nucleus_entropy: Tensor | None = None  # for a method with `TokenSignals.nucleus_coef`


MAXIMA = ("ratio_off_one",)  # the other fields of LossMetrics are sums over tokens


@dataclass
class LossMetrics:
    """What is logged of the tokens of a chunk, a micro-batch or an optimizer step; scalars.

    `policy_loss` returns one whose `loss` has a gradient. A new metric is a field here, a value
    there, and its place in `actor.UpdateMetrics`.
    """

    loss: Tensor
    ratio_sum: Tensor  # of pi / pi_old
    clipped_tokens: Tensor  # tokens whose loss PPO's clip changes
    tokens: Tensor  # trained tokens
    ratio_off_one: Tensor  # the largest |pi / pi_old - 1|

    @classmethod
    def over(cls, parts: Sequence[LossMetrics]) -> LossMetrics:
        """The metrics of all tokens from those of their parts."""
        columns = {
            field.name: torch.stack([getattr(part, field.name) for part in parts])
            for field in fields(cls)
        }
        return cls(**{name: c.max() if name in MAXIMA else c.sum() for name, c in columns.items()})

    def sums_and_maxima(self) -> tuple[Tensor, Tensor]:
        """The sums and the maxima, each a vector in fp64 without gradient: what ranks exchange."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values = {name: value.detach().double() for name, value in values.items()}
        maxima = [values.pop(name) for name in MAXIMA]
        return torch.stack(list(values.values())), torch.stack(maxima)

    @classmethod
    def of_sums_and_maxima(cls, sums: Tensor, maxima: Tensor) -> LossMetrics:
        """The inverse of `sums_and_maxima`."""
        names = [field.name for field in fields(cls) if field.name not in MAXIMA]
        values = dict(zip(names, sums.unbind(), strict=True))
        return cls(**values, **dict(zip(MAXIMA, maxima.unbind(), strict=True)))

    def vector(self) -> Tensor:
        """Sums, then maxima, as one tensor: what Megatron's schedule hands on."""
        return torch.cat(self.sums_and_maxima())

    @classmethod
    def of_vectors(cls, vectors: Sequence[Tensor]) -> LossMetrics:
        """The metrics of all tokens from the `vector` of each part, on the CPU; zeros of none."""
        if not vectors:
            vectors = [torch.zeros(len(fields(cls)), dtype=torch.float64)]
        table, maxima = torch.stack(list(vectors)).cpu(), len(MAXIMA)
        return cls.of_sums_and_maxima(table[:, :-maxima].sum(0), table[:, -maxima:].max(0).values)


def policy_loss(
    signals: TokenSignals, policy: PolicyTokens, config: AlgorithmConfig
) -> LossMetrics:
    """PPO's clipped loss under the training prompt (paper Eq. 7-8), plus what `config` switches on.

    l = max(-A r, -A clip(r, 1 - low, 1 + high)) with r = exp(logprob - old logprob); with dual
    clip, for A < 0, l = min(l, -A dual_clip). Times the importance weight and the method's scale.
    Then + kl_coef * k3 KL to the reference policy, - (entropy_coef + the method's) * entropy, and +
    drift_coef * |log r|. The loss is the sum of these, each times its token's weight, less
    nucleus_coef * nucleus entropy. `signals` and `policy` are of the same T tokens.
    """
    trained = signals.weights > 0
    # Untrained tokens may hold anything, NaN too; left in, 0 * NaN would reach the gradient.
    signals = signals.map(lambda value: value.where(trained, 0.0))
    logprobs, entropy = policy.logprobs.where(trained, 0.0), policy.entropy.where(trained, 0.0)

    ratio = torch.exp(logprobs - signals.old_logprobs)
    clipped_ratio = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    plain, clipped = -signals.advantages * ratio, -signals.advantages * clipped_ratio
    token_loss = torch.maximum(plain, clipped)
    if config.dual_clip is not None:
        bounded = torch.minimum(token_loss, -signals.advantages * config.dual_clip)
        token_loss = torch.where(signals.advantages < 0, bounded, token_loss)
    token_loss = token_loss * signals.importance
    if signals.scale is not None:
        token_loss = token_loss * signals.scale
    if config.kl_coef > 0:
        token_loss = token_loss + config.kl_coef * k3(logprobs, signals.reference_logprobs)
    if config.entropy_coef > 0:
        token_loss = token_loss - config.entropy_coef * entropy
    if signals.entropy_coef is not None:
        token_loss = token_loss - signals.entropy_coef * entropy
    if signals.drift_coef is not None:
        drift = (logprobs - signals.old_logprobs).abs()
        token_loss = token_loss + signals.drift_coef * drift
    loss = (token_loss * signals.weights).sum()
    if signals.nucleus_coef is not None:
        nucleus_entropy = policy.nucleus_entropy.where(trained, 0.0)
        loss = loss - (signals.nucleus_coef * nucleus_entropy).sum()

    with torch.no_grad():
        off_one = ((ratio - 1).abs() * trained).max() if len(ratio) else ratio.sum()
        return LossMetrics(
            loss=loss,
            ratio_sum=(ratio * trained).sum(),
            clipped_tokens=((clipped > plain) & trained).sum(),
            tokens=trained.sum(),
            ratio_off_one=off_one,
        )


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Per-token estimate of KL(policy || reference), >= 0.

    exp(d) - d - 1 with d = reference - logprob.
    """
    difference = reference - logprobs
    return torch.exp(difference) - difference - 1


@dataclass(frozen=True)
class Denominators:
    """What the loss of one optimizer step is divided by, over all its rows, skipped ones too."""

    tokens: int  # trained tokens
    rows: int  # rows that have any


def denominators(trained_tokens: Sequence[int]) -> Denominators:
    """The denominators of a step from the number of trained tokens of each of its rows."""
    return Denominators(sum(trained_tokens), sum(count > 0 for count in trained_tokens))


def token_weight(
    trained_tokens: int, step: Denominators, aggregation: str, max_response_tokens: int
) -> float:
    """Weight of each trained token of a row that has `trained_tokens` of them.

    token_mean: 1 / tokens. sequence_mean_token_mean: 1 / (rows * trained_tokens).
    sequence_mean_token_sum_norm: 1 / (rows * max_response_tokens) (Dr. GRPO's constant length). 0
    where the step has no row to divide by.
    """
    if trained_tokens == 0 or step.rows == 0:
        return 0.0
    if aggregation == "token_mean":
        return 1 / step.tokens
    if aggregation == "sequence_mean_token_mean":
        return 1 / (step.rows * trained_tokens)
    if aggregation == "sequence_mean_token_sum_norm":
        return 1 / (step.rows * max_response_tokens)
    raise ValueError(f"unknown loss aggregation {aggregation!r}")


def importance_weights(
    actor: Tensor, engine: Tensor, mask: Tensor, config: AlgorithmConfig
) -> Tensor:
    """Truncated weights [T] for what the engine sampled and the actor would have (one response).

    actor, engine: log-probs [T] of the response under its *sampling* prompt. mask: bool [T], the
    trained tokens. The weight is min(exp(actor - engine), cap), per token, or for the whole
    response with the difference summed over its trained tokens; both of its rows use it.
    """
    if config.importance_cap is None:
        return torch.ones_like(actor)
    difference = actor - engine
    if config.importance_level == "sequence":
        difference = difference[mask].sum().expand_as(difference)
    return torch.exp(difference).clamp(max=config.importance_cap)
