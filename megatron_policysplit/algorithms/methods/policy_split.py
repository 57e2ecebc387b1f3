"""Policy Split (arXiv 2604.11510): correctness for both modes, a clamped entropy bonus for the
high-entropy one.

For a response token t of response i in a group, under the training mode m, with m' the other mode:

    b[t]  = alpha * s_m[t] + (1 - alpha) * s_m'[t]                      Eq. 6; s is -log pi, or the
    exact entropy B[t]  = (b[t] - mean b) / (std b + 1e-6) over the group's tokens     Eq. 4 A~[t] =
    A_i + eta * clip(B[t], -|A_i| / kappa, +|A_i| / kappa)       Eq. 3, `clamp_order: paper` A~[t] =
    A_i + clip(eta * B[t], -|A_i| / kappa, +|A_i| / kappa)       `clamp_order: code`

eta is `eta` in the high-entropy mode and `eta_normal` (0 by default) in the normal mode. The
authors' released code clamps after scaling and, because two names share one tensor, adds the bonus
twice; `variant: authors_code` does both. A_i is GRPO's, or with `correctness` that of another
method.

The loss has a dual clip of 3 unless `algorithm.dual_clip` says otherwise. The paper's equation has
none; verl, on which the authors built, has it by default. With one optimizer step a batch all
ratios are 1 and it does nothing; with two, training broke without it in three of five runs of our
study (docs/study_results.md).

With `modes.others` there are more modes than two (not in the paper): every response is trained
under all of their prompts, s_m'[t] is the mean over the modes besides m, and eta is `eta` in every
mode but the normal one. What `modes` says of a mode wins there: {careful: {eta: -0.02, kappa: 4}}
is a mode that is rewarded for what is likely.

With an `eta_schedule` (not in the paper, where eta is constant) optimizer step k, from 0, has, with
x = min(k / eta_steps, 1), but in modes whose eta `modes` gives,

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
    """Of one mode, an entry of `modes`; null follows the method's own key."""

    eta: float | None = key(None, "Scale of the bonus; below 0 it rewards what is likely.")
    alpha: float | None = key(None, "Weight of the mode's own log-prob in the bonus.")
    kappa: float | None = key(None, "Clamp of the bonus.", above=0.0)
    correctness: str | None = key(
        None, "Whose advantage the bonus is added to.", choices=CORRECTNESS
    )
    beta_pos: float | None = key(None, "As of asym_grpo.", minimum=0.0)
    beta_neg: float | None = key(None, "As of asym_grpo.", minimum=0.0)


@dataclass(frozen=True)
class Options:
    alpha: float = key(0.5, "Weight of the mode's own log-prob in the bonus (Eq. 6).")
    eta: float = key(
        0.03, "Scale of the bonus in the high-entropy mode (Eq. 3) and in other modes."
    )
    eta_schedule: str = key(
        "constant",
        "How eta moves to eta_end by optimizer step.",
        choices=("constant", "linear", "cosine"),
    )
    eta_end: float = key(0.0, "Scale of the bonus at the end of the schedule.")
    eta_steps: int = key(
        100,
        "Optimizer steps of the schedule: train.steps * train.optimizer_steps_per_batch is a whole "
        "run.",
        minimum=1,
    )
    eta_normal: float = key(0.0, "Scale of the bonus in the normal mode (the paper's ablation).")
    kappa: float = key(2.0, "The bonus is clamped to |advantage| / kappa (Eq. 3).", above=0.0)
    normalization: str = key(
        "zscore",
        "Normalisation of the bonus over a question's tokens (Eq. 4).",
        choices=("zscore", "mean", "none"),
    )
    entropy_estimate: str = key(
        "logprob",
        "The bonus from the sampled token's surprisal, or from the exact entropy.",
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
        None, "Add the bonus twice, as the authors' code does; null: the variant."
    )
    correctness: str = key(
        "grpo",
        "Whose advantage the bonus is added to.",
        choices=CORRECTNESS,
    )
    beta_pos: float = key(0.9, "As of asym_grpo, with correctness=asym_grpo.", minimum=0.0)
    beta_neg: float = key(0.4, "As of asym_grpo, with correctness=asym_grpo.", minimum=0.0)
    dynamic_sampling: bool = key(
        False, "As of dapo; a question is mixed if its responses of all modes are."
    )
    max_rounds: int = key(10, "As of dapo, with dynamic_sampling=true.", minimum=1)
    modes: dict[str, Any] = key(
        dict,
        "Advantages of single modes, `MODE: {KEY: VALUE}` with the keys eta, alpha, kappa, "
        "correctness, beta_pos and "
        "beta_neg.",
    )


