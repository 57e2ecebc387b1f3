"""Times a training step of each method relative to GRPO's on the same machine.

    python -m benchmarks.methods [--rounds 3] [--steps 8] [--only NAME ...] [--output FILE.json]

Every run is a `policysplit train` of its own, from the same random model, with a learning rate of
0: policies do not move, so all methods answer the same questions with responses of the same number
and length (nearly all have --response-tokens). A response's reward is 1 with a probability that
belongs to the question, decided by the response's text: 0 or 1 for a share --certain of the
questions, whose groups give no gradient and are skipped by the same rule in every method, else 0.5.
Methods take turns within a round, and the first two steps of a run are left out. `relative` is the
median over rounds of a method's median step divided by GRPO's in the same round.

What a second training prompt costs depends on the share of a step that generation takes, so every
line shows that share; here the engine in process generates. `work` is scoring and updating
together, per sampled response.
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
            "forking_tokens clip_cov kl_cov siren steer arm epo edge_grpo"
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
    """Make a random model and questions in `directory`; return the configuration file."""
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
        # The reward's probability is put where other tasks have the answer.
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
    """Run one method: medians over its steps of seconds by phase, and the work that took them."""
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
    result = {
        phase: statistics.median(step[f"time/{phase}_s"] for step in steps) for phase in PHASES
    }
    result["responses"] = statistics.fmean(responses(step) for step in steps)
    result["work_per_response"] = statistics.median(
        (step["time/score_s"] + step["time/update_s"]) / responses(step) for step in steps
    )
    result["trained_rows"] = statistics.fmean(
        1 - step["actor/skipped_rows"] / step["actor/rows"] for step in steps
    )
    return result


def responses(step: dict) -> float:
    """Number of responses that were sampled for a step, dropped ones included."""
    # Only methods that sample until a batch is full count questions; for the others nothing was
    # dropped, and the number follows from the tokens.
    sampled = step.get("dynamic/questions", 0) * SAMPLES
    tokens = step["throughput/generate_tokens_per_s"] * step["time/generate_s"]
    return sampled or tokens / step_length(step)


def step_length(step: dict) -> float:
    """Mean response length of a step in tokens, over its modes."""
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
            # Every second round backwards, so that a drift of the machine favours no method.
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
        result = {"settings": settings, "summary": summary, "rounds": rounds}
        options.output.write_text(json.dumps(result, indent=1) + "\n")


def summarise(name: str, rounds: list[dict[str, dict[str, float]]]) -> dict[str, float]:
    """Medians over rounds of one method.

    What is called relative is divided by GRPO's value in the same round; the lowest and the highest
    round of the relative step are there too.
    """
    runs = [results[name] for results in rounds]
    relative = [results[name]["step"] / results["grpo"]["step"] for results in rounds]
    work = [
        results[name]["work_per_response"] / results["grpo"]["work_per_response"]
        for results in rounds
    ]
    return {
        **{phase: statistics.median(run[phase] for run in runs) for phase in PHASES},
        "generation_share": statistics.median(run["generate"] / run["step"] for run in runs),
        "trained_rows": statistics.median(run["trained_rows"] for run in runs),
        "responses": statistics.median(run["responses"] for run in runs),
        "relative": statistics.median(relative),
        "relative_lowest": min(relative),
        "relative_highest": max(relative),
        "relative_work_per_response": statistics.median(work),
    }


def table(summary: dict[str, dict[str, float]]) -> str:
    """The summaries of all methods as a Markdown table."""
    lines = [
        "| method | step, s | relative to GRPO (lowest to highest round) | generation's share "
        "| rows trained | work per response, relative |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in summary.items():
        lowest, highest = row["relative_lowest"], row["relative_highest"]
        spread = f"{row['relative']:.2f} ({lowest:.2f} to {highest:.2f})"
        lines.append(
            f"| {name} | {row['step']:.3f} | {spread} | {row['generation_share']:.0%} "
            f"| {row['trained_rows']:.0%} | {row['relative_work_per_response']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
