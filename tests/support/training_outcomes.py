"""What a training step gave, and the same from the plain reference, which runs in fp64, one row at a time."""

from dataclasses import dataclass

import torch

from megatron_policysplit.rows.plan import make_plan
from tests.reference import plain_step
from tests.support.training_cases import SEED


@dataclass
class Outcome:
    """What one run gave.

    Per batch: the mean loss and gradient norm of its optimizer steps; per row, in row order, log-probs, entropies, KL
    (or None), the prompt's mean log-prob (or None) and advantages (leaders only); the plan (leaders only).
    """

    loss: list
    grad_norm: list
    bad_steps: list
    first_ratio_off_one: list
    statistics: list
    advantages: list
    plans: list
    weights: dict
    steps_taken: int


def as_numpy(tensor):
    return None if tensor is None else tensor.detach().numpy().copy()


def hf_model(path):
    from transformers import AutoModelForCausalLM

    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, **eager).eval()


def run_reference(case, path):
    config = case.config(path)
    model, initial = hf_model(path), hf_model(path)
    temperatures = plain_temperatures(config)
    optimizer = plain_step.make_optimizer(model, config.train)
    outcome = Outcome([], [], [], [], [], [], [], {}, 0)
    for batch in range(case.batches):
        rows = case.rows(batch)
        scored = plain_step.score(model, rows, temperatures)
        before = plain_step.before_step(model, rows, config.algorithm, temperatures)
        shaped = plain_step.advantages(rows, before, config.algorithm)
        if config.algorithm.name in ("arm", "siren"):
            terms = plain_step.PlainMethod(rows, scored, config.algorithm).step(None)
            shaped = {key: torch.tensor([term.advantage for term in terms[key]]) for key in terms}
        outcome.statistics.append(
            [
                (
                    as_numpy(scored[row.key].logprobs),
                    as_numpy(scored[row.key].entropy),
                    {name: as_numpy(kl) for name, kl in plain_step.mode_kl(scored, row.key).items()},
                    scored[row.key].prompt if case.method.prompt_logprobs else None,
                )
                for row in rows
            ]
        )
        outcome.advantages.append([as_numpy(shaped[row.key]) for row in rows])
        steps = partition(case, config, rows, batch)
        results = plain_step.train_batch(
            model,
            optimizer,
            rows,
            [[rows[index].key for index in step] for step in steps],
            case.algorithm.config,
            config.train,
            config.rollout.max_response_tokens,
            temperatures,
            reference_model=initial,
        )
        outcome.loss.append(sum(result.loss for result in results) / len(results))
        outcome.grad_norm.append(sum(result.grad_norm for result in results) / len(results))
    tied = model.config.tie_word_embeddings
    outcome.weights = {
        name: as_numpy(tensor) for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")
    }
    return outcome


def partition(case, config, rows, batch):
    """Row indices of each optimizer step, which no layout may change: those of a plan for one replica."""
    return make_plan(
        rows,
        case.live(rows, config),
        replicas=1,
        optimizer_steps=config.train.optimizer_steps_per_batch,
        max_tokens=10**6,
        seed=SEED + batch,
    ).steps


def plain_temperatures(config):
    from megatron_policysplit.rows import Mode

    rollout = config.rollout
    others = {Mode(name): given["temperature"] for name, given in config.modes.others.items()}
    return {Mode.NORMAL: rollout.normal.temperature, Mode.HIGH_ENTROPY: rollout.high_entropy.temperature, **others}