def signals(batch: AdvantageBatch, options: Options, state: State) -> TokenSignals:
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
    """Of a schedule, whose `step` it is that counts: eta is there to be logged. Without one there
    is none.
    """
    if options.eta_schedule == "constant":
        return {}
    return {"step": float(step), "eta": scheduled_eta(options, step)}


def advantages(batch: AdvantageBatch, options: Options) -> Tensor:
    """[T] fp32, 0 outside the mask. Nothing of it carries a gradient."""
    own = correctness(batch, options)[batch.row_of_token]
    return ((own + bonus(batch, own, options)) * batch.mask).detach()


def options_in(mode: str, options: Options) -> Options:
    """The options with `eta` that of the mode, and the others as `modes` has them."""
    given = {
        name: value
        for name, value in vars(mode_options(mode, options)).items()
        if value is not None
    }
    return replace(
        options, **({"eta": options.eta_normal} if mode == Mode.NORMAL.value else {}) | given
    )


def mode_options(mode: str, options: Options) -> ModeOptions:
    """What `modes` says of a mode. Raises ConfigError for a key or a value that it cannot have."""
    if mode not in options.modes:
        return ModeOptions()
    return read_keys(
        ModeOptions, options.modes[mode], f"algorithm.options.policy_split.modes.{mode}.", "a mode"
    )


def check(options: Options, modes: Sequence[str]) -> None:
    """Raises ConfigError for an entry of `modes` that is not one of a run's modes."""
    for mode, given in options.modes.items():
        name = f"algorithm.options.policy_split.modes.{mode}"
        if mode not in modes:
            raise ConfigError(
                f"{name}: the modes of this run are {', '.join(modes)}; name the mode in "
                "modes.others"
            )
        if not isinstance(given, dict):
            raise ConfigError(
                f"{name}={given} is not a mapping of keys to values, such as {{eta: 0.1}}"
            )
        mode_options(mode, options)


def correctness(batch: AdvantageBatch, options: Options) -> Tensor:
    """A_i of every row, [R] fp32, by the rule of its mode."""
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
    """[T] fp32: what Policy Split adds to the correctness advantage [T] of each token."""
    row, modes = (
        batch.row_of_token,
        {mode: options_in(mode, options) for mode in dict.fromkeys(batch.modes)},
    )
    alpha, rest, eta, kappa = (
        torch.tensor([value(modes[mode]) for mode in batch.modes])[row]
        for value in (lambda o: o.alpha, lambda o: 1 - o.alpha, lambda o: o.eta, lambda o: o.kappa)
    )
    surprise = batch.entropy if options.entropy_estimate == "entropy" else -batch.logprobs
    mixed = alpha * surprise + rest * batch.at_others(surprise)
    normalized = normalize(mixed, batch.group[row], batch.mask, options.normalization)

    bound = correctness.abs() / kappa
    if clamp_order(options) == "paper":
        result = eta * normalized.clamp(-bound, bound)
    else:
        result = (eta * normalized).clamp(-bound, bound)
    return 2 * result if double_bonus(options) else result


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


def clamp_order(options: Options) -> str:
    """`clamp_order` if given, otherwise what `variant` says."""
    return options.clamp_order or ("code" if options.variant == "authors_code" else "paper")


def double_bonus(options: Options) -> bool:
    """`double_bonus` if given, otherwise what `variant` says."""
    return (
        options.variant == "authors_code" if options.double_bonus is None else options.double_bonus
    )


def live(rewards: Tensor, group: Tensor, options: Options) -> Tensor:
    """[R] bool; asym_grpo has an advantage for every row of a group whose rewards differ."""
    rules = {options.correctness, *(given.get("correctness") for given in options.modes.values())}
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
