"""What a study found: final measures and costs of its finished runs, and how methods differ from
the baseline.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_policysplit.config.load import CONFIG_FILE
from megatron_policysplit.errors import DataError
from megatron_policysplit.reports.run_report import read_metrics
from megatron_policysplit.study.config import Study, StudyRun
from megatron_policysplit.study.intervals import CONFIDENCE, estimate
from megatron_policysplit.study.runner import State

SHOWN = (
    r"accuracy",
    r"pass_at_\d+",
    r"best_of_\d+",
    r"unique_correct",
    r"entropy_nats",
    r"kl_nats",
    r"distinct_\d+",
    r"ngram_diversity_\d+",
    r"self_bleu_diversity",
)
CURVES = r"eval/[^/]+/(accuracy|entropy_nats|kl_nats|unique_correct|best_of_\d+)"
PHASES = ("step", "generate", "reward", "wait", "score", "update", "sync")


@dataclass
class Finished:
    """A finished run: its records, and responses sampled a step (None where config.yaml is not
    there).
    """

    run: StudyRun
    train: list[dict]
    evals: list[dict]
    responses: int | None

    def final(self, measure: str) -> float | None:
        """The value of the last record that has the measure; None if none has or it was not finite
        there.
        """
        found = [record[measure] for record in (*self.train, *self.evals) if measure in record]
        return found[-1] if found else None

    def costs(self) -> dict[str, float]:
        """Means over the training steps after the first, which warms up.

        Seconds of every phase; generation_share: of the step; score_update_ms_per_response:
        milliseconds of scoring and updating for every sampled response.
        """
        records = self.train[1:] or self.train
        costs = {}
        for phase in PHASES:
            values = [v for record in records if (v := record.get(f"time/{phase}_s")) is not None]
            if values:
                costs[f"{phase}_s"] = statistics.fmean(values)
        if costs.get("step_s") and "generate_s" in costs:
            costs["generation_share"] = costs["generate_s"] / costs["step_s"]
        if self.responses and "score_s" in costs and "update_s" in costs:
            costs["score_update_ms_per_response"] = (
                1000 * (costs["score_s"] + costs["update_s"]) / self.responses
            )
        return costs


def finished_runs(study: Study) -> list[Finished]:
    """The finished runs' records. Raises DataError for files that are damaged or gone."""
    state = State(study)
    found = []
    for run in study.runs:
        if state.finished(run):
            train, evals = read_metrics(run.directory)
            found.append(Finished(run, train, evals, _responses(run.directory / CONFIG_FILE)))
    return found


def study_numbers(study: Study, runs: list[Finished]) -> dict[str, Any]:
    """What report.json holds. Only finished runs count.

    curves: measure -> method -> steps of the evaluations, values of every seed at them (None: not
    measured).
    measures: measure -> method -> {values by seed, estimate, difference}; costs: cost -> method ->
    {values by seed, estimate, ratio}. difference and ratio: to the baseline, seed by seed where
    both have finished, then their mean and interval; None for the baseline itself and where no seed
    is shared. Raises DataError for a measure of the study that no run has logged.
    """
    measures = {
        name: _by_method(runs, lambda run, name=name: run.final(name))
        for name in _measures(study, runs)
    }
    costs = {id(run): run.costs() for run in runs}
    names = dict.fromkeys(name for cost in costs.values() for name in cost)
    by_cost = {
        name: _by_method(runs, lambda run, name=name: costs[id(run)].get(name)) for name in names
    }
    return {
        "config": study.config,
        "baseline": study.baseline,
        "at_once": study.at_once,
        "confidence": CONFIDENCE,
        "interval": "Student's t, of the mean over seeds; differences and ratios are paired by seed",
        "runs": _states(study, runs),
        "measures": _compared(measures, study.baseline, "difference", lambda own, base: own - base),
        "costs": _compared(
            by_cost, study.baseline, "ratio", lambda own, base: own / base if base else None
        ),
        "curves": {
            name: _curves(runs, name) for name in logged_names(runs) if re.fullmatch(CURVES, name)
        },
    }


