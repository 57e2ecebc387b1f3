"""Megatron's optimizer, gradient clipping and learning-rate schedule, from the `train.*` keys."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from megatron_policysplit.config import Config


@dataclass
class StepResult:
    """grad_norm before clipping; learning_rate of this step; stepped is False if the norm was not finite."""

    grad_norm: float
    learning_rate: float
    stepped: bool


class PolicyOptimizer:
    """AdamW over fp32 master weights, global-norm clipping and the schedule, all Megatron-Core's."""

    def __init__(self, model: torch.nn.Module, config: Config):
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

        train = config.train
        bf16 = config.model.dtype == "bfloat16"
        self.megatron = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=train.learning_rate,
                min_lr=train.min_learning_rate,
                weight_decay=train.weight_decay,
                adam_beta1=train.adam_beta1,
                adam_beta2=train.adam_beta2,
                adam_eps=train.adam_eps,
                clip_grad=train.clip_grad,
                bf16=bf16,
                params_dtype=torch.bfloat16 if bf16 else torch.float32,
                use_distributed_optimizer=train.distributed_optimizer,
            ),
            [model],
        )
        total = train.steps * train.optimizer_steps_per_batch
        self.schedule = OptimizerParamScheduler(
            self.megatron,
            init_lr=0.0,
            max_lr=train.learning_rate,
            min_lr=min(train.min_learning_rate, train.learning_rate),
            lr_warmup_steps=train.warmup_steps,
            lr_decay_steps=max(total, train.warmup_steps + 1),
            lr_decay_style=train.lr_decay,
            start_wd=train.weight_decay,
            end_wd=train.weight_decay,
            wd_incr_steps=max(total, 1),
            wd_incr_style="constant",
            use_checkpoint_opt_param_scheduler=False,
        )

    def zero_grad(self) -> None:
        self.megatron.zero_grad()

    def step(self, loss_is_finite: bool) -> StepResult:
        """Clip and step, unless the loss or the global gradient norm is not finite (the same on all ranks).

        The schedule moves only with steps that were taken.
        """
        self.megatron.prepare_grads()
        norm = float(self.megatron.get_grad_norm())
        # Step n of the warm-up (n from 1) trains at n / warmup_steps of the peak, so no step is lost at rate 0.
        self.schedule.step(increment=1)
        learning_rate = max(group["lr"] for group in self.megatron.param_groups)
        if not (loss_is_finite and math.isfinite(norm)):
            self.schedule.step(increment=-1)
            return StepResult(norm, learning_rate, stepped=False)
        self.megatron.step()
        return StepResult(norm, learning_rate, stepped=True)

    @property
    def steps_taken(self) -> int:
        return self.schedule.num_steps

    def resume_schedule(self, steps_taken: int) -> None:
        """Put the learning-rate schedule where it was after `steps_taken` optimizer steps."""
        self.schedule.num_steps = 0
        self.schedule.step(increment=steps_taken)
