"""What a run did: its metrics read back, curves, a summary, and one self-contained HTML page."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_policysplit.config.load import CONFIG_FILE
from megatron_policysplit.config.modes import MODE_LABELS, mode_label
from megatron_policysplit.errors import DataError
from megatron_policysplit.logs import without_secrets
from megatron_policysplit.logs.jsonl import read_jsonl, read_metrics_file
from megatron_policysplit.reports.page import PAGE
from megatron_policysplit.rows import MODES

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

MODE_LINES = {"normal": "-", "high_entropy": (0, (4, 2))}
OTHER_LINES = ((0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (5, 1.5, 1, 1.5, 1, 1.5)))
SUMMARY_METRICS = ("accuracy", "entropy_nats", "kl_nats", "unique_correct")
PANELS = (
    ("accuracy", "Accuracy", "share of right answers"),
    ("entropy_nats", "Entropy", "nats per token"),
    ("unique_correct", "Unique right answers", "per question"),
    ("kl_nats", "KL between the modes", "nats per token"),
)
SAMPLE_QUESTIONS, SAMPLES_PER_MODE, SAMPLE_CHARACTERS = 3, 4, 1500


def read_metrics(run_dir: str | Path) -> tuple[list[dict], list[dict]]:
    """(training records, evaluation records) of a run, each sorted by `step`; a value that was not
    finite is None.

    Raises DataError naming the file when it is missing, empty or damaged.
    """
    path = Path(run_dir) / "metrics.jsonl"
    if not path.exists():
        inside = sorted(str(found.parent) for found in Path(run_dir).glob("*/metrics.jsonl"))
        if inside:
            raise DataError(
                f"{run_dir} is not a run but holds runs; give one or more of them: "
                f"{' '.join(inside)}"
            )
        raise DataError(
            f"{path} does not exist; give the directory of a run (run.dir) that has started"
        )
    records = sorted(read_metrics_file(path), key=lambda record: record["step"])
    if not records:
        raise DataError(f"{path} holds no metrics yet; wait for the run's first step or evaluation")
    return [r for r in records if r["kind"] == "train"], [r for r in records if r["kind"] == "eval"]


def summary(runs: Mapping[str, str | Path], seconds: Mapping[str, float]) -> dict:
    """The first and the last evaluation of every run.

    Returns {"runs": {name: {mode: {"first": E, "last": E}}}, "seconds": {phase: seconds}} where E
    has `accuracy`, `entropy_nats`, `kl_nats`, `unique_correct` and `best_of_<k>`; None is not
    measured. Raises DataError for a run without an evaluation.
    """
    result = {}
    for name, run_dir in runs.items():
        _, evals = read_metrics(run_dir)
        if not evals:
            raise DataError(
                f"{Path(run_dir) / 'metrics.jsonl'} holds no evaluation; set eval.path and run "
                "again"
            )
        result[name] = endpoints(evals)
    return {"runs": result, "seconds": dict(seconds)}


def endpoints(evals: list[dict]) -> dict[str, dict[str, dict[str, float | None]]]:
    """mode -> "first" | "last" -> metric -> value, for every mode and prompt of eval.prompts that
    was evaluated.
    """
    result = {}
    logged = (
        name.split("/")[1]
        for record in evals
        for name in record
        if re.fullmatch("eval/.+/.+", name)
    )
    for mode in dict.fromkeys([*(mode.value for mode in MODES), *logged]):
        measured = [
            record for record in evals if any(name.startswith(f"eval/{mode}/") for name in record)
        ]
        if measured:
            result[mode] = {"first": _point(measured[0], mode), "last": _point(measured[-1], mode)}
    return result


def summary_table(summary: dict) -> Table:
    """The summary for the terminal: two rows per run and mode, the first and the last evaluation;
    fits 80 columns.
    """
    from rich import box
    from rich.table import Table

    table = Table(title="First and last evaluation", box=box.SIMPLE_HEAD, padding=0)
    columns = _columns(summary["runs"])
    for title in ("run", "mode", ""):
        table.add_column(title, no_wrap=True)
    for column in columns:
        table.add_column(_title(column).replace("-", " "), justify="right")
    for name, modes in summary["runs"].items():
        for mode, ends in modes.items():
            for end in ("first", "last"):
                heading = (name, mode_label(mode)) if end == "first" else ("", "")
                cells = (_number(ends[end].get(column), column) for column in columns)
                table.add_row(*heading, end, *cells, style="bold" if end == "last" else "dim")
        table.add_section()
    return table


def write_curves(runs: Mapping[str, str | Path], path_png: str | Path) -> None:
    """Both modes of every run over training steps: accuracy, entropy, unique right answers, KL."""
    figure = _figure({name: read_metrics(run_dir) for name, run_dir in runs.items()}, dark=False)
    figure.savefig(path_png, format="png", dpi=150)


def write_report(runs: Mapping[str, str | Path], output: str | Path) -> None:
    """One HTML file without external resources: table, curves, seconds, samples and config of every
    run.
    """
    from jinja2 import Environment

    metrics = {name: read_metrics(run_dir) for name, run_dir in runs.items()}
    ends = {name: endpoints(_evaluations(*records)) for name, records in metrics.items()}
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(number=_number, title=_title, mode_label=mode_label)
    page = environment.from_string(PAGE).render(
        runs=[
            {
                "name": name,
                "steps": max((record["step"] for record in train), default=0),
                "evaluations": len(evals),
                "ends": ends[name],
                "samples": _samples(Path(runs[name])),
                "config": _config(Path(runs[name])),
            }
            for name, (train, evals) in metrics.items()
        ],
        columns=_columns(ends),
        curves={
            theme: data_url(_figure(metrics, dark=theme == "dark")) for theme in ("light", "dark")
        },
        seconds={name: _seconds(train + evals) for name, (train, evals) in metrics.items()},
    )
    Path(output).write_text(page, encoding="utf-8", errors="replace")


def _point(record: dict, mode: str) -> dict[str, float | None]:
    prefix = f"eval/{mode}/"
    best = [name for name in record if re.fullmatch(re.escape(prefix) + r"best_of_\d+", name)]
    return {
        name.removeprefix(prefix): record.get(name)
        for name in [*(prefix + m for m in SUMMARY_METRICS), *best]
    }


def _evaluations(train: list[dict], evals: list[dict]) -> list[dict]:
    """The evaluations; of a run without any, its training batches under the names of evaluations."""
    if evals:
        return evals
    modes = _lines(train)
    names = {f"{mode}/{metric}" for mode in modes for metric in SUMMARY_METRICS}
    divergences = {mode: f"kl/{mode}_to_normal" for mode in modes} | {
        "normal": "kl/normal_to_high_entropy"
    }
    result = []
    for record in train:
        point = {
            "step": record["step"],
            **{f"eval/{name}": record[name] for name in names & record.keys()},
        }
        point.update(
            {f"eval/{mode}/kl_nats": record[kl] for mode, kl in divergences.items() if kl in record}
        )
        result.append(point)
    return result


def _lines(train: list[dict]) -> dict[str, Any]:
    """A run's modes and how their curves are drawn; the two of Policy Split first, whether they
    sampled or not.
    """
    sampled = {
        name.partition("/")[0]
        for record in train
        for name in record
        if name.endswith("/truncated_share")
    }
    others = sorted(sampled - MODE_LINES.keys())
    return MODE_LINES | {mode: OTHER_LINES[i % len(OTHER_LINES)] for i, mode in enumerate(others)}


def _columns(runs: dict) -> list[str]:
    """Every metric that any run has, in the order of first appearance."""
    return list(
        dict.fromkeys(c for modes in runs.values() for ends in modes.values() for c in ends["last"])
    )


def _title(metric: str) -> str:
    names = {
        "entropy_nats": "entropy (nats)",
        "kl_nats": "KL (nats)",
        "unique_correct": "unique right answers",
    }
    return names.get(metric, re.sub(r"^best_of_(\d+)$", r"best-of-\1", metric))


def _number(value: float | None, metric: str = "") -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if metric == "kl_nats" else f"{value:.3f}"


def _seconds(records: list[dict]) -> list[dict]:
    """Phase, total seconds and mean seconds over the records that name the phase, in order of
    appearance.
    """
    phases: dict[str, list[float]] = {}
    for record in records:
        for name, value in record.items():
            if name.startswith("time/") and value is not None:
                phases.setdefault(name.removeprefix("time/").removesuffix("_s"), []).append(value)
    return [
        {"phase": p, "total": sum(values), "mean": sum(values) / len(values)}
        for p, values in phases.items()
    ]


def _config(run_dir: Path) -> str | None:
    """The run's configuration as YAML, without secrets: the page is made to be passed on."""
    path = run_dir / CONFIG_FILE
    if not path.exists():
        return None
    import yaml

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        config = None
    if not isinstance(config, dict):
        raise DataError(
            f"{path} is not a YAML mapping; restore the file, or delete it to have a report "
            "without it"
        )
    return yaml.safe_dump(without_secrets(config), sort_keys=False, allow_unicode=True)


