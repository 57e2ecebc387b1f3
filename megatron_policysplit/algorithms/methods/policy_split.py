"""Policy Split: GRPO in two modes, with a clamped entropy bonus in the high-entropy mode.

Source: arXiv 2604.11510. Every response is trained under the prompts of both modes. For token t of
response i under the training mode m, with m' the other mode:

    b[t]  = alpha s_m[t] + (1 - alpha) s_m'[t]                    Eq. 6, the mixed surprise
    B[t]  = (b[t] - mean b) / (std b + 1e-6)                      Eq. 4
    A~[t] = A_i + eta clip(B[t], -|A_i| / kappa, |A_i| / kappa)   Eq. 3, `clamp_order: paper`
    A~[t] = A_i + clip(eta B[t], -|A_i| / kappa, |A_i| / kappa)   `clamp_order: code`

- A~[t] is the advantage that the token is trained with. It carries no gradient.
- A_i is the advantage of the response for its correctness: GRPO's, or that of another method with
  `correctness`.
- s_m[t] is the token's surprise under the prompt of mode m, in nats: -log pi, or the exact entropy
  with `entropy_estimate: entropy`.
- The mean and the unbiased std are over the trained tokens of the group: all responses to one
  question under mode m.
- eta is `eta` in the high-entropy mode and `eta_normal` (0 by default) in the normal mode.

Differences from the paper:

- The authors' released code clamps after scaling. It also adds the bonus twice, because two names
  share one tensor. `variant: authors_code` does both.
- The loss has a dual clip of 3 unless `algorithm.dual_clip` is set. The paper's equation has none;
  verl, on which the authors built, has it by default. With one optimizer step a batch all ratios
  are 1 and the dual clip does nothing. With two, training broke without it in three of five runs of
  our study (docs/study_results.md).
- `modes.others` adds modes to the two of the paper. Every response is then trained under the
  prompts of all modes, s_m'[t] is the mean over the modes other than m, and eta is `eta` in every
  mode but the normal one.
- `modes` overrides these values for single modes. With a negative eta, as in
  {careful: {eta: -0.02, kappa: 4}}, the mode is rewarded for likely tokens.
- `eta_schedule` moves eta with the optimizer step k, counted from 0, where the paper has a
  constant. A mode whose eta is set in `modes`, and the normal mode, do not follow it. With
  x = min(k / eta_steps, 1):

      linear:  eta_k = eta + (eta_end - eta) x
      cosine:  eta_k = eta + (eta_end - eta) (1 - cos(pi x)) / 2
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_policysplit.algorithms.advantages import (
    EPSILON,
    AdvantageBatch,
    Method,
    Selection,
    State,
    TokenSignals,
    centered,
    group_extremes,
    group_mean_std,
    in_mixed_groups,
    leave_one_out,
    with_advantage,
    zscore,
)
from megatron_policysplit.algorithms.methods import asym_grpo, dapo
from megatron_policysplit.config import key
from megatron_policysplit.config.keys import read_keys
from megatron_policysplit.errors import ConfigError
from megatron_policysplit.rows import MODES, Mode

CORRECTNESS = ("grpo", "dr_grpo", "rloo", "asym_grpo")


@dataclass(frozen=True)
class ModeOptions:
    """Values of a single mode, one entry of `modes`. A null falls back on the method's own key."""

    eta: float | None = key(None, "Scale of the bonus; below 0 it rewards likely tokens.")
    alpha: float | None = key(None, "Weight of the mode's own log-prob in the bonus.")
    kappa: float | None = key(None, "The bonus is clamped to |advantage| / kappa.", above=0.0)
    correctness: str | None = key(
        None, "Method whose advantage the bonus is added to.", choices=CORRECTNESS
    )
    beta_pos: float | None = key(None, "The key of asym_grpo.", minimum=0.0)
    beta_neg: float | None = key(None, "The key of asym_grpo.", minimum=0.0)


