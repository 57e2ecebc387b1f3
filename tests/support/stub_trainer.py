"""Stands in for `policysplit train CONFIG KEY=VALUE ...` in tests of studies: steps that take no time, or hang.

`algorithm.name` decides: a method named in STUB_FAILS fails, one in STUB_HANGS waits for a signal before its last step.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

STEPS = 3


def evaluation(method: str, seed: int, step: int) -> dict[str, float]:
    """What the stub logs, so that tests can work out what a report must show."""
    better = {"grpo": 0.0, "policy_split": 0.1}.get(method, 0.2)
    accuracy = 0.2 + 0.1 * step + 0.01 * seed + better * step / STEPS
    return {
        f"eval/{mode}/{name}": value
        for mode in ("normal", "high_entropy")
        for name, value in (("accuracy", accuracy), ("pass_at_1", accuracy), ("pass_at_2", min(1.0, 2 * accuracy)))
    }


def training(method: str, seed: int, step: int) -> dict[str, float]:
    slow = 1.0 if method == "grpo" else 1.2 + 0.02 * seed
    parts = {"generate": 0.5, "score": 0.125 * slow, "update": 0.25 * slow, "step": slow + (9 if step == 1 else 0)}
    return {"normal/accuracy": 0.1 * step, **{f"time/{name}_s": value for name, value in parts.items()}}


def main(argv: list[str]) -> int:
    settings = dict(override.split("=", 1) for override in argv[1:])
    method, seed, directory = settings["algorithm.name"], int(settings["run.seed"]), Path(settings["run.dir"])
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "starts").open("a") as file:
        file.write(os.environ.get("STUB_VARIABLE", "-") + "\n")
    (directory / "config.yaml").write_text("data: {batch_questions: 5}\nrollout: {samples_per_question: 4}\n")
    metrics = directory / "metrics.jsonl"
    done = len(metrics.read_text().splitlines()) // 2 if metrics.exists() else 0
    for step in range(done + 1, STEPS + 1):
        while step == STEPS and method in os.environ.get("STUB_HANGS", "").split(",") and not stopped:
            time.sleep(0.01)
        if stopped:
            return 75
        if method in os.environ.get("STUB_FAILS", "").split(","):
            print("error: the stub was told to fail", file=sys.stderr)
            print("and says more", file=sys.stderr)
            return 1
        records = [
            {"kind": "train", **training(method, seed, step)},
            {"kind": "eval", **evaluation(method, seed, step)},
        ]
        with metrics.open("a") as file:
            file.write("".join(json.dumps({"step": step, **record}) + "\n" for record in records))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