def _samples(run_dir: Path) -> dict | None:
    """A few questions of the last rollout dump, those sampled in most modes first; None without a
    dump.
    """
    dumps = sorted(
        run_dir.glob("rollouts/step_*.jsonl"), key=lambda path: int(path.stem.removeprefix("step_"))
    )
    if not dumps:
        return None
    questions: dict[tuple, dict[str, list[dict]]] = {}
    for record in read_jsonl(dumps[-1]):
        if record.get("auxiliary"):  # no mode's own samples
            continue
        questions.setdefault((record["batch"], record["question"]), {}).setdefault(
            record["mode"], []
        ).append(record)
    chosen = sorted(questions.values(), key=lambda modes: -len(modes))[:SAMPLE_QUESTIONS]
    return {
        "file": dumps[-1].name,
        "questions": [
            {
                "prompt": _clip(next(iter(modes.values()))[0]["prompt"]),
                "answer": _clip(str(next(iter(modes.values()))[0]["answer"])),
                "modes": {
                    mode: [_response(r) for r in _spread(modes[mode])]
                    for mode in dict.fromkeys([*MODE_LABELS, *modes])
                    if mode in modes
                },
            }
            for modes in chosen
        ],
    }


def _spread(records: list[dict]) -> list[dict]:
    return sorted(records, key=lambda record: record["sample"])[:SAMPLES_PER_MODE]