@dataclass(frozen=True)
class Options:
    alpha: float = key(0.5, "Weight of the mode's own log-prob in the bonus (Eq. 6).")
    eta: float = key(
        0.03, "Scale of the bonus (Eq. 3) in the high-entropy mode and in those of modes.others."
    )
    eta_schedule: str = key(
        "constant",
        "How eta moves to eta_end over the optimizer steps.",
        choices=("constant", "linear", "cosine"),
    )
    eta_end: float = key(0.0, "Scale of the bonus at the end of the schedule.")
    eta_steps: int = key(
        100,
        "Optimizer steps of the schedule. A whole run has "
        "train.steps * train.optimizer_steps_per_batch.",
        minimum=1,
    )
    eta_normal: float = key(0.0, "Scale of the bonus in the normal mode (the paper's ablation).")
    kappa: float = key(2.0, "The bonus is clamped to |advantage| / kappa (Eq. 3).", above=0.0)
    normalization: str = key(
        "zscore",
        "Normalisation of the bonus over the tokens of a group (Eq. 4): (b - mean) / std, "
        "(b - mean) / (max - min), or none.",
        choices=("zscore", "mean", "none"),
    )
    entropy_estimate: str = key(
        "logprob",
        "Surprise of a token: minus its log-prob, or the exact entropy at its position.",
        choices=("logprob", "entropy"),
    )
    variant: str = key(
        "paper",
        "`authors_code` sets clamp_order=code and double_bonus=true.",
        choices=("paper", "authors_code"),
    )
    clamp_order: str | None = key(
        None,
        "`paper` is eta*clip(B), `code` is clip(eta*B); null follows the variant.",
        choices=("paper", "code"),
    )
    double_bonus: bool | None = key(
        None, "Add the bonus twice, as the authors' code does; null follows the variant."
    )
    correctness: str = key(
        "grpo", "Method whose advantage the bonus is added to.", choices=CORRECTNESS
    )
    beta_pos: float = key(
        0.9, "Exponent of right answers with correctness=asym_grpo (see asym_grpo).", minimum=0.0
    )
    beta_neg: float = key(
        0.4, "Exponent of wrong answers with correctness=asym_grpo (see asym_grpo).", minimum=0.0
    )
    dynamic_sampling: bool = key(
        False,
        "Train questions with mixed grades only (see dapo); the responses of all modes count "
        "together.",
    )
    max_rounds: int = key(
        10,
        "Batches of questions drawn for one that is trained, at most, with "
        "dynamic_sampling=true (see dapo).",
        minimum=1,
    )
    modes: dict[str, Any] = key(
        dict,
        "Values of single modes, `MODE: {KEY: VALUE}`, with the keys eta, alpha, kappa, "
        "correctness, beta_pos and beta_neg.",
    )


def signals(batch: AdvantageBatch, options: Options, state: State) -> TokenSignals:
    """Advantages of the module's formula, with the eta of the state's optimizer step."""
    if options.eta_schedule != "constant":
        options = replace(options, eta=scheduled_eta(options, int(state["step"])))
    return TokenSignals(advantages(batch, options))


def scheduled_eta(options: Options, step: int) -> float:
    """eta of optimizer step `step`, counted from 0 at the start of the run."""
    progress = min(step / options.eta_steps, 1.0)
    if options.eta_schedule == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return options.eta + (options.eta_end - options.eta) * progress


def state_at(options: Options, step: int) -> State:
    """State of a run with an eta schedule at optimizer step `step`; {} for a constant eta.

    `signals` reads `step` alone; `eta` is in the state so that it is logged (method/eta).
    """
    if options.eta_schedule == "constant":
        return {}
    return {"step": float(step), "eta": scheduled_eta(options, step)}


def advantages(batch: AdvantageBatch, options: Options) -> Tensor:
    """A~ of every token, [T] fp32 and detached: A_i plus the bonus; 0 outside the mask."""
    per_token = correctness(batch, options)[batch.row_of_token]  # A_i
    return ((per_token + bonus(batch, per_token, options)) * batch.mask).detach()


def options_in(mode: str, options: Options) -> Options:
    """The options that hold in one mode: `eta_normal` as eta of the normal mode, then `modes`."""
    eta = {"eta": options.eta_normal} if mode == Mode.NORMAL.value else {}
    entry = vars(mode_options(mode, options))
    return replace(options, **eta | {name: v for name, v in entry.items() if v is not None})


def mode_options(mode: str, options: Options) -> ModeOptions:
    """The entry of `modes` for a mode. Raises ConfigError for an unknown key or a bad value."""
    if mode not in options.modes:
        return ModeOptions()
    return read_keys(
        ModeOptions, options.modes[mode], f"algorithm.options.policy_split.modes.{mode}.", "a mode"
    )


def check(options: Options, modes: Sequence[str]) -> None:
    """Raises ConfigError for an entry of `modes` that is not one of a run's modes."""
    for mode, entry in options.modes.items():
        name = f"algorithm.options.policy_split.modes.{mode}"
        if mode not in modes:
            raise ConfigError(
                f"{name}: the modes of this run are {', '.join(modes)}; name the mode in "
                "modes.others"
            )
        if not isinstance(entry, dict):
            raise ConfigError(
                f"{name}={entry} is not a mapping of keys to values, such as {{eta: 0.1}}"
            )
        mode_options(mode, options)  # raises for a bad key or value of the entry


def correctness(batch: AdvantageBatch, options: Options) -> Tensor:
    """A_i of every row, [R] fp32, by the method that `correctness` names for the row's mode."""
    result = torch.zeros_like(batch.rewards)
    for mode in dict.fromkeys(batch.modes):
        result = torch.where(
            batch.rows_in(mode), _correctness(batch, options_in(mode, options)), result
        )
    return result


