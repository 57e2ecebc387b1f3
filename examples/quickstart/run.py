"""The quickstart: trains a tiny model with GRPO and with Policy Split and compares them.

    python -m examples.quickstart.run [--out runs/quickstart] [--seed 0] [key=value ...]

Both runs start from the same model. They are `policysplit train
examples/quickstart/quickstart.yaml` on real Megatron-Core with tensor parallelism 2; only
`algorithm.name` differs. `key=value` goes to both.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

# Two ranks share the cores; more threads than cores would cost many times their worth.
os.environ.setdefault("OMP_NUM_THREADS", "1")

CONFIG = Path(__file__).with_name("quickstart.yaml")
MARK = ".quickstart"  # a file that says that the quickstart made the directory and may delete it
RUNS = {"grpo": "GRPO", "policy_split": "Policy Split"}


def clear(out: Path) -> None:
    """Make an empty directory `out`.

    What an earlier quickstart left there is removed; a directory with anything else is refused.
    """
    if out.exists() and any(out.iterdir()) and not (out / MARK).exists():
        raise SystemExit(
            f"error: --out {out} holds something else than a quickstart; name another directory"
        )
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / MARK).touch()


def prepare(out: Path, seed: int, seconds: dict[str, float]) -> None:
    """Make the model, warmed up, and the questions in `out`; `seconds` gets the times."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from examples.quickstart.make_model import WARM_UP_STEPS, make_model, warm_up
    from examples.quickstart.sums import NUMBERS, write_questions

    with _timed(seconds, "model_s"):
        make_model(out / "model", seed)
    write_questions(out / "questions.jsonl", NUMBERS)
    columns = (
        TextColumn("warm-up"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    with _timed(seconds, "warm_up_s"), Progress(*columns, TimeRemainingColumn()) as progress:
        task = progress.add_task("warm-up", total=WARM_UP_STEPS, loss="")

        def show(step: int, steps: int, loss: float) -> None:
            progress.update(task, completed=step, loss=f"loss {loss:.3f} nats per token")

        warm_up(out / "model", seed, progress=show)


def train(out: Path, name: str, overrides: list[str], config: Path = CONFIG) -> Path:
    """Run `policysplit train` into `out/name`, which is returned; ends this process if it fails."""
    paths = [
        f"model.path={out / 'model'}",
        f"data.path={out / 'questions.jsonl'}",
        f"eval.path={out / 'questions.jsonl'}",
        f"run.dir={out / name}",
    ]
    command = [
        sys.executable,
        "-m",
        "megatron_policysplit.cli",
        "train",
        str(config),
        *paths,
        *overrides,
    ]
    code = subprocess.run(command, check=False).returncode
    if code:
        raise SystemExit(code)
    return out / name


def report(out: Path, seconds: dict[str, float]) -> None:
    """Write summary.json, curves.png and report.html of the runs in `out`, and print the table."""
    from rich.console import Console

    from examples.quickstart.make_model import HIGH_ENTROPY_PROMPT
    from megatron_policysplit.reports.run_report import (
        summary,
        summary_table,
        write_curves,
        write_report,
    )

    runs = {name: out / name for name in RUNS}
    with _timed(seconds, "report_s"):
        write_curves(runs, out / "curves.png")
        write_report(runs, out / "report.html")
    result = summary(runs, seconds)
    (out / "summary.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console = Console()
    console.print(summary_table(result))
    console.print(
        "seconds: "
        + ", ".join(f"{name.removesuffix('_s')} {value:.0f}" for name, value in seconds.items())
    )
    console.print(
        f"report   {out / 'report.html'}\n"
        f"curves   {out / 'curves.png'}\n"
        f"numbers  {out / 'summary.json'}"
    )
    model = out / "policy_split" / "hf"
    console.print(f"model    {model} (a Hugging Face directory); ask it yourself:")
    ask = (
        f"policysplit generate --model {model} --max-tokens 8 "
        f'--high-entropy-prompt "{HIGH_ENTROPY_PROMPT}" 9'
    )
    console.print(f"         {Path(sys.executable).parent / ask}", soft_wrap=True)


@contextmanager
def _timed(seconds: dict[str, float], name: str):
    """Put the seconds that the context takes into `seconds[name]`."""
    began = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - began, 2)


def main(
    description: str = __doc__.splitlines()[0], out: str = "runs/quickstart", config: Path = CONFIG
) -> None:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", help="key=value for both runs")
    arguments = parser.parse_args()
    out, seconds = arguments.out, {}
    clear(out)
    prepare(out, arguments.seed, seconds)
    for name, title in RUNS.items():
        print(f"\n{title}", flush=True)
        settings = [f"algorithm.name={name}", f"run.seed={arguments.seed}"]
        with _timed(seconds, f"{name}_s"):
            train(out, name, [*settings, *arguments.overrides], config)
    report(out, seconds)


if __name__ == "__main__":
    main()
