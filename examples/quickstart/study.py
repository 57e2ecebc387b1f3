"""The quickstart over several seeds, with the ablations that its claim needs.

    python -m examples.quickstart.study [--out runs/quickstart_study] [--seeds 5]

For every seed, from the same warmed-up model: GRPO, Policy Split, and Policy Split at eta 0 (the
second prompt and the sharing alone). Every final model answers every question in 8 batches of 8
samples. GRPO is also sampled at the temperature at which its normal mode is as surprising as Policy
Split's high-entropy mode: that is what raising the temperature at test time gives, without training
a second mode. Writes study.json and prints a Markdown table. A finished seed is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from examples.quickstart.make_model import HIGH_ENTROPY_PROMPT
from examples.quickstart.run import clear, prepare, train

RUNS = {
    "grpo": ["algorithm.name=grpo"],
    "policy_split": ["algorithm.name=policy_split"],
    "eta_0": ["algorithm.name=policy_split", "algorithm.options.policy_split.eta=0"],
}
SAMPLES, REPEATS, MAX_TOKENS = 8, 8, 8


def answer(model: Path, questions: Path, temperature: float, modes) -> dict[str, dict[str, float]]:
    """Sample answers and score them: mode -> scores over REPEATS batches.

    Among the scores are the exact entropy and the KL to the other mode, in nats per token.
    """
    from examples.quickstart.sums import reward
    from megatron_policysplit.config import ModesConfig
    from megatron_policysplit.data.questions import load_questions
    from megatron_policysplit.evaluation.responder import Responder
    from megatron_policysplit.evaluation.scores import score
    from megatron_policysplit.rewards import Graded
    from megatron_policysplit.rollout.engine import Sampling

    question_list = load_questions(str(questions))
    by_id = {question.id: question for question in question_list}
    prompts = ModesConfig(high_entropy_prompt=HIGH_ENTROPY_PROMPT)
    responder = Responder(str(model), prompts, max_batch_samples=512)
    sampling = Sampling(temperature, 1.0, -1, MAX_TOKENS)
    batches, all_responses = [], []
    for seed in range(REPEATS):
        responses = responder.respond(question_list, modes, SAMPLES, sampling, seed)
        grades = [Graded(reward(r.text, by_id[r.question])) for r in responses]
        batches.append(score(responses, grades))
        all_responses += responses
    names = ("accuracy", "unique_correct", "best_of_k", "mean_surprisal_nats")
    scores = {
        mode: {
            name: statistics.fmean(getattr(batch[mode], name) for batch in batches)
            for name in names
        }
        for mode in batches[0]
    }
    for mode in modes:
        responses = [response for response in all_responses if response.mode == mode]
        scores[mode.value] |= exact(model, prompts, by_id, responses, mode, temperature)
    return scores


def exact(
    model: Path, prompts, questions: dict, responses: list, mode, temperature: float
) -> dict[str, float]:
    """Compute entropy of `mode` and KL(mode || other mode) exactly, in nats, by transformers.

    Means over all tokens of the responses.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megatron_policysplit.data.prompts import PromptBuilder
    from megatron_policysplit.rows import MODES

    builder = PromptBuilder(AutoTokenizer.from_pretrained(model), prompts)
    ids = {key: builder.build(question.messages) for key, question in questions.items()}
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def log_probs(prompt_mode) -> torch.Tensor:
        """[tokens, V]: of every response token behind the prompts of a mode."""
        rows = [ids[response.question][prompt_mode] + response.tokens for response in responses]
        width = max(map(len, rows))
        # Padding is on the right, where causal attention does not look.
        padded = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        with torch.no_grad():
            logits = network(padded).logits / temperature
        response_logits = [
            logits[i, len(row) - len(response.tokens) - 1 : len(row) - 1]
            for i, (row, response) in enumerate(zip(rows, responses, strict=True))
        ]
        return torch.cat(response_logits).log_softmax(-1)

    log_p, other = log_probs(mode), log_probs(next(each for each in MODES if each != mode))
    return {
        "entropy_nats": float(-(log_p.exp() * log_p).sum(-1).mean()),
        "kl_nats": float((log_p.exp() * (log_p - other)).sum(-1).mean()),
    }