def _correctness(batch: AdvantageBatch, options: Options) -> Tensor:
    if options.correctness == "asym_grpo":
        exponents = asym_grpo.Options(options.beta_pos, options.beta_neg)
        return asym_grpo.response_advantages(batch.rewards, batch.group, exponents)
    rule = {"grpo": zscore, "dr_grpo": centered, "rloo": leave_one_out}[options.correctness]
    return rule(batch.rewards, batch.group)


def bonus(batch: AdvantageBatch, correctness: Tensor, options: Options) -> Tensor:
    """What Policy Split adds to the correctness advantages of tokens, A~ - A_i; [T] fp32.

    correctness: [T] fp32, A_i of each token's response. Raises ValueError for a row that lacks a
    row of every other mode.
    """
    alpha, one_minus_alpha, eta, kappa = coefficients_by_token(batch, options)
    surprise = batch.entropy if options.entropy_estimate == "entropy" else -batch.logprobs
    group = batch.group[batch.row_of_token]

    # b of Eq. 6: surprise under the mode's own prompt, mixed with that under the other modes'.
    mixed = alpha * surprise + one_minus_alpha * batch.at_others(surprise)
    # B of Eq. 4: normalised over all trained tokens of the group.
    normalized = normalize(mixed, group, batch.mask, options.normalization)
    # |A_i| / kappa of Eq. 3: a response without an advantage gets no bonus.
    bound = correctness.abs() / kappa
    # Eq. 3, eta clip(B, -bound, bound); the authors' code clips after it scales.
    if clamp_order(options) == "paper":
        result = eta * normalized.clamp(-bound, bound)
    else:
        result = (eta * normalized).clamp(-bound, bound)
    return 2 * result if double_bonus(options) else result


def coefficients_by_token(
    batch: AdvantageBatch, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """alpha, 1 - alpha, eta and kappa of every token, [T] each, by the mode of its row."""
    by_mode = {mode: options_in(mode, options) for mode in dict.fromkeys(batch.modes)}
    by_row = [by_mode[mode] for mode in batch.modes]
    # 1 - alpha is computed in double precision and then rounded; in fp32 its last bit could differ.
    return (
        torch.tensor([row.alpha for row in by_row])[batch.row_of_token],
        torch.tensor([1 - row.alpha for row in by_row])[batch.row_of_token],
        torch.tensor([row.eta for row in by_row])[batch.row_of_token],
        torch.tensor([row.kappa for row in by_row])[batch.row_of_token],
    )


def normalize(values: Tensor, group: Tensor, mask: Tensor, method: str) -> Tensor:
    """`values` [T] normalised over the trained tokens of each group; 0 outside `mask` [T] bool.

    group: [T] int64. method: `zscore` is (x - mean) / (std + 1e-6) with the unbiased std, `mean` is
    (x - mean) / (max - min + 1e-6), `none` is x. Computed in fp64, returned in the values' dtype.
    """
    result = torch.zeros_like(values)
    trained, trained_group = values[mask], group[mask]
    if method == "none":
        result[mask] = trained
        return result
    mean, spread = group_mean_std(trained, trained_group)
    if method == "mean":
        highest, lowest = group_extremes(trained, trained_group)
        spread = (highest - lowest).double()
    result[mask] = ((trained.double() - mean) / (spread + EPSILON)).to(values.dtype)
    return result


def clamp_order(options: Options) -> str:
    """`paper` or `code`: the key `clamp_order` if set, otherwise that of `variant`."""
    return options.clamp_order or ("code" if options.variant == "authors_code" else "paper")


def double_bonus(options: Options) -> bool:
    """Whether the bonus counts twice: the key `double_bonus` if set, otherwise as in `variant`."""
    if options.double_bonus is None:
        return options.variant == "authors_code"
    return options.double_bonus


def live(rewards: Tensor, group: Tensor, options: Options) -> Tensor:
    """[R] bool: rows with an advantage; without one the bonus is 0 too, because its bound is."""
    rules = {options.correctness, *(entry.get("correctness") for entry in options.modes.values())}
    # asym_grpo has an advantage even for a row whose reward is the mean of its group.
    return (in_mixed_groups if "asym_grpo" in rules else with_advantage)(rewards, group, options)


METHOD = Method(
    signals,
    source="arXiv 2604.11510",
    options=Options,
    loss={"dual_clip": 3.0},
    sampling_modes=MODES,
    training_modes=MODES,
    other_modes=True,
    check=check,
    selection=lambda options: (
        Selection(dapo.mixed, options.max_rounds) if options.dynamic_sampling else None
    ),
    live=live,
    within_questions=True,
    engine_logprobs=lambda options: options.entropy_estimate != "entropy",
    begin=lambda options: state_at(options, 0),
    next_state=lambda state, batch, options: state_at(options, int(state.get("step", 0)) + 1),
)
