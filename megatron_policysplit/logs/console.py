"""Progress on the terminal; on a pipe or in a batch log, one plain line a step."""

from __future__ import annotations

import sys
import time

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from megatron_policysplit.logs.sink import Sink
from megatron_policysplit.rows import MODES

LABELS = {
    "normal": "normal",
    "high_entropy": "high-entropy",
    "entropy_nats": "entropy (nats)",
    "kl_nats": "KL between modes (nats)",
    "high_entropy_to_normal": "high-entropy to normal",
    "normal_to_high_entropy": "normal to high-entropy",
}
SHORT = {  # what is shown of groups with many figures; metrics.jsonl has all
    "rollout": ("staleness_max", "engine_retries", "cached_prompt_share"),
    "agreement": ("difference", "breaches"),
    "importance": ("mean", "max"),
}
PLAIN = {  # what a plain line shows of the groups below; other groups are shown whole
    **SHORT,
    "actor": ("loss", "grad_norm"),
    "time": ("step_s",),
    "throughput": (),
}
PLAIN_MODE = ("reward", "accuracy", "entropy_nats", "response_tokens")  # and of a mode's group
Metrics = dict[str, float]


class ConsoleSink(Sink):
    """A bar over steps; below it a table of the modes, and a line per other group of metrics."""

    def __init__(self, total_steps: int, console: Console | None = None):
        self.console = console or standard_console()
        self.total = total_steps
        self.live: Live | None = None
        self.metrics: Metrics = {}
        self.evals: Metrics = {}
        self.first = 0
        self.began = time.monotonic()
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[pace]}"),
            TimeElapsedColumn(),
            console=self.console,
        )
        self.task = self.progress.add_task("training", total=total_steps, pace="", start=False)

    def start(self, step: int) -> None:
        self.first = step
        self.began = time.monotonic()
        self.progress.start_task(self.task)
        self.progress.update(self.task, completed=step)
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self.live = Live(self._screen(), console=self.console, refresh_per_second=2)
            self.live.start()

    def log(self, step: int, metrics: Metrics) -> None:
        # The pace counts from the first step's begin: servers may have taken minutes to start, and
        # an evaluation came first.
        if not self.metrics:
            now = time.monotonic()
            self.began = now - metrics.get("time/step_s", now - self.began)
        self.metrics = dict(metrics)
        self.progress.update(self.task, completed=step, pace=self._pace(step))
        self._show(lambda: f"step {step}/{self.total} ({self._pace(step)}){plain_line(metrics)}")

    def evaluation(self, step: int, metrics: Metrics) -> None:
        self.evals = {name.removeprefix("eval/"): value for name, value in metrics.items()}
        self._show(lambda: f"evaluation after step {step}{plain_line(self.evals, shown={})}")

    def message(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=self.live is None)

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

    def _show(self, line) -> None:
        if self.live is not None:
            self.live.update(self._screen(), refresh=True)
        else:
            self.console.print(Text(line()), soft_wrap=True)

    def _pace(self, step: int) -> str:
        if step <= self.first:
            return ""
        seconds = (time.monotonic() - self.began) / (step - self.first)
        speed = f"{seconds:.3g} s/step" if seconds >= 1 else f"{1 / max(seconds, 1e-9):.3g} step/s"
        return f"{speed}, ETA {duration(seconds * max(0, self.total - step))}"

    def _screen(self) -> Group:
        return Group(
            self.progress,
            *modes_table(self.metrics, self.evals),
            *group_lines(self.metrics, self.evals),
        )


def standard_console() -> Console:
    """A console on standard output, which escapes letters that the output's encoding lacks."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    # Asking the stream itself: FORCE_COLOR must not turn a log file into a screen.
    return Console(force_terminal=sys.stdout.isatty(), highlight=False)


def modes_table(metrics: Metrics, evals: Metrics) -> list[Table]:
    """A table with a row per metric of a mode, training first, and a column per mode.

    [] without metrics.
    """
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    modes = modes_in_metrics(metrics)
    for mode in modes:
        table.add_column(label(mode), justify="right")
    for prefix, values in (("", metrics), ("eval ", evals)):
        groups = grouped(values)
        names = dict.fromkeys(name for mode in modes for name in groups.get(mode, {}))
        for name in names:
            cells = [groups.get(mode, {}).get(name) for mode in modes]
            table.add_row(
                prefix + label(name), *("" if cell is None else number(cell) for cell in cells)
            )
    return [table] if table.row_count else []


def group_lines(metrics: Metrics, evals: Metrics) -> list[Text]:
    """One line for every group that is not a mode: `kl`, `actor`, `time` ..., and a user's own."""
    modes = modes_in_metrics(metrics)
    groups = {
        group: values for source in (evals, metrics) for group, values in grouped(source).items()
    }
    return [
        Text(
            f"{group or 'other'}: "
            + ", ".join(
                f"{label(n)} {number(value)}"
                for n, value in values.items()
                if n in SHORT.get(group, values)
            )
        )
        for group, values in groups.items()
        if group not in modes
    ]


def plain_line(metrics: Metrics, shown: dict[str, tuple[str, ...]] = PLAIN) -> str:
    """` | group: name value, ...` for every group of metrics.

    shown: group -> the names to show of it; other groups are shown whole.
    """
    line = ""
    for group, values in grouped(metrics).items():
        whole = PLAIN_MODE if shown and is_mode(values) else values
        names = shown.get(group, whole)
        selection = {name: value for name, value in values.items() if name in names}
        if selection:
            parts = ", ".join(f"{label(name)} {number(value)}" for name, value in selection.items())
            line += f" | {label(group) or 'other'}: {parts}"
    return line


def modes_in_metrics(metrics: Metrics) -> list[str]:
    """The names of the modes: the two of Policy Split in any case, and others that sampled."""
    others = [group for group, values in grouped(metrics).items() if is_mode(values)]
    return list(dict.fromkeys([*(mode.value for mode in MODES), *others]))


def is_mode(values: Metrics) -> bool:
    """Whether these are the metrics of what a mode sampled for training."""
    return "truncated_share" in values


def grouped(metrics: Metrics) -> dict[str, Metrics]:
    """`group/name` split at the first slash; a name without one is in the group ''."""
    groups: dict[str, Metrics] = {}
    for full_name, value in metrics.items():
        group, slash, name = full_name.partition("/")
        groups.setdefault(group if slash else "", {})[name if slash else full_name] = value
    return groups


def label(name: str) -> str:
    """A group's or a metric's name as people read it."""
    if name.endswith("_s") and not name.endswith("_per_s"):
        return name.removesuffix("_s").replace("_", " ") + " (s)"
    return LABELS.get(name, name.replace("_", " "))


def number(value: float) -> str:
    """A value with four significant digits; whole numbers of up to six digits as they are."""
    value = float(value)
    return f"{value:.0f}" if value.is_integer() and abs(value) < 1e6 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Seconds as hours:minutes:seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
