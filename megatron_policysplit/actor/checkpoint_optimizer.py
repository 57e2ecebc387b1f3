"""An optimizer's state in a checkpoint, whichever optimizer saved it and whichever loads it.

What is stored of a parameter is found by the parameter's name: Adam's two moments, and the fp32
master weight under a name that depends on the optimizer. Megatron stores all else of an optimizer
(settings of parameter groups, step counts, with experts a place for each of two optimizers) in a
form that depends on its class, its precision and the installed Adam. None of that is read: the
settings are the present ones, and the step count is the trainer's.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase

# Master weights of the distributed optimizer, and of the plain one in bf16. The plain one in fp32
# has none: they would be the model's weights.
_MASTERS = ("optimizer.state.param.", "optimizer.state.fp32_param.")


@dataclass(frozen=True)
class OptimizerRequest:
    """What to ask of a checkpoint for an optimizer, made of its `sharded_state_dict`."""

    state: Any
    has_masters: bool  # whether the checkpoint holds the master weights that are wanted

    @classmethod
    def of(cls, state: Any, stored: Collection[str]) -> OptimizerRequest:
        """Ask for master weights under the name that the checkpoint has them under.

        stored: the names of all tensors in the checkpoint. Where it has no master weights the state
        holds tensors without meaning in their place (`PolicyOptimizer.masters_from_weights`).
        """
        missing: list[str] = []
        state = _renamed(state, stored, missing)
        return cls(state, has_masters=not missing)


def _renamed(state: Any, stored: Collection[str], missing: list[str]) -> Any:
    if isinstance(state, dict):
        return {key: _renamed(value, stored, missing) for key, value in state.items()}
    if isinstance(state, list):
        return [_renamed(value, stored, missing) for value in state]
    prefix = next((p for p in _MASTERS if getattr(state, "key", "").startswith(p)), None)
    if prefix is None or state.key in stored:
        return state
    names = [other + state.key.removeprefix(prefix) for other in _MASTERS]
    name = next((name for name in names if name in stored), None)
    if name is None:
        missing.append(state.key)
        return state.data
    return replace(state, key=name)


def filled(request: Any, loaded: Any) -> Any:
    """The request with what was loaded in the place of every tensor; the rest as it was asked with.

    loaded: what Megatron returned for the request, which may hold more.
    """
    if isinstance(request, ShardedBase | LocalNonpersistentObject):
        return loaded
    if isinstance(request, dict):
        return {key: filled(value, _at(loaded, key)) for key, value in request.items()}
    if isinstance(request, list):
        return [filled(value, _at(loaded, place)) for place, value in enumerate(request)]
    return request


def _at(loaded: Any, key: Any) -> Any:
    """What was loaded at a place of a dict or list; None where nothing was."""
    try:
        return loaded[key]
    except (KeyError, IndexError, TypeError):
        return None
