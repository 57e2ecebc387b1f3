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
            _set_steps(optimizer.optimizer, 0)
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

        state: as `self.megatron.sharded_state_dict` gave it, loaded; its step counts do not matter.
        """
        # With experts there are two optimizers, whose states have places. One stands alone.
        places = sorted(place for place in state if isinstance(place, int))
        parts = [state[place] for place in places] or [state]
        for optimizer, part in zip(self.megatron.chained_optimizers, parts, strict=True):
            _accept_missing_step(optimizer)
            _put_steps(optimizer, part, steps_taken)
        self.megatron.load_state_dict(state)
        for optimizer in self.megatron.chained_optimizers:
            _set_steps(optimizer.optimizer, steps_taken)
        self.schedule.num_steps = 0
        self.schedule.step(increment=steps_taken)

    def masters_from_weights(self) -> None:
        """Make the fp32 master weights those of the model."""
        for optimizer in self.megatron.chained_optimizers:
            optimizer.reload_model_params()

    @property
    def steps_taken(self) -> int:
        """Steps that changed the weights; skipped ones do not count."""
        return self.schedule.num_steps


def _counts_by_parameter(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an Adam has a step count for each parameter, as torch's has.

    Transformer Engine's and Apex's count for each group: a Python integer, which their kernels
    take, and which is added at the first step. They know no state but tensors of the parameter's
    shape, so a count among these would be an error.
    """
    return isinstance(optimizer, torch.optim.AdamW)


def _put_steps(optimizer, state: dict[str, Any], steps_taken: int) -> None:
    """Put the step count where Megatron's optimizer looks for it in a loaded state.

    Megatron saves it in as many forms as there are optimizers, and a count of 0 not at all.
    """
    inner = state.get("optimizer", state)
    by_parameter = _counts_by_parameter(optimizer.optimizer)
    states = inner.get("state")  # None in the distributed optimizer's form
    if states is not None:
        states.pop("common_step", None)
        for parameter_state in states.values():
            parameter_state.pop("step", None)
        if by_parameter and states:
            states["common_step"] = torch.tensor(float(steps_taken))
    for group in inner["param_groups"]:
        group.pop("step", None)
        if not by_parameter:
            group["step"] = steps_taken
        elif states is None:
            group["step"] = float(steps_taken)


def _set_steps(optimizer: torch.optim.Optimizer, steps_taken: int) -> None:
    """Set the step count of an Adam, in the form that it counts in.

    torch's needs a tensor for each parameter: Megatron restores one for all, which would count up
    once for each.
    """
    if _counts_by_parameter(optimizer):
        for state in optimizer.state.values():
            state["step"] = torch.tensor(float(steps_taken))
        return
    for group in optimizer.param_groups:
        group["step"] = steps_taken


def _accept_missing_step(optimizer) -> None:
    """Let Megatron's distributed optimizer load into torch's AdamW.

    Megatron copies every entry of the Adam state from the checkpoint. torch's AdamW, unlike
    Transformer Engine's, has `step` among these entries, but the checkpoint holds it elsewhere, and
    the copy would fail because it is missing. So the present `step` is added to what is copied.
    """
    copy = getattr(optimizer, "_set_main_param_and_optimizer_states", None)
    if copy is None or not _counts_by_parameter(optimizer.optimizer):
        return

    def copy_with_step(model_parameter, tensors):
        group, order = optimizer.model_param_group_index_map[model_parameter]
        main = optimizer.optimizer.param_groups[group]["params"][order]
        copy(model_parameter, {"step": optimizer.optimizer.state[main]["step"], **tensors})

    optimizer._set_main_param_and_optimizer_states = copy_with_step
