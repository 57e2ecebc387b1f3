"""Does it matter which engine samples? The quickstart with the local engine and with a real SGLang server.

    python -m benchmarks.quickstart_sglang [--out runs/quickstart_engines] [--seeds 5] [--results FILE]

For every seed both runs start from the same warmed-up model and differ in `rollout.engine` alone. The two engines draw
different samples, so the question is whether what is learnt differs by more than seeds differ: every final model
answers every question in 8 batches of 8 samples (examples/quickstart/study.py). Also the largest agreement difference
of engine and actor in each run. A finished seed is not run again. Prints a Markdown table; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from datetime import date
from pathlib import Path

from examples.quickstart.run import CONFIG, clear, prepare, train
from examples.quickstart.study import answer
from examples.quickstart_sglang.run import CONFIG as SGLANG_CONFIG

ENGINES = {"local": CONFIG, "sglang": SGLANG_CONFIG}
NAMES = ("accuracy", "unique_correct", "entropy_nats", "kl_nats")


def run_seed(out: Path, seed: int, overrides: list[str]) -> dict:
    """Engine -> mode -> scores, seconds of the run, and the largest mean |engine - actor| log-prob difference."""
    from megatron_policysplit.rows import MODES

    clear(out)
    prepare(out, seed, {})
    result = {}
    for engine, config in ENGINES.items():
        began = time.perf_counter()
        settings = ["algorithm.name=policy_split", f"run.seed={seed}", "agreement.every=1", *overrides]
        run = train(out, engine, settings, config)
        seconds = time.perf_counter() - began
        records = [json.loads(line) for line in (run / "metrics.jsonl").open()]
        differences = [r["agreement/difference"] for r in records if "agreement/difference" in r]
        result[engine] = answer(run / "hf", out / "questions.jsonl", 1.0, MODES)
        result[engine] |= {"seconds": round(seconds, 1), "compared": len(differences), "difference": max(differences)}
    return result


def table(seeds: dict[str, dict]) -> str:
    """Mean and standard deviation over seeds, per engine, and the mean difference of the two on the same seed."""
    lines = ["| | local | sglang | sglang - local, mean over seeds |", "|---|---|---|---|"]

    def values(engine: str, mode: str, name: str) -> list[float]:
        return [seed[engine][mode][name] for seed in seeds.values()]

    def spread(numbers: list[float]) -> str:
        return f"{statistics.fmean(numbers):.3f} +- {statistics.stdev(numbers) if len(numbers) > 1 else 0:.3f}"

    for mode in ("normal", "high_entropy"):
        for name in NAMES:
            local, sglang = values("local", mode, name), values("sglang", mode, name)
            gap = [b - a for a, b in zip(local, sglang, strict=True)]
            lines.append(f"| {mode}: {name} | {spread(local)} | {spread(sglang)} | {spread(gap)} |")
    for name in ("seconds", "difference"):
        cells = [f"{max(seed[engine][name] for seed in seeds.values()):.3g}" for engine in ENGINES]
        lines.append(f"| largest {name} | {' | '.join(cells)} | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart_engines"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--results", type=Path, help="write the JSON here too")
    parser.add_argument("overrides", nargs="*", help="key=value for all runs")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "engines.json"
    seeds = json.loads(file.read_text()) if file.exists() else {}
    for seed in range(arguments.seeds):
        if str(seed) not in seeds:
            seeds[str(seed)] = run_seed(arguments.out / f"seed_{seed}", seed, arguments.overrides)
            file.write_text(json.dumps(seeds, indent=2) + "\n")
    print(table(seeds))
    result = {"date": date.today().isoformat(), "machine": f"{platform.machine()}, CPU", "seeds": seeds}
    if arguments.results is not None:
        arguments.results.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
