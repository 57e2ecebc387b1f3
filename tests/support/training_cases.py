"""Fabricated rollout batches and configurations for tests of a whole training step, and how the actor runs them."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from megatron_policysplit.algorithms.advantages import Method
from megatron_policysplit.algorithms.methods import Algorithm, build_algorithm
from megatron_policysplit.algorithms.modes import samples_per_mode, training_modes
from megatron_policysplit.algorithms.signals import RowSettings, SignalBuilder, live_rows
from megatron_policysplit.config import Config
from megatron_policysplit.config.modes import modes_of
from megatron_policysplit.rows import Mode, Rollout, Row, share_rollouts

VOCAB = 67  # odd, so that tensor parallelism pads it
MAX_RESPONSE_TOKENS = 12
SEED = 17
SYSTEM = {"normal": [], "high_entropy": [3, 1, 4, 1, 5], "third": [2, 7]}  # before the question's own prompt


def update_batch(actor, placed, builder):
    """Every optimizer step of a batch, as `Trainer.step` trains them; an `UpdateMetrics`."""
    from megatron_policysplit.actor.actor import UpdateMetrics

    updates = []
    for step in range(placed.optimizer_steps):
        again = actor.config.algorithm.statistics == "step" and step > 0
        current = actor.step_log_probs(placed, step) if again else None
        updates.append(actor.update(placed, step, builder.for_step(step, current)))
    return UpdateMetrics.over(updates)


@dataclass(frozen=True)
class Case:
    """One run of `batches` rollout batches from a fresh actor.

    rollouts: "mixed" (unequal lengths, one question answered all alike, a few masked tokens), "second" (that, and
    right answers of a second rollout), "one_live" (a single rollout can change the weights) or "none_live". settings:
    dotted configuration keys.
    """

    name: str
    model: str = "qwen3"
    rollouts: str = "mixed"
    batches: int = 1
    settings: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def algorithm(self) -> Algorithm:
        return build_algorithm(self.config("").algorithm)

    @property
    def method(self) -> Method:
        return self.algorithm.method

    def builder(self, rows, old, placed, config, reference=None, state=None) -> SignalBuilder:
        """What makes the batch's advantages, as the trainer has it; of nothing on ranks that do not lead."""
        settings = RowSettings.of(config)
        rest = {"state": state, "reference": reference, "seed": SEED}
        return SignalBuilder(rows, old, placed.plan, self.algorithm, settings, **rest)

    def live(self, rows, config) -> list[bool]:
        return live_rows(rows, self.algorithm, RowSettings.of(config))

    def config(self, model_path: str) -> Config:
        config = Config()
        config.model.path, config.model.dtype = model_path, "float32"
        config.rollout.max_response_tokens = MAX_RESPONSE_TOKENS
        # Adam's first step is the sign of the gradient down to adam_eps; below it stands rounding noise.
        defaults = {
            "train.learning_rate": 1e-2,
            "train.adam_eps": 1e-4,
            "train.weight_decay": 0.1,
            "train.max_tokens_per_micro_batch": 70,
        }
        for name, value in (defaults | self.settings).items():
            section, key = name.rsplit(".", 1)
            target = config
            for part in section.split("."):
                target = target.setdefault(part, {}) if isinstance(target, dict) else getattr(target, part)
            if isinstance(target, dict):
                target[key] = value
                continue
            if not hasattr(target, key):
                raise KeyError(name)
            setattr(target, key, value)
        return config

    def rows(self, batch: int) -> list[Row]:
        """The batch's rows, the same in every process."""
        draw = random.Random(f"{self.rollouts}-{batch}")
        questions = {
            "mixed": mixed_questions,
            "second": mixed_questions,
            "one_live": one_live_rollout,
            "none_live": none_live,
        }[self.rollouts](draw)
        config, method, prompts, rollouts = self.config(""), self.method, {}, []
        for question, answers in enumerate(questions):
            normal = [draw.randrange(VOCAB) for _ in range(draw.randint(2, 5))]
            prompts[question] = {mode: [*SYSTEM[mode.value], *normal] for mode in modes_of(config.modes)}
            config.rollout.samples_per_question = len(answers)
            shares = samples_per_mode(config.rollout, config.modes, method)
            sampled = [(mode, sample) for mode, count in shares.items() for sample in range(count)]
            for (mode, sample), (reward, length, masked) in zip(sampled, answers, strict=True):
                rollouts.append(
                    Rollout(
                        batch=batch,
                        question=question,
                        mode=mode,
                        sample=sample,
                        tokens=[draw.randrange(VOCAB) for _ in range(length)],
                        engine_logprobs=[-4.2 - draw.random() for _ in range(length)],
                        finish_reason="stop",
                        weight_versions=[(0, batch)],
                        loss_mask=[0 if position in masked else 1 for position in range(length)],
                        reward=reward,
                    )
                )
        if self.rollouts == "second":
            rollouts += [second(draw, batch, question, length) for question, length in enumerate((7, 3, 1))]
        draw.shuffle(rollouts)  # an engine finishes in any order
        return share_rollouts(rollouts, prompts, training_modes(config.modes, method))


