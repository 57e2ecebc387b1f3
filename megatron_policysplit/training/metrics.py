"""What a batch of graded, scored rows says: per mode, and between the modes. Entropies and KL in
nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from megatron_policysplit.algorithms.advantages import TokenStatistics
from megatron_policysplit.evaluation.measures import answer_measures, variety_measures
from megatron_policysplit.rows import RIGHT, Mode, Rollout, Row, modes_in


def mode_metrics(
    rows: Sequence[Row], statistics: Sequence[TokenStatistics], mode: Mode
) -> dict[str, float]:
    """Of what `mode` sampled, under its own prompt; {} if it sampled nothing.

    reward, accuracy, truncated_share: means over responses. response_tokens: mean length. Means
    over the tokens of scored responses, left out where none is: entropy_nats (also in bits, the
    paper's unit), kl_nats (this mode || normal, of the normal mode || high-entropy).
    """
    own = [
        (row.rollout, s)
        for row, s in zip(rows, statistics, strict=True)
        if row.mode == mode and row.on_policy
    ]
    if not own:
        return {}
    rollouts = [rollout for rollout, _ in own]
    result = {
        "reward": _mean([rollout.reward for rollout in rollouts]),
        "accuracy": _mean([rollout.reward > RIGHT for rollout in rollouts]),
        "response_tokens": _mean([len(rollout.tokens) for rollout in rollouts]),
        "truncated_share": _mean([rollout.finish_reason == "length" for rollout in rollouts]),
    }
    kl = mode_divergences(rows, statistics, mode)
    if entropies := [s.entropy for _, s in own if s.scored]:
        nats = float(torch.cat(entropies).mean())
        result |= {"entropy_nats": nats, "entropy_bits": nats / math.log(2)}
    if (to := (Mode.HIGH_ENTROPY if mode == Mode.NORMAL else Mode.NORMAL).value) in kl:
        result["kl_nats"] = kl[to]
    return result


def mode_divergences(
    rows: Sequence[Row], statistics: Sequence[TokenStatistics], mode: Mode
) -> dict[str, float]:
    """Mean over the tokens of what `mode` sampled of KL(mode || other), nats, by the names of the
    others scored.
    """
    found: dict[str, list[torch.Tensor]] = {}
    for row, s in zip(rows, statistics, strict=True):
        if row.mode == mode and row.on_policy:
            for name, values in s.kl.items():
                found.setdefault(name, []).append(values)
    return {name: float(torch.cat(values).mean()) for name, values in sorted(found.items())}


def training_metrics(
    rows: Sequence[Row], statistics: Sequence[TokenStatistics], live: Sequence[bool]
) -> dict:
    """Flat names for the logs: per mode, KL both ways, agreement of engine and actor, skipped rows."""
    result: dict[str, float] = {}
    for mode in modes_in(rows):
        metrics = mode_metrics(rows, statistics, mode)
        metrics.pop("kl_nats", None)
        for other, kl in mode_divergences(rows, statistics, mode).items():
            result[f"kl/{mode.value}_to_{other}"] = kl
        result |= {f"{mode.value}/{name}": value for name, value in metrics.items()}
    differences = [
        (s.logprobs - torch.tensor(row.rollout.engine_logprobs)).abs()
        for row, s in zip(rows, statistics, strict=True)
        if row.on_policy and s.scored
    ]
    if differences:
        result["actor/engine_logprob_difference"] = float(torch.cat(differences).mean())
    result["actor/skipped_rows"] = float(len(live) - sum(live))
    result["actor/rows"] = float(len(live))
    result["reward/errors"] = float(
        sum(row.rollout.reward_error is not None for row in rows if row.on_policy)
    )
    return result


def evaluation_metrics(
    rows: Sequence[Row],
    statistics: Sequence[TokenStatistics],
    text: Callable[[Rollout], str],
    samples: int,
    *,
    variety: bool = False,
) -> dict[str, float]:
    """`eval/<mode>/...`: mode_metrics, and of the `samples` responses to each question
    `answer_measures`.

    variety: `variety_measures` of their texts, too.
    """
    result: dict[str, float] = {}
    for mode in modes_in(rows):
        per_question: dict[int, list[tuple[str, bool]]] = {}
        for row in rows:
            if row.mode == mode and row.on_policy:
                answer = (text(row.rollout), row.rollout.reward > RIGHT)
                per_question.setdefault(row.rollout.question, []).append(answer)
        if not per_question:
            continue
        metrics = mode_metrics(rows, statistics, mode)
        metrics |= answer_measures(list(per_question.values()), samples)
        if variety:
            metrics |= variety_measures(
                [[text for text, _ in answers] for answers in per_question.values()]
            )
        result |= {f"eval/{mode.value}/{name}": value for name, value in metrics.items()}
    return result


def prompt_metrics(
    name: str,
    rows: Sequence[Row],
    statistics: Sequence[TokenStatistics],
    text: Callable[[Rollout], str],
    samples: int,
    *,
    variety: bool = False,
) -> dict[str, float]:
    """`eval/<name>/...`: `evaluation_metrics` of what was sampled under another prompt, as the
    normal mode samples.
    """
    found = evaluation_metrics(rows, statistics, text, samples, variety=variety)
    return {
        f"eval/{name}/" + key.removeprefix(f"eval/{Mode.NORMAL.value}/"): value
        for key, value in found.items()
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