def _response(record: dict) -> dict:
    reward = record["reward"]
    shown = {
        "reward_text": "–" if reward is None else f"{reward:.3g}",
        "right": reward is not None and reward > 0,
    }
    return {**record, **shown, "response": _clip(record["response"])}


def _clip(text: str) -> str:
    more = len(text) - SAMPLE_CHARACTERS
    return (
        text if more <= 0 else f"{text[:SAMPLE_CHARACTERS]} … ({more} more characters in the dump)"
    )


def _figure(metrics: dict[str, tuple[list[dict], list[dict]]], dark: bool) -> Figure:
    """A colour per run, a line style per mode; thin lines are training batches. Okabe-Ito colours."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    ink, paper = ("#d7dade", "#16191d") if dark else ("#24292f", "#ffffff")
    light_palette = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
    palette = (
        ("#56B4E9", "#E69F00", "#2DC89B", "#CC79A7", "#F0E442", "#D55E00")
        if dark
        else light_palette
    )
    theme = {
        "text.color": ink,
        "axes.labelcolor": ink,
        "xtick.color": ink,
        "ytick.color": ink,
        "axes.edgecolor": ink,
    }
    with matplotlib.rc_context(
        {**theme, "font.family": "sans-serif", "font.size": 9.5, "figure.facecolor": paper}
    ):
        figure = Figure(figsize=(9.6, 7.2), layout="constrained")
        figure.suptitle("The modes over training steps", fontsize=13, fontweight="bold")
        axes = figure.subplots(2, 2).flat
        legend = {}
        for axis, (metric, title, unit) in zip(axes, PANELS, strict=True):
            axis.set_facecolor(paper)
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(axis="y", color=ink, alpha=0.15, linewidth=0.8)
            axis.set_title(title, loc="left", fontweight="bold")
            axis.set(xlabel="training step", ylabel=unit)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 2.5, 5, 10]))
            for run, (name, (train, evals)) in enumerate(metrics.items()):
                colour = palette[run % len(palette)]
                for mode, line_style in _lines(train).items():
                    style = {"color": colour, "linestyle": line_style}
                    batches = _series(_evaluations(train, []), f"eval/{mode}/{metric}")
                    if batches[0]:
                        axis.plot(*batches, **style, linewidth=0.8, alpha=0.4 if evals else 1)
                    points = _series(evals, f"eval/{mode}/{metric}")
                    look = {
                        "marker": "o" if mode == "normal" else "s",
                        "markersize": 4.5,
                        "linewidth": 2,
                    }
                    fill = colour if mode == "normal" else paper
                    (line,) = axis.plot(*points, **style, **look, markerfacecolor=fill)
                    if points[0] or batches[0]:
                        legend.setdefault(f"{name}, {mode_label(mode)} mode", line)
            if not any(len(line.get_xdata()) for line in axis.lines):
                axis.text(
                    0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", color=ink
                )
            else:
                axis.set_ylim(bottom=0)
        figure.legend(
            legend.values(),
            legend.keys(),
            loc="outside lower center",
            ncols=min(3, len(metrics)),
            frameon=False,
            title="thick: evaluations    thin: training batches",
            title_fontsize=8.5,
            handlelength=3.5,
        )
    return figure


def _series(records: list[dict], name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of one metric; a value that was not finite is a gap."""
    measured = [record for record in records if name in record]
    values = [float("nan") if record[name] is None else record[name] for record in measured]
    return [record["step"] for record in measured], values


def data_url(figure: Figure, kind: str = "png") -> str:
    """A figure as an image within a page; kind: png, or svg where there are many lines and few
    points.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    media = {"png": "image/png", "svg": "image/svg+xml"}[kind]
    return f"data:{media};base64," + base64.b64encode(buffer.getvalue()).decode()