Answer = tuple[float, int, set[int]]  # reward, tokens, masked positions


def mixed_questions(draw: random.Random) -> list[list[Answer]]:
    def answers(rewards):
        return [(reward, draw.randint(1, MAX_RESPONSE_TOKENS), set()) for reward in rewards]

    questions = [answers([1.0, 0.0, 0.0, 1.0]), answers([0.1] * 4), answers([1.0, 0.25, 0.0, 0.0])]
    # Masked: two tokens in the middle of one response, and a whole response.
    questions[0][1] = (0.0, MAX_RESPONSE_TOKENS, {2, 3})
    questions[2][3] = (0.0, 5, set(range(5)))
    return questions


def second(draw: random.Random, batch: int, question: int, length: int) -> Rollout:
    """Sampled at another temperature, so that the engine's log-probs are far from the actor's; first token masked."""
    return Rollout(
        batch=batch,
        question=question,
        mode=Mode.NORMAL,
        sample=4,
        tokens=[draw.randrange(VOCAB) for _ in range(length)],
        engine_logprobs=[-9.0] * length,
        finish_reason="stop",
        weight_versions=[(0, batch)],
        loss_mask=[int(length == 1 or position > 0) for position in range(length)],
        reward=1.0,
        auxiliary=True,
    )


def one_live_rollout(draw: random.Random) -> list[list[Answer]]:
    """Of two questions; the only other rollout with an advantage is masked."""
    return [[(1.0, 9, set()), (0.0, 4, set(range(4)))], [(1.0, 6, set()), (1.0, 3, set())]]


def none_live(draw: random.Random) -> list[list[Answer]]:
    return [[(1.0, draw.randint(1, 6), set()) for _ in range(2)] for _ in range(2)]


