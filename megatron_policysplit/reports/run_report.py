"""What a run did: its metrics read back, a summary, and one self-contained HTML page."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_policysplit.config.modes import MODE_LABELS, mode_label
from megatron_policysplit.config.schema import CONFIG_FILE
from megatron_policysplit.errors import DataError
from megatron_policysplit.files import replace_text
from megatron_policysplit.logs import without_secrets
from megatron_policysplit.logs.jsonl import read_jsonl, read_metrics_file
from megatron_policysplit.reports.curves import (
    SUMMARY_METRICS,
    data_url,
    evaluations_or_batches,
    modes_figure,
)
from megatron_policysplit.reports.page import PAGE
from megatron_policysplit.rows import MODES

if TYPE_CHECKING:
    from rich.table import Table

# How many questions, responses of each mode and characters of a text the page shows at most.
SAMPLE_QUESTIONS, SAMPLES_PER_MODE, SAMPLE_CHARACTERS = 3, 4, 1500
DUMP = re.compile(r"step_(\d{6,})\.jsonl")  # of the rollouts of a step


def note_on_stderr(text: str) -> None:
    """Tell the user what a report leaves out."""
    print(f"note: {text}", file=sys.stderr)


def read_metrics(
    run_dir: str | Path, note: Callable[[str], None] = note_on_stderr
) -> tuple[list[dict], list[dict]]:
    """(training records, evaluation records) of a run, each sorted by `step`.

    A value that was not finite is None; one that is no number is left out. Raises DataError naming
    the file when it is missing, empty or damaged.

    note: takes a sentence about what is left out.
    """
    path = Path(run_dir) / "metrics.jsonl"
    if not path.exists():
        runs = sorted(str(file.parent) for file in Path(run_dir).glob("*/metrics.jsonl"))
        if runs:
            raise DataError(
                f"{run_dir} is not a run but holds runs; give one or more of them: {' '.join(runs)}"
            )
        raise DataError(
            f"{path} does not exist; give the directory of a run (run.dir) that has started"
        )
    records = sorted(_numbers(path, note), key=lambda record: record["step"])
    if not records:
        raise DataError(f"{path} holds no metrics yet; wait for the run's first step or evaluation")
    return [r for r in records if r["kind"] == "train"], [r for r in records if r["kind"] == "eval"]


def _numbers(path: Path, note: Callable[[str], None]) -> Iterator[dict]:
    """The records of a metrics.jsonl with their numbers alone."""
    for line, record in enumerate(read_metrics_file(path), 1):
        kept = {"step": record["step"], "kind": record["kind"]}
        for name, value in record.items():
            if name in kept:
                continue
            if value is None or _is_number(value):
                kept[name] = value if value is not None and math.isfinite(value) else None
            else:
                note(f"{path}:{line}: {name}={str(value)[:40]} is no number and is left out")
        yield kept


def _is_number(value: object) -> bool:
    """Whether a JSON value is a number that a float can hold."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        float(value)
    except OverflowError:
        return False
    return True


def summary(runs: Mapping[str, str | Path], seconds: Mapping[str, float]) -> dict:
    """The first and the last evaluation of every run.

    Returns {"runs": {name: {mode: {"first": E, "last": E}}}, "seconds": {phase: seconds}}. E holds
    `accuracy`, `entropy_nats`, `kl_nats`, `unique_correct` and `best_of_<k>`; None means not
    measured. Raises DataError for a run without an evaluation.

    runs: name -> run directory. seconds: handed through.
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
    """The first and the last evaluation: mode -> "first" | "last" -> metric -> value.

    The modes are all that were evaluated, and the names of eval.prompts.
    """
    result = {}
    names = (
        name.split("/")[1]
        for record in evals
        for name in record
        if re.fullmatch("eval/.+/.+", name)
    )
    for mode in dict.fromkeys([*(mode.value for mode in MODES), *names]):
        measured = [
            record for record in evals if any(name.startswith(f"eval/{mode}/") for name in record)
        ]
        if measured:
            result[mode] = {"first": _point(measured[0], mode), "last": _point(measured[-1], mode)}
    return result


def summary_table(summary: dict) -> Table:
    """The summary for a terminal of 80 columns: per run and mode the first and last evaluation."""
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
    """Write the curves of every run's modes over training steps as a PNG (`modes_figure`)."""
    metrics = {name: read_metrics(run_dir) for name, run_dir in runs.items()}
    figure = modes_figure(metrics, dark=False)
    figure.savefig(path_png, format="png", dpi=150)


