"""The numbers of a study: final measures and costs of its finished runs, compared by method."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_policysplit.config.schema import CONFIG_FILE
from megatron_policysplit.errors import DataError
from megatron_policysplit.reports.run_report import read_metrics
from megatron_policysplit.study.config import Study, StudyRun
from megatron_policysplit.study.intervals import CONFIDENCE, estimate
from megatron_policysplit.study.runner import State

# Measures that the report takes unless the study names its own, in this order.
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
    """A finished run and what it logged. Made by `finished_runs`."""

    run: StudyRun
    train: list[dict]  # training records of metrics.jsonl, by step
    evals: list[dict]  # evaluation records, by step
    responses: int | None  # sampled in each step; None where config.yaml is gone

    def final(self, measure: str) -> float | None:
        """The value of the last record with the measure; None without one or if not finite."""
        values = [record[measure] for record in (*self.train, *self.evals) if measure in record]
        return values[-1] if values else None

    def costs(self) -> dict[str, float]:
        """Means over the training steps after the first, which warms up.

        <phase>_s: seconds of every phase.
        generation_share: the part of the step's time that generation takes.
        score_update_ms_per_response: milliseconds of scoring and updating per sampled response.
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
    """The finished runs with their records. Raises DataError for files that are damaged or gone."""
    state = State(study)
    runs = []
    for run in study.runs:
        if state.finished(run):
            train, evals = read_metrics(run.directory)
            runs.append(Finished(run, train, evals, _responses(run.directory / CONFIG_FILE)))
    return runs


def study_numbers(study: Study, runs: list[Finished]) -> dict[str, Any]:
    """What report.json holds. Only finished runs count.

    runs: run's name -> state and, by state, steps or error.
    measures: measure -> method -> {values by seed, estimate, difference}.
    costs: cost -> method -> {values by seed, estimate, ratio}.
    curves: measure -> method -> {steps of the evaluations, values of every seed at them}; None is
    not measured.

    difference and ratio are to the baseline. They are taken seed by seed where both runs have
    finished, then averaged with an interval; None for the baseline itself and where no seed is
    shared. Raises DataError for a measure of the study that no run has logged.
    """
    # `name=name`: else every function would see the last name of the loop.
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
        "interval": "Student's t, of the mean over seeds; differences and ratios are paired by "
        "seed",
        "runs": _states(study, runs),
        "measures": _comparisons(
            measures, study.baseline, "difference", lambda value, base: value - base
        ),
        "costs": _comparisons(
            by_cost, study.baseline, "ratio", lambda value, base: value / base if base else None
        ),
        "curves": {
            name: _curves(runs, name) for name in logged_names(runs) if re.fullmatch(CURVES, name)
        },
    }


def table(numbers: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`study_numbers` as rows of a flat table, for report.csv."""
    rows = []
    for kind, comparison in (("measures", "difference"), ("costs", "ratio")):
        for name, methods in numbers[kind].items():
            for method, figures in methods.items():
                row = {"kind": kind.removesuffix("s"), "name": name, "method": method}
                row |= _flat(figures["estimate"], "")
                row |= {"compared_by": comparison, **_flat(figures[comparison], "compared_")}
                row |= {f"seed_{seed}": value for seed, value in figures["values"].items()}
                rows.append(row)
    return rows


def _flat(estimate: dict | None, prefix: str) -> dict[str, Any]:
    """The columns of an estimate, empty where there is none."""
    keys = ("n", "mean", "low", "high")
    return {prefix + key: None if estimate is None else estimate[key] for key in keys}


def _by_method(
    runs: list[Finished], value: Callable[[Finished], float | None]
) -> dict[str, dict[int, float]]:
    """method -> seed -> value, of the runs that have a value."""
    result: dict[str, dict[int, float]] = {}
    for run in runs:
        if (number := value(run)) is not None:
            result.setdefault(run.run.method, {})[run.run.seed] = number
    return result


def _comparisons(
    measured: dict[str, dict[str, dict[int, float]]],
    baseline: str,
    name: str,
    compare: Callable[[float, float], float | None],
) -> dict[str, Any]:
    """measure -> method -> {values by seed, estimate, `name`: the comparison with the baseline}.

    Args:
        measured: measure -> method -> seed -> value.
        baseline: the method that the others are compared with.
        name: what the comparison is called.
        compare: two values of a seed, a method's and the baseline's -> their comparison, if any.
    """
    result: dict[str, Any] = {}
    for measure, methods in measured.items():
        base = methods.get(baseline, {})
        result[measure] = {}
        for method, values in methods.items():
            pairs = [compare(value, base[seed]) for seed, value in values.items() if seed in base]
            by_seed = [] if method == baseline else [pair for pair in pairs if pair is not None]
            result[measure][method] = {
                "values": values,
                "estimate": asdict(estimate(list(values.values()))),
                name: asdict(estimate(by_seed)) if by_seed else None,
            }
    return result


def _measures(study: Study, runs: list[Finished]) -> list[str]:
    """The measures to compare: the study's own, else those of SHOWN, mode by mode.

    Raises DataError for a measure of the study that no finished run has logged.
    """
    records = (record for run in runs for record in (*run.train, *run.evals))
    logged = list(dict.fromkeys(name for record in records for name in record))
    if study.measures:
        for name in study.measures:
            if runs and name not in logged:
                evals = sorted(n for n in logged if n.startswith("eval/"))
                shown = ", ".join((evals or sorted(logged))[:5]) or "none at all"
                raise DataError(
                    f"measures names {name}, which no finished run has logged; there are {shown}"
                    + " and others" * (len(logged) > 5)
                )
        return [name for name in study.measures if name in logged]
    groups = list(dict.fromkeys(name.split("/")[1] for name in logged if name.startswith("eval/")))
    measures = []
    for group in groups:
        for pattern in SHOWN:
            matches = re.compile(rf"eval/{re.escape(group)}/{pattern}").fullmatch
            measures += sorted(filter(matches, logged), key=_natural_order)
    return measures


def logged_names(runs: list[Finished]) -> list[str]:
    """The names of all metrics in the runs' evaluations, in the order of first appearance."""
    return list(dict.fromkeys(name for run in runs for record in run.evals for name in record))


def _curves(runs: list[Finished], name: str) -> dict[str, dict[str, Any]]:
    """method -> {steps, values: seed -> one value a step}, of the methods that logged `name`."""
    result = {}
    for method in dict.fromkeys(run.run.method for run in runs):
        series = {
            run.run.seed: {record["step"]: record.get(name) for record in run.evals}
            for run in runs
            if run.run.method == method and any(name in record for record in run.evals)
        }
        if series:
            steps = sorted({step for by_step in series.values() for step in by_step})
            values = {
                seed: [by_step.get(step) for step in steps] for seed, by_step in series.items()
            }
            result[method] = {"steps": steps, "values": values}
    return result


def _natural_order(name: str) -> list:
    """A key to sort names by, with the numbers in them as numbers: pass_at_8 before pass_at_16."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _states(study: Study, runs: list[Finished]) -> dict[str, dict[str, Any]]:
    """Run's name -> its state: finished with its steps, failed with its error, or unfinished."""
    state, finished = State(study), {run.run.name: run for run in runs}
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
    """Responses sampled in a step, questions of a batch times samples of a question.

    path: the run's config.yaml; None where it is not there.
    """
    import yaml

    if not path.exists():
        return None
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        return config["data"]["batch_questions"] * config["rollout"]["samples_per_question"]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not the configuration of a run ({type(error).__name__}: {error}); restore "
            "it, or delete it to have a report without the costs of a response"
        ) from error
