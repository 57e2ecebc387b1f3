"""Policy Split (arXiv 2604.11510): correctness for both modes, a clamped entropy bonus for the high-entropy one.

For a response token t of response i in a group, under the training mode m with partner mode m':

    b[t]  = alpha * s_m[t] + (1 - alpha) * s_m'[t]                      Eq. 6; s is -log pi, or the exact entropy
    B[t]  = (b[t] - mean b) / (std b + 1e-6) over the group's tokens     Eq. 4
    A~[t] = A_i + eta * clip(B[t], -|A_i| / kappa, +|A_i| / kappa)       Eq. 3, `clamp_order: paper`
    A~[t] = A_i + clip(eta * B[t], -|A_i| / kappa, +|A_i| / kappa)       `clamp_order: code`

eta is `eta` in the high-entropy mode and `eta_normal` (0 by default) in the normal mode. The authors'
released code clamps after scaling and, because two names share one tensor, adds the bonus twice;
`variant: authors_code` does both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_policysplit.advantages.batch import AdvantageBatch, group_extremes, group_mean_std
from megatron_policysplit.advantages.grpo import EPSILON, response_advantages
from megatron_policysplit.config import AlgorithmConfig


def advantages(batch: AdvantageBatch, config: AlgorithmConfig) -> Tensor:
    """[T] fp32, 0 outside the mask. Nothing of it carries a gradient."""
    row = batch.row_of_token
    correctness = response_advantages(batch.rewards, batch.group)[row]
    return ((correctness + bonus(batch, correctness, config)) * batch.mask).detach()


def bonus(batch: AdvantageBatch, correctness: Tensor, config: AlgorithmConfig) -> Tensor:
    """[T] fp32: what Policy Split adds to the correctness advantage [T] of each token."""
    surprise = batch.entropy if config.entropy_estimate == "entropy" else -batch.logprobs
    mixed = config.alpha * surprise + (1 - config.alpha) * batch.at_partner(surprise)
    row = batch.row_of_token
    normalized = normalize(mixed, batch.group[row], batch.mask, config.normalization)

    eta = torch.where(batch.high_entropy, config.eta, config.eta_normal)[row]
    bound = correctness.abs() / config.kappa
    if clamp_order(config) == "paper":
        result = eta * normalized.clamp(-bound, bound)
    else:
        result = (eta * normalized).clamp(-bound, bound)
    return 2 * result if double_bonus(config) else result


def normalize(values: Tensor, group: Tensor, mask: Tensor, method: str) -> Tensor:
    """`values` [T] normalised over the unmasked tokens of each group; 0 where masked.

    zscore: (x - mean) / (std + 1e-6), unbiased. mean: (x - mean) / (max - min + 1e-6). none: x.
    """
    result = torch.zeros_like(values)
    kept, kept_group = values[mask], group[mask]
    if method == "none":
        result[mask] = kept
        return result
    mean, spread = group_mean_std(kept, kept_group)
    if method == "mean":
        highest, lowest = group_extremes(kept, kept_group)
        spread = (highest - lowest).double()
    result[mask] = ((kept.double() - mean) / (spread + EPSILON)).to(values.dtype)
    return result


def clamp_order(config: AlgorithmConfig) -> str:
    """`clamp_order` if given, otherwise what `variant` says."""
    return config.clamp_order or ("code" if config.variant == "authors_code" else "paper")


def double_bonus(config: AlgorithmConfig) -> bool:
    """`double_bonus` if given, otherwise what `variant` says."""
    return config.variant == "authors_code" if config.double_bonus is None else config.double_bonus