def write_report(runs: Mapping[str, str | Path], output: str | Path) -> None:
    """Write one HTML page about runs, without external resources.

    It shows a table, curves, seconds per phase, sample responses and configurations. Raises
    DataError for a run whose files are missing or damaged.
    """
    from jinja2 import Environment

    notes: list[str] = []

    def note(text: str) -> None:
        notes.append(text)
        note_on_stderr(text)

    metrics = {name: read_metrics(run_dir, note) for name, run_dir in runs.items()}
    ends = {name: endpoints(evaluations_or_batches(*records)) for name, records in metrics.items()}
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(number=_number, title=_title, mode_label=mode_label)
    page = environment.from_string(PAGE).render(
        runs=[
            {
                "name": name,
                "steps": max((record["step"] for record in train), default=0),
                "evaluations": len(evals),
                "ends": ends[name],
                "samples": _samples(Path(runs[name]), note),
                "config": _config(Path(runs[name])),
            }
            for name, (train, evals) in metrics.items()
        ],
        columns=_columns(ends),
        curves={
            theme: data_url(modes_figure(metrics, dark=theme == "dark"))
            for theme in ("light", "dark")
        },
        seconds={name: _seconds(train + evals) for name, (train, evals) in metrics.items()},
        notes=notes,
    )
    replace_text(Path(output), page)


def _point(record: dict, mode: str) -> dict[str, float | None]:
    """The summary's metrics of one mode in one evaluation, without the prefix of their names."""
    prefix = f"eval/{mode}/"
    best = [name for name in record if re.fullmatch(re.escape(prefix) + r"best_of_\d+", name)]
    return {
        name.removeprefix(prefix): record.get(name)
        for name in [*(prefix + m for m in SUMMARY_METRICS), *best]
    }


def _columns(runs: dict) -> list[str]:
    """The metrics that any run has, in the order of first appearance."""
    endpoints = [ends for modes in runs.values() for ends in modes.values()]
    return list(dict.fromkeys(metric for ends in endpoints for metric in ends["last"]))


def _title(metric: str) -> str:
    """A metric's name as people read it."""
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
    """Total and mean seconds of every phase, in order of appearance.

    The mean is over the records that name the phase.
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
    except (yaml.YAMLError, OSError, UnicodeDecodeError):
        config = None
    if not isinstance(config, dict):
        raise DataError(
            f"{path} is not a YAML mapping; restore the file, or delete it to have a report "
            "without it"
        )
    return yaml.safe_dump(without_secrets(config), sort_keys=False, allow_unicode=True)


def _samples(run_dir: Path, note: Callable[[str], None] = note_on_stderr) -> dict | None:
    """A few questions of the last rollout dump with their responses; None without a dump.

    Questions that most modes answered come first.
    """
    dumps = []
    for path in sorted(run_dir.glob("rollouts/step_*.jsonl")):
        if path.is_file() and (match := DUMP.fullmatch(path.name)):
            dumps.append((int(match[1]), path))
        else:
            note(f"{path} is no dump of a step and is left out")
    if not dumps:
        return None
    _, dump = max(dumps)
    questions: dict[tuple, dict[str, list[dict]]] = {}  # (batch, question) -> mode -> responses
    for line, record in enumerate(read_jsonl(dump), 1):
        if not _is_rollout(record):
            note(f"{dump}:{line} is no rollout and is left out")
            continue
        if record.get("auxiliary"):  # sampled at a temperature that is no mode's own
            continue
        by_mode = questions.setdefault((record["batch"], record["question"]), {})
        by_mode.setdefault(record["mode"], []).append(record)
    examples = sorted(questions.values(), key=lambda modes: -len(modes))[:SAMPLE_QUESTIONS]
    return {
        "file": dump.name,
        "questions": [
            {
                "prompt": _clip(next(iter(modes.values()))[0]["prompt"]),
                "answer": _clip(str(next(iter(modes.values()))[0]["answer"])),
                "modes": {
                    mode: [_response(record) for record in _first_samples(modes[mode])]
                    for mode in dict.fromkeys([*MODE_LABELS, *modes])
                    if mode in modes
                },
            }
            for modes in examples
        ],
    }


def _is_rollout(record: dict) -> bool:
    """Whether a record has what the page shows of a rollout."""
    reward = record.get("reward", "")
    return (
        all(isinstance(record.get(name), int) for name in ("batch", "question", "sample"))
        and all(isinstance(record.get(name), str) for name in ("mode", "prompt", "response"))
        and isinstance(record.get("tokens"), list)
        and "answer" in record
        and (reward is None or _is_number(reward))
    )


def _first_samples(records: list[dict]) -> list[dict]:
    return sorted(records, key=lambda record: record["sample"])[:SAMPLES_PER_MODE]


def _response(record: dict) -> dict:
    """A rollout record as the page's template reads it."""
    reward = record["reward"]
    return record | {
        "reward_text": "–" if reward is None else f"{reward:.3g}",
        "right": reward is not None and reward > 0,
        "response": _clip(record["response"]),
    }


def _clip(text: str) -> str:
    more = len(text) - SAMPLE_CHARACTERS
    if more <= 0:
        return text
    return f"{text[:SAMPLE_CHARACTERS]} … ({more} more characters in the dump)"
