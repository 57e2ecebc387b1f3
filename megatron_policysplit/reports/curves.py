"""Curves of one run or several over training steps, and the look that all figures share."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_policysplit.config.modes import mode_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

# Line styles of the two modes of Policy Split, and in turn of the modes of modes.others.
MODE_LINES = {"normal": "-", "high_entropy": (0, (4, 2))}
OTHER_LINES = ((0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (5, 1.5, 1, 1.5, 1, 1.5)))
SUMMARY_METRICS = ("accuracy", "entropy_nats", "kl_nats", "unique_correct")
PANELS = (  # metric, title, unit
    ("accuracy", "Accuracy", "share of right answers"),
    ("entropy_nats", "Entropy", "nats per token"),
    ("unique_correct", "Unique right answers", "per question"),
    ("kl_nats", "KL between the modes", "nats per token"),
)
# Okabe-Ito colours, one a run.
LIGHT_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DARK_PALETTE = ("#56B4E9", "#E69F00", "#2DC89B", "#CC79A7", "#F0E442", "#D55E00")

Records = list[dict]  # of metrics.jsonl, sorted by step


class Theme(NamedTuple):
    """Colours of text and lines, and of the background."""

    ink: str
    paper: str


@contextmanager
def figure_theme(dark: bool) -> Iterator[Theme]:
    """The colours and fonts of figures that are made within the block."""
    import matplotlib

    theme = Theme("#d7dade", "#16191d") if dark else Theme("#24292f", "#ffffff")
    inked = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor")
    fonts = {"font.family": "sans-serif", "font.size": 9.5}
    with matplotlib.rc_context(
        {**dict.fromkeys(inked, theme.ink), **fonts, "figure.facecolor": theme.paper}
    ):
        yield theme


def style_axis(axis: Axes, theme: Theme, title: str, xlabel: str, ylabel: str) -> None:
    """Give a panel the look that all figures share."""
    from matplotlib.ticker import MaxNLocator

    axis.set_facecolor(theme.paper)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color=theme.ink, alpha=0.15, linewidth=0.8)
    axis.set_title(title, loc="left", fontweight="bold")
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 2.5, 5, 10]))


def mark_as_empty(axis: Axes, theme: Theme) -> None:
    """Write into a panel that there is nothing to show."""
    axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", color=theme.ink)


def modes_figure(metrics: Mapping[str, tuple[Records, Records]], dark: bool) -> Figure:
    """The modes of every run over training steps, one panel per metric of PANELS.

    A colour per run, a line style per mode; thin lines are training batches.

    metrics: run's name -> (training records, evaluation records).
    """
    from matplotlib.figure import Figure

    palette = DARK_PALETTE if dark else LIGHT_PALETTE
    with figure_theme(dark) as theme:
        figure = Figure(figsize=(9.6, 7.2), layout="constrained")
        figure.suptitle("The modes over training steps", fontsize=13, fontweight="bold")
        legend: dict[str, Line2D] = {}
        panels = figure.subplots(2, 2).flat
        for axis, (metric, title, unit) in zip(panels, PANELS, strict=True):
            style_axis(axis, theme, title, "training step", unit)
            for run, (name, records) in enumerate(metrics.items()):
                colour = palette[run % len(palette)]
                for mode, line in _draw_run(axis, theme, colour, metric, *records).items():
                    legend.setdefault(f"{name}, {mode_label(mode)} mode", line)
            # A mode without values has a line without points.
            if any(len(line.get_xdata()) for line in axis.lines):
                axis.set_ylim(bottom=0)
            else:
                mark_as_empty(axis, theme)
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


def _draw_run(
    axis: Axes, theme: Theme, colour: str, metric: str, train: Records, evals: Records
) -> dict[str, Line2D]:
    """Draw one metric of a run; return the lines of the modes that have values."""
    lines = {}
    for mode, line_style in _line_styles(train).items():
        style = {"color": colour, "linestyle": line_style}
        batches = _series(evaluations_or_batches(train, []), f"eval/{mode}/{metric}")
        if batches[0]:
            axis.plot(*batches, **style, linewidth=0.8, alpha=0.4 if evals else 1)
        points = _series(evals, f"eval/{mode}/{metric}")
        marker, fill = ("o", colour) if mode == "normal" else ("s", theme.paper)
        style |= {"marker": marker, "markersize": 4.5, "markerfacecolor": fill}
        (line,) = axis.plot(*points, **style, linewidth=2)
        if points[0] or batches[0]:
            lines[mode] = line
    return lines


def _series(records: Records, name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of one metric; a value that was not finite is a gap."""
    measured = [record for record in records if name in record]
    values = [float("nan") if record[name] is None else record[name] for record in measured]
    return [record["step"] for record in measured], values


def evaluations_or_batches(train: Records, evals: Records) -> Records:
    """The evaluations of a run, or its training batches in their place if it has none.

    The metrics of the batches get the names that evaluations give them, `eval/<mode>/<metric>`.
    """
    if evals:
        return evals
    modes = _line_styles(train)
    names = {f"{mode}/{metric}" for mode in modes for metric in SUMMARY_METRICS}
    # KL as evaluations log it: of a mode to the normal mode, of that to high-entropy.
    divergences = {mode: f"kl/{mode}_to_normal" for mode in modes}
    divergences["normal"] = "kl/normal_to_high_entropy"
    result = []
    for record in train:
        point = {"step": record["step"]}
        point |= {f"eval/{name}": record[name] for name in names & record.keys()}
        point |= {
            f"eval/{mode}/kl_nats": record[kl] for mode, kl in divergences.items() if kl in record
        }
        result.append(point)
    return result


def _line_styles(train: Records) -> dict[str, Any]:
    """Line style by mode: the two of Policy Split, sampled or not, then others that sampled."""
    sampled = {
        name.partition("/")[0]
        for record in train
        for name in record
        if name.endswith("/truncated_share")
    }
    others = sorted(sampled - MODE_LINES.keys())
    return MODE_LINES | {mode: OTHER_LINES[i % len(OTHER_LINES)] for i, mode in enumerate(others)}


def data_url(figure: Figure, kind: str = "png") -> str:
    """A figure as the URL of an image within a page.

    kind: png, or svg where there are many lines and few points.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    media = {"png": "image/png", "svg": "image/svg+xml"}[kind]
    return f"data:{media};base64," + base64.b64encode(buffer.getvalue()).decode()
