"""The policy loss: pure functions of flat token tensors, without Megatron.

The loss of an optimizer step is a weighted *sum* over its tokens. The weights hold the global
denominators, so micro-batch losses simply add up, whatever the packing and the layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from megatron_policysplit.config import AlgorithmConfig


@dataclass
class LossInputs:
    """[T] fp32 each, over the response tokens of some rows; nats where they are log-probs or
    entropies.

    weights: share of each token in the step's loss (`token_weight`), 0 for tokens that are not
    trained.
    importance: truncated actor/engine weights (1 where none are taken).
    entropy: differentiable if an entropy bonus is on. reference_logprobs: only with a KL term.
    scale, entropy_coef, drift_coef: of methods that have them (`advantages.TokenSignals`).
    nucleus_coef: likewise, the step's denominator in it, so that it is not multiplied by `weights`;
    nucleus_entropy: differentiable.
    """

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    importance: Tensor
    weights: Tensor
    entropy: Tensor
    reference_logprobs: Tensor | None = None
    scale: Tensor | None = None
    entropy_coef: Tensor | None = None
    drift_coef: Tensor | None = None
    nucleus_coef: Tensor | None = None
    nucleus_entropy: Tensor | None = None


@dataclass
class LossOutputs:
    """loss: scalar with gradient. The rest are detached sums over trained tokens (ratio_off_one:
    the largest).
    """

    loss: Tensor
    ratio_sum: Tensor
    ratio_off_one: Tensor
    clipped_tokens: Tensor
    tokens: Tensor

    @classmethod
    def over(cls, parts: Sequence[LossOutputs]) -> LossOutputs:
        """Of all tokens, from those of their parts."""
        columns = {
            field.name: torch.stack([getattr(part, field.name) for part in parts])
            for field in fields(cls)
        }
        return cls(
            **{name: c.max() if name == "ratio_off_one" else c.sum() for name, c in columns.items()}
        )


def policy_loss(inputs: LossInputs, config: AlgorithmConfig) -> LossOutputs:
    """PPO's clipped loss under the training prompt (paper Eq. 7-8), plus what `config` switches on.

    l = max(-A r, -A clip(r, 1 - low, 1 + high)) with r = exp(logprob - old logprob); with dual
    clip, for A < 0, l = min(l, -A dual_clip). Times the importance weight and the method's scale.
    Then + kl_coef * k3 KL to the reference policy, - (entropy_coef + the method's) * entropy, and +
    the method's drift_coef * |log r|. To the sum comes - nucleus_coef * nucleus entropy.
    """
    trained = inputs.weights > 0
    inputs = _zero_where_untrained(inputs, trained)
    ratio = torch.exp(inputs.logprobs - inputs.old_logprobs)
    clipped_ratio = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    plain, clipped = -inputs.advantages * ratio, -inputs.advantages * clipped_ratio
    token_loss = torch.maximum(plain, clipped)
    if config.dual_clip is not None:
        bounded = torch.minimum(token_loss, -inputs.advantages * config.dual_clip)
        token_loss = torch.where(inputs.advantages < 0, bounded, token_loss)
    token_loss = token_loss * inputs.importance
    if inputs.scale is not None:
        token_loss = token_loss * inputs.scale
    if config.kl_coef > 0:
        token_loss = token_loss + config.kl_coef * k3(inputs.logprobs, inputs.reference_logprobs)
    if config.entropy_coef > 0:
        token_loss = token_loss - config.entropy_coef * inputs.entropy
    if inputs.entropy_coef is not None:
        token_loss = token_loss - inputs.entropy_coef * inputs.entropy
    if inputs.drift_coef is not None:
        token_loss = token_loss + inputs.drift_coef * (inputs.logprobs - inputs.old_logprobs).abs()
    loss = (token_loss * inputs.weights).sum()
    if inputs.nucleus_coef is not None:
        loss = loss - (inputs.nucleus_coef * inputs.nucleus_entropy).sum()
    with torch.no_grad():
        return LossOutputs(
            loss=loss,
            ratio_sum=(ratio * trained).sum(),
            ratio_off_one=((ratio - 1).abs() * trained).max() if len(ratio) else ratio.sum(),
            clipped_tokens=((clipped > plain) & trained).sum(),
            tokens=trained.sum(),
        )


def _zero_where_untrained(inputs: LossInputs, trained: Tensor) -> LossInputs:
    """Untrained tokens may hold anything, NaN too; left in, 0 * NaN would reach the gradient."""
    values = {field.name: getattr(inputs, field.name) for field in fields(inputs)}
    return LossInputs(
        **{
            name: None if value is None else value.where(trained, 0.0)
            for name, value in values.items()
        }
    )


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Per-token estimate of KL(policy || reference): exp(d) - d - 1 with d = reference - logprob;
    >= 0.
    """
    difference = reference - logprobs
    return torch.exp(difference) - difference - 1


@dataclass(frozen=True)
class Denominators:
    """Over all rows of one optimizer step, skipped rows included: trained tokens, and rows that
    have any.
    """

    tokens: int
    rows: int


def denominators(trained_tokens: Sequence[int]) -> Denominators:
    """From the number of trained tokens of every row of the step."""
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
