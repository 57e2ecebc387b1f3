"""One self-contained HTML page about a study, and the numbers in it as JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_policysplit.config.modes import mode_label
from megatron_policysplit.errors import ConfigError
from megatron_policysplit.files import naming_writes, replace_text
from megatron_policysplit.reports.curves import (
    data_url,
    figure_theme,
    mark_as_empty,
    style_axis,
)
from megatron_policysplit.reports.page import STYLE, is_page
from megatron_policysplit.study.config import Study
from megatron_policysplit.study.numbers import (
    Finished,
    finished_runs,
    logged_names,
    study_numbers,
    table,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

PANELS = {  # pattern of the measure -> title, unit
    r"accuracy": ("Accuracy", "share of right responses"),
    r"entropy_nats": ("Entropy", "nats per token"),
    r"kl_nats": ("KL to the other mode", "nats per token"),
    r"unique_correct": ("Unique right answers", "per question"),
    r"best_of_\d+": ("Best of k", "share of questions"),
}
COLOURS = {  # Okabe-Ito first; line styles tell more than eight methods apart
    "light": (
        "#0072B2",
        "#D55E00",
        "#009E73",
        "#CC79A7",
        "#E69F00",
        "#56B4E9",
        "#8C6D31",
        "#555555",
    ),
    "dark": (
        "#56B4E9",
        "#E69F00",
        "#2DC89B",
        "#CC79A7",
        "#F0E442",
        "#D55E00",
        "#C9A66B",
        "#BBBBBB",
    ),
}
LINES = ("-", "--", ":", "-.")
PASS_AT_K = r"pass_at_\d+"


def write_study_report(study: Study) -> list[Path]:
    """Write report.html, report.json and report.csv into the study's directory; return their paths.

    Raises DataError for damaged metrics of a finished run, or a measure that no run has logged.
    """
    from jinja2 import Environment

    runs = finished_runs(study)
    numbers = study_numbers(study, runs)
    check_report_files(study)
    html, as_json, as_csv = report_files(study)
    with naming_writes(html.parent):
        html.parent.mkdir(parents=True, exist_ok=True)
    replace_text(as_json, json.dumps(numbers, indent=2) + "\n")
    rows, lines = table(numbers), io.StringIO(newline="")
    writer = csv.DictWriter(lines, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    replace_text(as_csv, lines.getvalue())
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(show=_show, title=measure_title, style=STYLE)
    figures = []
    for title, methods in (study.figures or {"All methods": list(study.methods)}).items():
        by_theme = {theme: curves(methods, runs, theme) for theme in COLOURS}
        urls = {theme: data_url(f, "svg") for theme, f in by_theme.items() if f is not None}
        if urls:
            figures.append({"title": title} | urls)
    page = environment.from_string(PAGE).render(study=study, numbers=numbers, figures=figures)
    replace_text(html, page)
    return [html, as_json, as_csv]


def report_files(study: Study) -> list[Path]:
    """The files of a study's report: report.html, report.json and report.csv."""
    return [Path(study.dir) / f"report.{kind}" for kind in ("html", "json", "csv")]


def check_report_files(study: Study) -> None:
    """Raise ConfigError if the report would replace a file that is no report of a study."""
    for file, is_report in zip(report_files(study), (is_page, _is_json, _is_csv), strict=True):
        is_free = not file.exists() or (file.is_file() and file.stat().st_size == 0)
        if not is_free and not (file.is_file() and is_report(file)):
            raise ConfigError(
                f"{file} is no report of a study, and the report would replace it; move it away, "
                "or give another dir"
            )


def _is_json(file: Path) -> bool:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(content, dict) and {"baseline", "runs", "measures"} <= content.keys()


def _is_csv(file: Path) -> bool:
    with file.open(encoding="utf-8", errors="replace") as stream:
        line = stream.readline().strip()
    return line == "" or line.startswith("kind,name,method")