def matched_temperature(model: Path, questions: Path, surprisal: float) -> float:
    """Find the temperature at which the normal mode's mean surprisal is `surprisal` nats per token.

    By bisection between 0.2 and 8.
    """
    from megatron_policysplit.rows import Mode

    low, high = 0.2, 8.0
    for _ in range(12):
        middle = (low + high) / 2
        scores = answer(model, questions, middle, [Mode.NORMAL])["normal"]
        is_too_low = scores["mean_surprisal_nats"] < surprisal
        low, high = (middle, high) if is_too_low else (low, middle)
    return (low + high) / 2


def run_seed(out: Path, seed: int, overrides: list[str]) -> dict:
    """Train all runs of one seed and score their final models."""
    from megatron_policysplit.rows import MODES, Mode

    clear(out)
    prepare(out, seed, {})
    questions, result = out / "questions.jsonl", {}
    for name, settings in RUNS.items():
        run = train(out, name, [*settings, f"run.seed={seed}", "log.rollouts=false", *overrides])
        result[name] = answer(run / "hf", questions, 1.0, MODES)
    target = result["policy_split"]["high_entropy"]["mean_surprisal_nats"]
    temperature = matched_temperature(out / "grpo" / "hf", questions, target)
    matched = answer(out / "grpo" / "hf", questions, temperature, [Mode.NORMAL])
    result["grpo_matched"] = matched | {"temperature": temperature}
    return result


def ratios(seed: dict) -> dict[str, float]:
    """The ratios of one seed's scores that the study is about."""
    grpo, matched = seed["grpo"]["normal"], seed["grpo_matched"]["normal"]
    normal, high = seed["policy_split"]["normal"], seed["policy_split"]["high_entropy"]
    kl_at_eta_0 = seed["eta_0"]["high_entropy"]["kl_nats"]
    unique = high["unique_correct"]
    return {
        "unique, high-entropy / GRPO": unique / grpo["unique_correct"],
        "unique, high-entropy / GRPO at matched entropy": unique / matched["unique_correct"],
        "KL(high-entropy || normal) / that at eta 0": high["kl_nats"] / kl_at_eta_0,
        "accuracy, normal / GRPO": normal["accuracy"] / grpo["accuracy"],
    }


def markdown(seeds: dict[str, dict]) -> str:
    """Every seed, mean and standard deviation, as Markdown tables."""
    columns = [*seeds, "mean", "std"]
    lines = ["| | " + " | ".join(f"seed {c}" if c.isdigit() else c for c in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")

    def row(title: str, values: list[float]) -> None:
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        cells = [f"{value:.3g}" for value in (*values, statistics.fmean(values), spread)]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")

    for run in (*RUNS, "grpo_matched"):
        for mode in ("normal", "high_entropy"):
            if mode not in next(iter(seeds.values()))[run]:
                continue
            for name in next(iter(seeds.values()))[run][mode]:
                row(f"{run}, {mode}: {name}", [seed[run][mode][name] for seed in seeds.values()])
    row(
        "grpo_matched: temperature",
        [seed["grpo_matched"]["temperature"] for seed in seeds.values()],
    )
    for name in ratios(next(iter(seeds.values()))):
        row(f"**{name}**", [ratios(seed)[name] for seed in seeds.values()])
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart_study"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("overrides", nargs="*", help="key=value for all runs")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "study.json"
    seeds = json.loads(file.read_text()) if file.exists() else {}
    for seed in range(arguments.seeds):
        if str(seed) not in seeds:
            seeds[str(seed)] = run_seed(arguments.out / f"seed_{seed}", seed, arguments.overrides)
            file.write_text(json.dumps(seeds, indent=2) + "\n")
    print(markdown(seeds))


if __name__ == "__main__":
    main()
