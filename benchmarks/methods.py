"""What a step of each method costs, relative to GRPO's on the same machine.

    python -m benchmarks.methods [--rounds 3] [--steps 8] [--only NAME ...] [--output FILE.json]

Every run is a `policysplit train` of its own, from the same random model, with a learning rate of
0: policies do not move, so all methods answer the same questions with responses alike in number and
length (nearly all have --response-tokens). Rewards are drawn from the response's text by a
probability that the question has: 0 or 1 for a share --certain of them, whose groups give no
gradient and are skipped by the same rule in every method, else 0.5. Methods take turns within a
round and the first two steps of a run are left out. `relative` is the median over rounds of a
method's median step over GRPO's in the same round.

The share of a step that generation takes decides what a second training prompt costs, so it is in
every line: here responses come from the engine in process. `work` is scoring and updating together,
for each response that was sampled.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

PHASES = ("step", "wait", "generate", "score", "update")
SKIPPED_STEPS = 2
SAMPLES = 8  # responses to a question
TWICE = ["train.optimizer_steps_per_batch=2"]
ENGINE = ["algorithm.old_logprobs=engine", "log.kl_tokens=sample"]
RUNS = {
    "grpo": ["algorithm.name=grpo"],
    "policy_split": ["algorithm.name=policy_split"],
    "policy_split, KL of a sample": ["algorithm.name=policy_split", "log.kl_tokens=sample"],
    "policy_split, no KL": ["algorithm.name=policy_split", "log.kl_tokens=none"],
    "grpo, the engine's log-probs": ["algorithm.name=grpo", *ENGINE],
    "policy_split, the engine's log-probs": ["algorithm.name=policy_split", *ENGINE],
    **{
        name: [f"algorithm.name={name}"]
        for name in (
            "dr_grpo rloo asym_grpo dapo entropy_bonus adaptive_entropy aer aepo scope entropy_adv "
            "forking_tokens "
            "clip_cov kl_cov siren steer arm epo edge_grpo"
        ).split()
    },
    "grpo, 2 optimizer steps": ["algorithm.name=grpo", *TWICE],
    "steer, 2 optimizer steps": ["algorithm.name=steer", *TWICE],
    "steer, 2 optimizer steps, statistics=step": [
        "algorithm.name=steer",
        *TWICE,
        "algorithm.statistics=step",
    ],
}
CONFIG = """
model: {{path: {model}, dtype: float32}}
data: {{path: {questions}, batch_questions: {batch}, max_prompt_tokens: 32}}
modes: {{high_entropy_prompt: explore widely}}
rollout: {{samples_per_question: {samples}, max_response_tokens: {tokens}, max_batch_samples: 512}}
reward: {{function: "benchmarks.methods:reward", workers: 1}}
train: {{steps: {steps}, learning_rate: 0.0, max_tokens_per_micro_batch: 4096}}
agreement: {{every: 0}}
checkpoint: {{hugging_face: false}}
log: {{rollouts: false}}
"""


def reward(response: str, question) -> float:
    """1 with the probability in `question.answer`, decided by the response's text."""
    digest = hashlib.blake2b(f"{question.id}/{response}".encode(), digest_size=8).digest()
    return float(int.from_bytes(digest, "big") / 2**64 < float(question.answer))


def make_inputs(directory: Path, options: argparse.Namespace) -> Path:
    """A random model and questions; returns the configuration file."""
    from examples.quickstart.make_model import VOCABULARY, make_model

    words = [str(number) for number in range(21, 21 + options.vocabulary - len(VOCABULARY))]
    make_model(
        directory / "model",
        0,
        (*VOCABULARY, *words),
        hidden_size=options.hidden,
        layers=options.layers,
    )
    lines = []
    for number in range(64):
        certain = number < 64 * options.certain
        probability = number % 2 if certain else 0.5
        lines.append(json.dumps({"question": f"{number + 1}", "answer": str(probability)}) + "\n")
    questions = directory / "questions.jsonl"
    questions.write_text("".join(random.Random(0).sample(lines, len(lines))))
    config = directory / "run.yaml"
    config.write_text(
        CONFIG.format(
            model=directory / "model",
            questions=questions,
            batch=options.questions,
            tokens=options.response_tokens,
            steps=options.steps + SKIPPED_STEPS,
            samples=SAMPLES,
        )
    )
    return config


