"""Stand-ins for Transformer Engine's FusedAdam: its rules for states and step counts, in plain torch.

The rules are those of transformer_engine/pytorch/optimizers/fused_adam.py (version 2.11): the step count is an integer
of each parameter group, which the kernel takes as a C int; a state is looked up by name in a table of dtypes; loading
puts every state through that table. Apex's counts the same way.
"""

from contextlib import contextmanager
from unittest import mock

import torch

DTYPES = {"exp_avg": torch.float32, "exp_avg_sq": torch.float32, "master_param": torch.float32}


class FusedAdam(torch.optim.Optimizer):
    def __init__(self, params, lr, weight_decay, betas, eps, adam_w_mode=True, capturable=False):
        assert adam_w_mode and not capturable
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, defaults)

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        ids = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = dict(zip(ids, [p for group in self.param_groups for p in group["params"]], strict=True))
        for number, state in state_dict["state"].items():
            if number in parameters:
                for name, value in state.items():
                    assert value.float().shape == parameters[number].shape
                    self.state[parameters[number]][name] = value.to(DTYPES[name])

    def state_dict(self):
        saved = super().state_dict()
        for state in saved["state"].values():
            assert all(value.dtype == DTYPES[name] for name, value in state.items())
        return saved

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group["step"] + 1 if "step" in group else 1
            if type(group["step"]) is not int:
                raise TypeError("multi_tensor_adam(): incompatible function arguments")
            first, second = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                assert set(state) == {"exp_avg", "exp_avg_sq"}
                p.mul_(1 - group["lr"] * group["weight_decay"])
                state["exp_avg"].lerp_(p.grad, 1 - first)
                state["exp_avg_sq"].mul_(second).addcmul_(p.grad, p.grad, value=1 - second)
                root = (state["exp_avg_sq"].sqrt() / (1 - second ** group["step"]) ** 0.5).add_(group["eps"])
                p.addcdiv_(state["exp_avg"], root, value=-group["lr"] / (1 - first ** group["step"]))


@contextmanager
def installed():
    """Megatron-Core as it is where Transformer Engine is installed, as far as Adam goes."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    with (
        mock.patch.multiple(optimizer, Adam=FusedAdam, USING_PYTORCH_OPTIMIZER=False),
        mock.patch.multiple(distrib_optimizer, Adam=FusedAdam, HAVE_APEX_OR_TE=True, USING_TE_OPTIMIZER=True),
    ):
        yield
