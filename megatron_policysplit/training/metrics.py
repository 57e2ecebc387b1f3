"""Metrics of a batch of graded and scored rows: per mode, and between the modes.

Entropies and KL are in nats. `statistics` are the actor's, one entry per row.
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
    """Metrics of the responses that `mode` sampled, under its own prompt; {} if there are none.

    reward, accuracy, truncated_share: means over responses.
    response_tokens: mean length.
    entropy_nats, entropy_bits (the paper's unit): mean over the tokens of scored responses.
    kl_nats: mean over these tokens of KL(this mode || normal); KL(normal || high-entropy) for the
    normal mode.

    Entropy and KL are left out where no response is scored.
    """
    pairs = [
        (row.rollout, s)
        for row, s in zip(rows, statistics, strict=True)
        if row.mode == mode and row.on_policy
    ]
    if not pairs:
        return {}
    rollouts = [rollout for rollout, _ in pairs]
    result = {
        "reward": _mean([rollout.reward for rollout in rollouts]),
        "accuracy": _mean([rollout.reward > RIGHT for rollout in rollouts]),
        "response_tokens": _mean([len(rollout.tokens) for rollout in rollouts]),
        "truncated_share": _mean([rollout.finish_reason == "length" for rollout in rollouts]),
    }
    kl = mode_divergences(rows, statistics, mode)
    if entropies := [s.entropy for _, s in pairs if s.scored]:
        nats = float(torch.cat(entropies).mean())
        result |= {"entropy_nats": nats, "entropy_bits": nats / math.log(2)}
    counterpart = (Mode.HIGH_ENTROPY if mode == Mode.NORMAL else Mode.NORMAL).value
    if counterpart in kl:
        result["kl_nats"] = kl[counterpart]
    return result


def mode_divergences(
    rows: Sequence[Row], statistics: Sequence[TokenStatistics], mode: Mode
) -> dict[str, float]:
    """Mean of KL(mode || other) in nats, by the other modes' names, sorted.

    The mean is over the tokens of the responses that `mode` sampled and that were scored under the
    other mode's prompt too.
    """
    by_mode: dict[str, list[torch.Tensor]] = {}
    for row, s in zip(rows, statistics, strict=True):
        if row.mode == mode and row.on_policy:
            for name, values in s.kl.items():
                by_mode.setdefault(name, []).append(values)
    return {name: float(torch.cat(values).mean()) for name, values in sorted(by_mode.items())}


def training_metrics(
    rows: Sequence[Row], statistics: Sequence[TokenStatistics], live: Sequence[bool]
) -> dict:
    """Metrics of a training batch under the flat names of the logs.

    `<mode>/...` (`mode_metrics`), `kl/<mode>_to_<other>` (`mode_divergences`), the difference of
    engine and actor, and counts of rows and of failed rewards. live: whether each row is trained.
    """
    result: dict[str, float] = {}
    for mode in modes_in(rows):
        metrics = mode_metrics(rows, statistics, mode)
        metrics.pop("kl_nats", None)  # in `kl/...`, in both directions
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
    """Metrics of an evaluation as `eval/<mode>/...`: `mode_metrics` and `answer_measures`.

    Args:
        rows: those of the evaluation's rollouts.
        statistics: the actor's, one entry per row.
        text: the response text of a rollout.
        samples: responses to each question in each mode.
        variety: whether to add `variety_measures` of the texts.
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
    """`evaluation_metrics` of the responses under a prompt of eval.prompts, as `eval/<name>/...`.

    Their rows carry the normal mode, whose sampling settings such prompts use.
    """
    metrics = evaluation_metrics(rows, statistics, text, samples, variety=variety)
    return {
        f"eval/{name}/" + key.removeprefix(f"eval/{Mode.NORMAL.value}/"): value
        for key, value in metrics.items()
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
