"""Compares the quickstart with the local engine and with a real SGLang server: does it matter?

    python -m benchmarks.quickstart_sglang [--out runs/quickstart_engines] [--seeds 5]
                                           [--results FILE]

For every seed all runs start from the same warmed-up model. `local` and `sglang` differ only in
`rollout.engine`, but another engine draws other samples, and what is learnt depends on them:
`local_redrawn` is the local engine again with four other `run.seed`s, and shows how much. Every
final model answers every question in 8 batches of 8 samples (examples/quickstart/study.py).
`replayed` trains once more, without a server, from the responses that the SGLang run recorded: it
must end where that run ended, bit for bit. Also reports the largest agreement difference between
engine and actor. A finished seed is not run again. Prints a Markdown table; the last line is JSON.
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

REDRAWS = (1000, 2000, 2001, 2002)  # added to run.seed
NAMES = ("accuracy", "unique_correct", "entropy_nats", "kl_nats")


def run_seed(out: Path, seed: int, overrides: list[str]) -> dict:
    """Run one seed with every engine: run -> mode -> scores, and figures of the run.

    The figures are its seconds and the largest mean |engine - actor| log-prob difference.
    """
    from megatron_policysplit.rows import MODES

    clear(out)
    prepare(out, seed, {})

    def train_and_score(name: str, config: Path, draw: int = 0) -> dict:
        began = time.perf_counter()
        settings = [
            "algorithm.name=policy_split",
            f"run.seed={seed + draw}",
            "agreement.every=1",
            *overrides,
        ]
        run = train(out, name, settings, config)
        seconds = time.perf_counter() - began
        differences = [
            r["agreement/difference"] for r in records(run) if "agreement/difference" in r
        ]
        scores = answer(run / "hf", out / "questions.jsonl", 1.0, MODES)
        return scores | {
            "seconds": round(seconds, 1),
            "compared": len(differences),
            "difference": max(differences),
        }

    result = {
        "local": train_and_score("local", CONFIG),
        "sglang": train_and_score("sglang", SGLANG_CONFIG),
    }
    result["sglang"]["replayed_bit_for_bit"] = replays(out, seed, overrides)
    result["local_redrawn"] = [train_and_score(f"draw_{draw}", CONFIG, draw) for draw in REDRAWS]
    return result


def records(run: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").open()]


def replays(out: Path, seed: int, overrides: list[str]) -> bool:
    """Whether training from the SGLang run's responses, with no engine, gives the same result.

    Weights and losses must be equal bit for bit.
    """
    from safetensors.torch import load_file

    sampled = out / "sglang"
    settings = [
        "algorithm.name=policy_split",
        f"run.seed={seed}",
        "eval.path=null",
        "rollout.engine=replay",
    ]
    again = train(
        out, "replayed", [*settings, f"rollout.replay_dir={sampled / 'rollouts'}", *overrides]
    )
    losses = [
        [r["actor/loss"] for r in records(run) if r["kind"] == "train"] for run in (sampled, again)
    ]
    first, second = (load_file(run / "hf" / "model.safetensors") for run in (sampled, again))
    return losses[0] == losses[1] and all(first[name].equal(second[name]) for name in first)


def table(seeds: dict[str, dict]) -> str:
    """Mean, standard deviation, lowest and highest over seeds (and draws)."""
    runs = {
        "local": [seed["local"] for seed in seeds.values()],
        "local, redrawn": [draw for seed in seeds.values() for draw in seed["local_redrawn"]],
        "sglang": [seed["sglang"] for seed in seeds.values()],
    }
    lines = [
        f"| | {' | '.join(f'{name} ({len(results)})' for name, results in runs.items())} |",
        "|---|---|---|---|",
    ]

    def spread(numbers: list[float]) -> str:
        mean, low, high = statistics.fmean(numbers), min(numbers), max(numbers)
        deviation = statistics.stdev(numbers) if len(numbers) > 1 else 0
        return f"{mean:.3f} +- {deviation:.3f} ({low:.3f} to {high:.3f})"

    for mode in ("normal", "high_entropy"):
        for name in NAMES:
            cells = [spread([run[mode][name] for run in results]) for results in runs.values()]
            lines.append(f"| {mode}: {name} | {' | '.join(cells)} |")
    for name in ("seconds", "difference"):
        cells = [f"{max(run[name] for run in results):.3g}" for results in runs.values()]
        lines.append(f"| largest {name} | {' | '.join(cells)} |")
    replayed = sum(run["replayed_bit_for_bit"] for run in runs["sglang"])
    lines.append(f"| replayed bit for bit | | | {replayed} of {len(seeds)} |")
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
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, CPU",
        "seeds": seeds,
    }
    if arguments.results is not None:
        arguments.results.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