def measure_title(name: str) -> str:
    """The name of a measure or cost as people read it."""
    group, _, leaf = name.removeprefix("eval/").rpartition("/")
    names = {
        "entropy_nats": "entropy (nats)",
        "kl_nats": "KL to the other mode (nats)",
        "unique_correct": "unique right answers",
        "self_bleu_diversity": "1 - self-BLEU",
        "generation_share": "generation's share of the step",
        "score_update_ms_per_response": "score and update (ms per response)",
    }
    leaf = names.get(leaf, leaf)
    leaf = re.sub(r"^pass_at_(\d+)$", r"pass@\1", re.sub(r"^best_of_", "best-of-", leaf))
    leaf = re.sub(r"^(\w+)_s$", r"\1 (s)", leaf).replace("_", " ")
    return f"{mode_label(group)}: {leaf}" if group else leaf


def curves(methods: Sequence[str], runs: list[Finished], theme: str) -> Figure | None:
    """Curves of methods: a row per measure, a column per mode; the last row is pass@k over k.

    Lines are means over a method's seeds, bands reach from the lowest to the highest seed. pass@k
    is that at the end of training. None where no finished run of `methods` was evaluated.

    theme: a key of COLOURS.
    """
    from matplotlib.figure import Figure

    runs = [run for run in runs if run.run.method in methods]
    logged = logged_names(runs)
    groups = list(dict.fromkeys(name.split("/")[1] for name in logged if name.startswith("eval/")))
    rows = [p for p in PANELS if any(_matches(logged, group, p) for group in groups)]
    rows += [PASS_AT_K] * any(_matches(logged, group, PASS_AT_K) for group in groups)
    if not rows:
        return None
    with figure_theme(theme == "dark") as colours:
        figure = Figure(
            figsize=(4.8 * max(2, len(groups)), 2.7 * len(rows) + 0.6), layout="constrained"
        )
        axes = figure.subplots(len(rows), len(groups), squeeze=False)
        legend: dict[str, Line2D] = {}
        for row, pattern in enumerate(rows):
            title, unit = PANELS.get(pattern, ("Pass@k at the end", "probability"))
            xlabel = "k" if pattern == PASS_AT_K else "training step"
            for axis, group in zip(axes[row], groups, strict=True):
                style_axis(axis, colours, f"{title}, {mode_label(group)}", xlabel, unit)
                names = _matches(logged, group, pattern)
                for number, method in enumerate(methods):
                    method_runs = [run for run in runs if run.run.method == method]
                    if pattern == PASS_AT_K:
                        points = _over_k(method_runs, names)
                    else:
                        points = _over_steps(method_runs, names[:1])
                    if points:
                        line = _draw(axis, points, theme, number)
                        legend.setdefault(method, line)
                if not axis.lines:
                    mark_as_empty(axis, colours)
        ncols = min(6, len(legend))
        figure.legend(
            legend.values(), legend.keys(), loc="outside lower center", ncols=ncols, frameon=False
        )
    return figure


