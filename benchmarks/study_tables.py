"""Prints the tables of docs/study_results.md from a study's report.json.

    python -m benchmarks.study_tables [benchmarks/results/study/report.json]

Every cell is a mean over seeds with its 95% interval, as the study's report has it; where the
heading says so, with the lowest to the highest seed instead. `unique` is the number of different
right answers among a question's samples.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

RESULT = Path("benchmarks/results/study/report.json")
ENTROPY, ACCURACY = "eval/normal/entropy_nats", "eval/normal/accuracy"
OVERVIEW = {  # measure -> heading
    ACCURACY: "accuracy",
    "eval/high_entropy/accuracy": "accuracy, high-entropy",
    ENTROPY: "entropy",
    "eval/high_entropy/entropy_nats": "entropy, high-entropy",
    "eval/high_entropy/kl_nats": "KL",
    "eval/normal/unique_correct": "unique",
    "eval/high_entropy/unique_correct": "unique, high-entropy",
}
TARGETS = ("aepo_0.25", "aepo_0.5", "aepo_0.75", "scope_0.25", "scope_0.5", "scope_0.75")
TWO_STEPS = (
    "grpo_two_steps",
    "kl_cov",
    "policy_split_two_steps",
    "policy_split_two_steps_no_dual_clip",
)
SPLIT = (
    "grpo",
    "policy_split_eta_0",
    "policy_split",
    "policy_split_paper",
    "policy_split_on_asym_grpo",
)
PROMPTS = {
    "normal": "none",
    "high_entropy": "explore widely",
    "rewritten": "widely explore",
    "unrelated": "please think",
}

Report = dict[str, Any]


def tables(report: Report) -> dict[str, list[str]]:
    """All tables of the report: title -> lines of a Markdown table."""
    return {
        "every method": overview(report),
        "differences to GRPO": differences(report),
        "before training": before(report),
        "over training": over_training(report, report["measures"][ENTROPY]),
        "modes": split(report),
        "targets": targets(report),
        "two optimizer steps": two_steps(report),
        "prompts": prompts(report),
        "best of k": best_of(report),
    }


def interval(estimate: dict | None, sign: str = "") -> str:
    """Format an estimate of the report as `mean [low, high]`; None as a dash."""
    if estimate is None:
        return "-"
    mean, low, high = estimate["mean"], estimate["low"], estimate["high"]
    if low is None:  # a single seed has no interval
        return f"{mean:{sign}.2f}"
    return f"{mean:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]"


def spread(values: list[float]) -> str:
    """Format values of several seeds as `mean (lowest to highest)`."""
    return f"{statistics.fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def overview(report: Report) -> list[str]:
    """Every measure of every method after training."""
    methods = report["measures"][ACCURACY]
    lines = header(["method", "seeds", *OVERVIEW.values()])
    for method, result in methods.items():
        cells = [
            interval(report["measures"][measure].get(method, {}).get("estimate"))
            for measure in OVERVIEW
        ]
        lines.append(row([f"`{method}`", str(result["estimate"]["n"]), *cells]))
    return lines


def differences(report: Report) -> list[str]:
    """Every measure's difference to the baseline, seed by seed."""
    lines = header(["method", *OVERVIEW.values()])
    for method in report["measures"][ACCURACY]:
        cells = [
            interval(report["measures"][measure][method]["difference"], "+") for measure in OVERVIEW
        ]
        if method != report["baseline"]:
            lines.append(row([f"`{method}`", *cells]))
    return lines


def before(report: Report) -> list[str]:
    """Measures of the warmed-up models, from the baseline's evaluation at step 0.

    All runs of a seed start from the same model.
    """
    measures = [*OVERVIEW, "eval/normal/kl_nats"]
    starts = {measure: at_step(report, measure, report["baseline"], 0) for measure in measures}
    lines = header(["before training", "mean (lowest to highest seed)"])
    names = {**OVERVIEW, "eval/normal/kl_nats": "KL(normal \\|\\| high-entropy)"}
    return [*lines, *(row([names[measure], spread(values)]) for measure, values in starts.items())]