def measure(name: str, config: Path, directory: Path) -> dict[str, float]:
    """One run: medians over its steps of seconds by phase, and what they were spent on."""
    command = [
        sys.executable,
        "-m",
        "megatron_policysplit.cli",
        "train",
        str(config),
        f"run.dir={directory}",
    ]
    done = subprocess.run([*command, *RUNS[name]], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(
            f"{name}: exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "train"][SKIPPED_STEPS:]
    found = {
        phase: statistics.median(step[f"time/{phase}_s"] for step in steps) for phase in PHASES
    }
    found["responses"] = statistics.fmean(responses(step) for step in steps)
    found["work_per_response"] = statistics.median(
        (step["time/score_s"] + step["time/update_s"]) / responses(step) for step in steps
    )
    found["trained_rows"] = statistics.fmean(
        1 - step["actor/skipped_rows"] / step["actor/rows"] for step in steps
    )
    return found


def responses(step: dict) -> float:
    """Sampled for a step, those that were dropped too."""
    asked = step.get("dynamic/questions", 0) * SAMPLES
    kept = step["throughput/generate_tokens_per_s"] * step["time/generate_s"] / step_length(step)
    return asked or kept


def step_length(step: dict) -> float:
    lengths = [
        step[name]
        for name in ("normal/response_tokens", "high_entropy/response_tokens")
        if name in step
    ]
    return statistics.fmean(lengths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="measured steps of a run")
    parser.add_argument(
        "--questions", type=int, default=4, help=f"of a batch, {SAMPLES} responses to each"
    )
    parser.add_argument("--response-tokens", type=int, default=128)
    parser.add_argument(
        "--certain", type=float, default=0.5, help="share of questions whose rewards are all equal"
    )
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    names = list(dict.fromkeys(["grpo", *options.only]))
    rounds: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as scratch:
        config = make_inputs(Path(scratch), options)
        for number in range(options.rounds):
            rounds.append({})
            for name in names if number % 2 == 0 else reversed(names):
                directory = Path(scratch) / f"{number}" / name.replace(" ", "_").replace(",", "")
                rounds[-1][name] = measure(name, config, directory)
                print(
                    f"round {number + 1}: {name}: {rounds[-1][name]['step']:.3f} s a step",
                    file=sys.stderr,
                )
    summary = {name: summarise(name, rounds) for name in names}
    print(table(summary))
    if options.output:
        settings = {
            key: value for key, value in vars(options).items() if key not in ("only", "output")
        }
        found = {"settings": settings, "summary": summary, "rounds": rounds}
        options.output.write_text(json.dumps(found, indent=1) + "\n")


def summarise(name: str, rounds: list[dict[str, dict[str, float]]]) -> dict[str, float]:
    """Medians over rounds; `relative...` to GRPO in the same round, with the lowest and highest
    round.
    """
    own = [found[name] for found in rounds]
    relative = [found[name]["step"] / found["grpo"]["step"] for found in rounds]
    work = [
        found[name]["work_per_response"] / found["grpo"]["work_per_response"] for found in rounds
    ]
    return {
        **{phase: statistics.median(found[phase] for found in own) for phase in PHASES},
        "generation_share": statistics.median(found["generate"] / found["step"] for found in own),
        "trained_rows": statistics.median(found["trained_rows"] for found in own),
        "responses": statistics.median(found["responses"] for found in own),
        "relative": statistics.median(relative),
        "relative_lowest": min(relative),
        "relative_highest": max(relative),
        "relative_work_per_response": statistics.median(work),
    }


def table(summary: dict[str, dict[str, float]]) -> str:
    lines = [
        "| method | step, s | relative to GRPO (lowest to highest round) | generation's share | "
        "rows trained "
        "| work per response, relative |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in summary.items():
        spread = f"{found['relative']:.2f} ({found['relative_lowest']:.2f} to {found['relative_highest']:.2f})"
        lines.append(
            f"| {name} | {found['step']:.3f} | {spread} | {found['generation_share']:.0%} "
            f"| {found['trained_rows']:.0%} | {found['relative_work_per_response']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
