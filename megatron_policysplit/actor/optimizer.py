"""Megatron's optimizer, gradient clipping and learning-rate schedule, from the `train.*` keys."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from megatron_policysplit.config import TrainConfig


@dataclass
class StepResult:
    """What one optimizer step did; `PolicyOptimizer.step` returns it."""

    grad_norm: float  # global norm before clipping
    learning_rate: float  # of this step
    stepped: bool  # False if the loss or the norm was not finite


class PolicyOptimizer:
    """Megatron-Core's AdamW over fp32 master weights, with gradient clipping and the schedule."""

    def __init__(self, model: torch.nn.Module, train: TrainConfig, dtype: torch.dtype):
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

        bf16 = dtype == torch.bfloat16
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
                params_dtype=dtype,
                use_distributed_optimizer=train.distributed_optimizer,
            ),
            [model],
        )
        for optimizer in self.megatron.chained_optimizers:
            # Adam makes its state at its first step, but a checkpoint may be wanted before.
            optimizer.init_state_fn(optimizer.optimizer, optimizer.config)
            _add_step(optimizer.optimizer)
        total = train.steps * train.optimizer_steps_per_batch
        self.schedule = OptimizerParamScheduler(
            self.megatron,
            init_lr=0.0,
            max_lr=train.learning_rate,
            min_lr=min(train.min_learning_rate, train.learning_rate),
            lr_warmup_steps=train.warmup_steps,
            # One more than there are, so that a decay to 0 is reached only after the last step.
            lr_decay_steps=total + 1,
            lr_decay_style=train.lr_decay,
            start_wd=train.weight_decay,
            end_wd=train.weight_decay,
            wd_incr_steps=max(total, 1),
            wd_incr_style="constant",
            use_checkpoint_opt_param_scheduler=False,
        )

    def zero_grad(self) -> None:
        """Clear the gradients of master weights and parameters; DDP's buffers are cleared apart."""
        self.megatron.zero_grad()

    def step(self, loss_is_finite: bool) -> StepResult:
        """Clip and step, unless the loss or the global gradient norm is not finite.

        All ranks must pass the same `loss_is_finite`, and see the same norm. Collective over the
        ranks that hold the model: the norm is all-reduced. The schedule moves only with steps that
        were taken.
        """
        self.megatron.prepare_grads()
        norm = float(self.megatron.get_grad_norm())
        # The schedule moves before the step: step n of the warm-up (n from 1) trains at
        # n / warmup_steps of the peak, so no step is lost at rate 0. A skipped step moves it back.
        self.schedule.step(increment=1)
        learning_rate = max(group["lr"] for group in self.megatron.param_groups)
        if not (loss_is_finite and math.isfinite(norm)):
            self.schedule.step(increment=-1)
            return StepResult(norm, learning_rate, stepped=False)
        self.megatron.step()
        return StepResult(norm, learning_rate, stepped=True)

    def load_state_dict(self, state: dict[str, Any], steps_taken: int) -> None:
        """Restore the optimizer's state and set the schedule to `steps_taken` steps.

        state: as `self.megatron.sharded_state_dict` gave it, loaded.
        """
        for optimizer in self.megatron.chained_optimizers:
            _accept_missing_step(optimizer)
            if steps_taken == 0 and isinstance(optimizer.optimizer, torch.optim.AdamW):
                _add_step_zero(state)
        self.megatron.load_state_dict(state)
        for optimizer in self.megatron.chained_optimizers:
            _separate_steps(optimizer.optimizer)
        self.schedule.num_steps = 0
        self.schedule.step(increment=steps_taken)

    @property
    def steps_taken(self) -> int:
        """Steps that changed the weights; skipped ones do not count."""
        return self.schedule.num_steps


def _add_step(optimizer: torch.optim.Optimizer) -> None:
    """Give torch's AdamW its step counts, which Megatron's `init_state_fn` leaves out.

    It counts steps for each parameter; Transformer Engine's and Apex's Adam count for each group.
    """
    if isinstance(optimizer, torch.optim.AdamW):
        for state in optimizer.state.values():
            state["step"] = torch.tensor(0.0)


def _add_step_zero(loaded: dict[Any, Any]) -> None:
    """Add step counts of 0 to a loaded state.

    Megatron saves step counts only if they are more than 0; torch's AdamW cannot load without them.
    """
    # Several optimizers have integer keys; a single one's state stands alone.
    for part in [part for place, part in loaded.items() if isinstance(place, int)] or [loaded]:
        states = part.get("optimizer", part).get("state", {})
        for state in states.values():
            state.setdefault("step", torch.tensor(0.0))


def _accept_missing_step(optimizer) -> None:
    """Let Megatron's distributed optimizer load into torch's AdamW.

    Megatron copies every entry of the Adam state from the checkpoint. torch's AdamW, unlike
    Transformer Engine's, has `step` among these entries, but the checkpoint holds it elsewhere, and
    the copy would fail because it is missing. So the present `step` is added to what is copied.
    """
    if not isinstance(optimizer.optimizer, torch.optim.AdamW):
        return
    copy = getattr(optimizer, "_set_main_param_and_optimizer_states", None)
    if copy is None:  # not the distributed optimizer
        return

    def copy_with_step(model_parameter, tensors):
        group, order = optimizer.model_param_group_index_map[model_parameter]
        main = optimizer.optimizer.param_groups[group]["params"][order]
        copy(model_parameter, {"step": optimizer.optimizer.state[main]["step"], **tensors})

    optimizer._set_main_param_and_optimizer_states = copy_with_step


def _separate_steps(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter of torch's AdamW a `step` tensor of its own.

    Megatron restores one tensor for all parameters, and AdamW would count it up once for each.
    """
    if isinstance(optimizer, torch.optim.AdamW):
        for state in optimizer.state.values():
            state["step"] = state["step"].clone()