def over_training(report: Report, methods) -> list[str]:
    """Entropy of the normal mode at every evaluation, and the accuracy at the end."""
    steps = report["curves"][ENTROPY][report["baseline"]]["steps"]
    lines = header(["method", *(f"entropy at {step}" for step in steps), "accuracy at the end"])
    for method in methods:
        cells = [
            f"{statistics.fmean(at_step(report, ENTROPY, method, step)):.2f}" for step in steps
        ]
        accuracy = report["measures"][ACCURACY][method]["values"].values()
        lines.append(row([f"`{method}`", *cells, spread(list(accuracy))]))
    return lines


def split(report: Report) -> list[str]:
    """Both modes of GRPO and of the variants of Policy Split, and the KL between the modes."""
    measures = [
        measure for measure in OVERVIEW if "entropy_nats" not in measure and "kl" not in measure
    ]
    names = [
        *(OVERVIEW[measure] for measure in measures),
        "KL",
        "KL, mean over training",
        "KL, each seed",
    ]
    lines = header(["method", *names])
    kl = "eval/high_entropy/kl_nats"
    for method in SPLIT:
        cells = [interval(report["measures"][measure][method]["estimate"]) for measure in measures]
        curves = report["curves"][kl][method]["values"].values()
        # Without the evaluation before training.
        means = [statistics.fmean(values[1:]) for values in curves]
        ends = report["measures"][kl][method]
        each = ", ".join(f"{value:.2f}" for value in ends["values"].values())
        lines.append(row([f"`{method}`", *cells, interval(ends["estimate"]), spread(means), each]))
    return lines


def targets(report: Report) -> list[str]:
    """Entropy of the last two evaluations against the target in the method's name."""
    last = report["curves"][ENTROPY][report["baseline"]]["steps"][-2:]
    entropies = [f"entropy at {step}" for step in last]
    lines = header(["method", "target", *entropies, "accuracy at the end", "unique"])
    for method in TARGETS:
        cells = [spread(at_step(report, ENTROPY, method, step)) for step in last]
        ends = [
            report["measures"][m][method]["estimate"]
            for m in (ACCURACY, "eval/normal/unique_correct")
        ]
        lines.append(row([f"`{method}`", method.rpartition("_")[2], *cells, *map(interval, ends)]))
    return lines


def two_steps(report: Report) -> list[str]:
    """Methods with two optimizer steps per batch, every seed for itself."""
    measures = (ACCURACY, "eval/high_entropy/accuracy", "eval/high_entropy/kl_nats")
    lines = header(["method", *(f"{OVERVIEW[measure]}, each seed" for measure in measures)])
    for method in TWO_STEPS:
        values = [report["measures"][measure][method]["values"].values() for measure in measures]
        cells = [", ".join(f"{value:.2f}" for value in seeds) for seeds in values]
        lines.append(row([f"`{method}`", *cells]))
    return lines


def prompts(report: Report) -> list[str]:
    """Three methods behind the training prompts and behind prompts they were not trained with."""
    lines = header(["method", "system prompt", "accuracy", "entropy", "unique"])
    for method in SPLIT[:3]:
        for group, prompt in PROMPTS.items():
            names = [
                f"eval/{group}/{leaf}" for leaf in ("accuracy", "entropy_nats", "unique_correct")
            ]
            cells = [interval(report["measures"][name][method]["estimate"]) for name in names]
            lines.append(row([f"`{method}`", prompt, *cells]))
    return lines


def best_of(report: Report) -> list[str]:
    """pass@k of both modes, for every k of the report."""
    ks = sorted(
        int(name.rpartition("_")[2])
        for name in report["measures"]
        if name.startswith("eval/high_entropy/pass_at_")
    )
    lines = header(["method", "mode", *(f"pass@{k}" for k in ks)])
    for method in SPLIT:
        for mode in ("normal", "high_entropy"):
            results = [report["measures"][f"eval/{mode}/pass_at_{k}"][method] for k in ks]
            cells = [f"{result['estimate']['mean']:.3f}" for result in results]
            lines.append(row([f"`{method}`", mode.replace("_", "-"), *cells]))
    return lines


def at_step(report: Report, measure: str, method: str, step: int) -> list[float]:
    """The measure at one evaluation, of every seed."""
    curve = report["curves"][measure][method]
    return [values[curve["steps"].index(step)] for values in curve["values"].values()]


def header(names: list[str]) -> list[str]:
    """The first two lines of a Markdown table."""
    return [row(names), "|" + "---|" * len(names)]


def row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path, nargs="?", default=RESULT)
    report = json.loads(parser.parse_args().report.read_text())
    for title, lines in tables(report).items():
        print(f"## {title}\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