SPLIT = "algorithm.options.policy_split."
HIGH_ENTROPY_T, NORMAL_T = "rollout.high_entropy.temperature", "rollout.normal.temperature"
CASES = [
    Case("grpo", settings={"algorithm.name": "grpo"}),
    Case(
        "paper_two_steps",
        settings={
            SPLIT + "eta": 0.5,
            "algorithm.loss_aggregation": "sequence_mean_token_mean",
            "train.optimizer_steps_per_batch": 2,
            "train.clip_grad": 0.05,
            HIGH_ENTROPY_T: 1.0,
            NORMAL_T: 0.6,
        },
    ),
    Case(
        "code_untied",
        model="llama",
        settings={
            SPLIT + "variant": "authors_code",
            SPLIT + "eta": 0.3,
            SPLIT + "eta_normal": -0.1,
            "algorithm.loss_aggregation": "sequence_mean_token_sum_norm",
            "algorithm.importance_cap": 2.0,
            "train.optimizer_steps_per_batch": 2,
        },
    ),
    Case(
        "kl_and_entropy",
        batches=2,
        settings={
            "algorithm.kl_coef": 0.3,
            "algorithm.entropy_coef": 0.02,
            "algorithm.dual_clip": 1.1,
            "algorithm.importance_cap": 1.5,
            "algorithm.importance_level": "sequence",
            SPLIT + "entropy_estimate": "entropy",
            "algorithm.clip_high": 0.05,
            "train.optimizer_steps_per_batch": 2,
        },
    ),
    Case(
        "three_modes",
        batches=2,
        settings={
            "modes.others": {"third": {"prompt": "as the test says", "temperature": 0.8}},
            "rollout.high_entropy.share": 2,
            SPLIT + "eta": 0.5,
            SPLIT + "alpha": 0.3,
            SPLIT + "modes": {"third": {"eta": -0.4, "alpha": 0.9, "kappa": 1.5}},
            "algorithm.importance_cap": 2.0,
            "train.optimizer_steps_per_batch": 2,
            NORMAL_T: 0.7,
        },
    ),
    Case(
        "engine_logprobs",
        batches=2,
        settings={
            SPLIT + "eta": 0.5,
            "algorithm.old_logprobs": "engine",
            "algorithm.clip_high": 0.5,
            "log.kl_tokens": "sample",
            "train.optimizer_steps_per_batch": 2,
            NORMAL_T: 0.7,
        },
    ),
    Case(
        "engine_logprobs_alone",
        model="llama",
        settings={
            "algorithm.name": "entropy_bonus",
            "algorithm.options.entropy_bonus.coef": 0.05,
            "algorithm.old_logprobs": "engine",
            "algorithm.kl_coef": 0.2,
            "log.kl_tokens": "none",
        },
    ),
    Case("one_live", rollouts="one_live", settings={SPLIT + "eta": 0.5, "log.kl_tokens": "none"}),
    Case("none_live", rollouts="none_live", batches=2, settings={"algorithm.name": "grpo"}),
    Case(
        "distributed_optimizer",
        batches=2,
        settings={
            SPLIT + "eta": 0.5,
            "train.distributed_optimizer": True,
            "log.kl_tokens": "sample",
        },
    ),
    Case(
        "kl_cov_fresh",
        settings={
            "algorithm.name": "kl_cov",
            "algorithm.options.kl_cov.share": 0.3,
            "algorithm.statistics": "step",
            "train.optimizer_steps_per_batch": 2,
        },
    ),
    Case(
        "forking_old",
        settings={"algorithm.name": "forking_tokens", "train.optimizer_steps_per_batch": 2},
    ),
    Case(
        "scope",
        rollouts="second",
        batches=2,
        settings={
            "algorithm.name": "scope",
            "algorithm.importance_cap": 1.5,
            "train.optimizer_steps_per_batch": 2,
        },
    ),
    Case("aepo", model="llama", rollouts="second", settings={"algorithm.name": "aepo", NORMAL_T: 0.7}),
    Case(
        "arm_fresh",
        settings={
            "algorithm.name": "arm",
            "algorithm.options.arm.alpha": 2.0,
            "algorithm.statistics": "step",
            "train.optimizer_steps_per_batch": 2,
            NORMAL_T: 0.7,
        },
    ),
    Case(
        "siren_fresh",
        model="llama",
        settings={
            "algorithm.name": "siren",
            "algorithm.options.siren.beta": 3.0,
            "algorithm.options.siren.share": 0.4,
            "algorithm.statistics": "step",
            "train.optimizer_steps_per_batch": 2,
            "train.head_chunk_tokens": 7,
            "train.learning_rate": 5e-3,
            NORMAL_T: 0.7,
        },
    ),
    Case(
        "adaptive_entropy",
        model="llama",
        settings={
            "algorithm.name": "adaptive_entropy",
            "algorithm.options.adaptive_entropy.target": 10.0,
            "algorithm.options.adaptive_entropy.delta": 0.05,
            "train.optimizer_steps_per_batch": 2,
        },
    ),
]