def _draw(axis: Axes, points: dict[int, list[float]], theme: str, number: int) -> Line2D:
    """Draw a method's means and band; the number of the method decides on colour and line style.

    points: x -> one value a seed.
    """
    palette = COLOURS[theme]
    colour = palette[number % len(palette)]
    line_style = LINES[number // len(palette) % len(LINES)]
    x = sorted(points)
    (line,) = axis.plot(
        x,
        [sum(points[at]) / len(points[at]) for at in x],
        color=colour,
        linestyle=line_style,
        marker="o",
        markersize=3.5,
        linewidth=1.8,
    )
    lowest, highest = [min(points[at]) for at in x], [max(points[at]) for at in x]
    axis.fill_between(x, lowest, highest, color=colour, alpha=0.15)
    return line


def _matches(logged: list[str], group: str, pattern: str) -> list[str]:
    """The evaluation metrics of a mode whose name, without the mode, matches a pattern."""
    return [name for name in logged if re.fullmatch(rf"eval/{re.escape(group)}/{pattern}", name)]


def _over_steps(runs: list[Finished], names: list[str]) -> dict[int, list[float]]:
    """step -> one value a run, at the steps where every run has a finite value."""
    series = [
        {r["step"]: r[n] for r in run.evals for n in names if r.get(n) is not None} for run in runs
    ]
    shared = set.intersection(*map(set, series)) if series else set()
    return {step: [by_step[step] for by_step in series] for step in shared}


def _over_k(runs: list[Finished], names: list[str]) -> dict[int, list[float]]:
    """k -> the final pass@k of every run that has it."""
    result = {}
    for name in names:
        values = [value for run in runs if (value := run.final(name)) is not None]
        if values:
            result[int(name.rpartition("_")[2])] = values
    return result


def _show(estimate: dict | None, sign: bool = False) -> str:
    """`mean [low, high]`; the mean alone without an interval, a dash without an estimate."""
    if estimate is None:
        return "–"
    mean, low, high = (
        None if estimate[key] is None else f"{estimate[key]:{'+' * sign}.3g}"
        for key in ("mean", "low", "high")
    )
    return mean if low is None else f"{mean} [{low}, {high}]"


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Study: {{ study.methods | join(", ") }}</title>
<style>{{ style | safe }}</style>
</head>
<body>
{% macro comparison(kind, compared, sign) %}
{% for name, methods in numbers[kind].items() %}
{% for method, figures in methods.items() %}
<tr><td class="name">{{ title(name) if loop.first else "" }}</td><td class="name">{{ method }}</td>
<td>{{ figures.estimate.n }}</td><td>{{ show(figures.estimate) }}</td>
<td>{{ "baseline" if method == study.baseline else show(figures[compared], sign) }}</td></tr>
{% endfor %}{% endfor %}
{% endmacro %}
<h1>Study</h1>
<p>{{ study.methods | length }} methods x {{ study.seeds | length }} seeds of {{ study.config }};
baseline <b>{{ study.baseline }}</b>. Only finished runs are counted.</p>

<h2>Final measures</h2>
{% if numbers.measures %}
<div class="wide"><table>
<tr><th class="name">measure</th><th class="name">method</th><th>seeds</th>
<th>mean [95% interval]</th>
<th>difference to {{ study.baseline }} [95% interval]</th></tr>
{{ comparison("measures", "difference", true) }}
</table></div>
<p>Of each run's last evaluation. Intervals are Student's t of the mean over seeds; differences are
taken seed by seed before. They say how certain the mean over seeds is, not how far single runs lie
apart, and they are not corrected for the number of comparisons.</p>
{% else %}<p>No finished run has logged an evaluation.</p>{% endif %}

{% if figures %}
<h2>Curves</h2>
{% for figure in figures %}
<h3>{{ figure.title }}</h3>
<figure><picture><source srcset="{{ figure.dark }}" media="(prefers-color-scheme: dark)">
<img src="{{ figure.light }}"
  alt="Measures by training step, mean over seeds with a band from lowest to highest">
</picture></figure>
{% endfor %}
<p>Lines are means over seeds, bands reach from the lowest to the highest seed.</p>
{% endif %}

<h2>Cost per step</h2>
{% if numbers.costs %}
<div class="wide"><table>
<tr><th class="name">cost</th><th class="name">method</th><th>seeds</th><th>mean [95% interval]</th>
<th>times that of {{ study.baseline }} [95% interval]</th></tr>
{{ comparison("costs", "ratio", false) }}
</table></div>
<p>Means over each run's training steps but its first; ratios are taken seed by seed. A response is
a sampled one, however many prompts it is trained under. With rollout.overlap generation lies beside
the step before.
{% if study.at_once > 1 %}<b>Up to {{ study.at_once }} runs shared the machine</b>, so these times
are not those of a run alone.{% endif %}</p>
{% else %}<p>No finished run has logged times.</p>{% endif %}

<h2>Runs</h2>
<div class="wide"><table>
<tr><th class="name">run</th><th class="name">state</th></tr>
{% for name, run in numbers.runs.items() %}
<tr><td class="name">{{ name }}</td><td class="name">{{ run.state }}
{%- if run.steps is defined %}, {{ run.steps }} steps{% endif %}
{%- if run.error is defined %}: {{ run.error }}{% endif %}
</td></tr>
{% endfor %}
</table></div>

<h2>Overrides</h2>
{% for method, overrides in study.methods.items() %}
<h3>{{ method }}</h3>
<pre>{{ (study.overrides + overrides) | join("\\n") or "none" }}</pre>
{% endfor %}
</body>
</html>
"""