def table(numbers: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`study_numbers` as rows of a flat table, for report.csv."""
    rows = []
    for kind, compared in (("measures", "difference"), ("costs", "ratio")):
        for name, methods in numbers[kind].items():
            for method, found in methods.items():
                row = {
                    "kind": kind.removesuffix("s"),
                    "name": name,
                    "method": method,
                    **_flat(found["estimate"], ""),
                }
                row |= {"compared_by": compared, **_flat(found[compared], "compared_")}
                rows.append(
                    row | {f"seed_{seed}": value for seed, value in found["values"].items()}
                )
    return rows


def _flat(found: dict | None, prefix: str) -> dict[str, Any]:
    return {
        prefix + key: None if found is None else found[key] for key in ("n", "mean", "low", "high")
    }


def _by_method(
    runs: list[Finished], value: Callable[[Finished], float | None]
) -> dict[str, dict[int, float]]:
    """method -> seed -> value, where there is one."""
    result: dict[str, dict[int, float]] = {}
    for run in runs:
        if (found := value(run)) is not None:
            result.setdefault(run.run.method, {})[run.run.seed] = found
    return result


def _compared(
    measured: dict[str, dict[str, dict[int, float]]],
    baseline: str,
    name: str,
    compare: Callable[[float, float], float | None],
) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for measure, methods in measured.items():
        base = methods.get(baseline, {})
        result[measure] = {}
        for method, values in methods.items():
            pairs = [compare(value, base[seed]) for seed, value in values.items() if seed in base]
            other = [] if method == baseline else [pair for pair in pairs if pair is not None]
            result[measure][method] = {
                "values": values,
                "estimate": asdict(estimate(list(values.values()))),
                name: asdict(estimate(other)) if other else None,
            }
    return result


def _measures(study: Study, runs: list[Finished]) -> list[str]:
    logged = list(
        dict.fromkeys(
            name for run in runs for record in (*run.train, *run.evals) for name in record
        )
    )
    if study.measures:
        for name in study.measures:
            if runs and name not in logged:
                evals = ", ".join(sorted(n for n in logged if n.startswith("eval/"))[:5])
                raise DataError(
                    f"measures names {name}, which no finished run has logged; there are {evals} "
                    "and others"
                )
        return [name for name in study.measures if name in logged]
    groups = list(dict.fromkeys(name.split("/")[1] for name in logged if name.startswith("eval/")))
    return [
        name
        for group in groups
        for pattern in SHOWN
        for name in sorted(
            filter(re.compile(rf"eval/{re.escape(group)}/{pattern}").fullmatch, logged),
            key=_natural,
        )
    ]


def logged_names(runs: list[Finished]) -> list[str]:
    """Names that some run's evaluations have, in their order."""
    return list(dict.fromkeys(name for run in runs for record in run.evals for name in record))


def _curves(runs: list[Finished], name: str) -> dict[str, dict[str, Any]]:
    """method -> {steps, values: seed -> one a step}, of the methods that have logged it."""
    result = {}
    for method in dict.fromkeys(run.run.method for run in runs):
        series = {
            run.run.seed: {record["step"]: record.get(name) for record in run.evals}
            for run in runs
            if run.run.method == method and any(name in record for record in run.evals)
        }
        if series:
            steps = sorted({step for one in series.values() for step in one})
            values = {seed: [one.get(step) for step in steps] for seed, one in series.items()}
            result[method] = {"steps": steps, "values": values}
    return result


def _natural(name: str) -> list:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _states(study: Study, runs: list[Finished]) -> dict[str, dict[str, Any]]:
    state, finished = State(study), {one.run.name: one for one in runs}
    result = {}
    for run in study.runs:
        error = state.error(run)
        if run.name in finished:
            records = finished[run.name].train
            result[run.name] = {
                "state": "finished",
                "steps": max((r["step"] for r in records), default=0),
            }
        elif error is not None:
            result[run.name] = {"state": "failed", "error": error}
        else:
            result[run.name] = {"state": "unfinished"}
    return result


def _responses(path: Path) -> int | None:
    """Responses sampled a step: questions of a batch times samples of a question."""
    import yaml

    if not path.exists():
        return None
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    return config["data"]["batch_questions"] * config["rollout"]["samples_per_question"]
