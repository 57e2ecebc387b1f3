"""Optimizer states from an actor with expert parallelism to one without it, and back.

With it Megatron has an optimizer for the experts and one for all else, and saves the settings and
step count of each under its place, 0 or 1; without it there is one optimizer, and no place. Tensors
are found by their parameters' names either way, and have arrived at the places of the actor that
loads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Groups = dict[int | None, list[dict[str, Any]]]


def param_groups_by_optimizer(state: Mapping[Any, Any]) -> Groups:
    """The parameter groups of each optimizer by its place (None if it is the only one).

    state: of the optimizers, as `sharded_state_dict` gives it and before anything is loaded into
    it.
    """
    places = {place: part for place, part in state.items() if isinstance(place, int)} or {
        None: state
    }
    return {
        place: [dict(group) for group in part.get("optimizer", part)["param_groups"]]
        for place, part in places.items()
    }


def regrouped(loaded: dict[Any, Any], groups: Groups) -> dict[Any, Any]:
    """What was loaded, as the optimizers with `groups` (of `param_groups_by_optimizer`) take it.

    Where there are more or fewer optimizers than those that saved, the first of these gives the
    step count; the settings are the present ones.
    """
    placed = {place: part for place, part in loaded.items() if isinstance(place, int)}
    single = {key: part for key, part in loaded.items() if not isinstance(key, int)}
    if not placed or not single:
        return loaded  # saved by as many optimizers
    if None in groups:
        return _completed(single, placed[0], groups[None])
    return {place: _completed(part, single, groups[place]) for place, part in placed.items()}


def _completed(
    tensors: dict[str, Any], saved: dict[str, Any], groups: list[dict[str, Any]]
) -> dict[str, Any]:
    """The tensors of one optimizer together with what was saved beside those of another."""
    whole = dict(tensors)
    for key, value in saved.items():
        if key == "param_groups":
            step = {"step": value[0]["step"]} if "step" in value[0] else {}
            own = tensors.get(key) or [{} for _ in groups]
            whole[key] = [
                {**group, **step, **local} for group, local in zip(groups, own, strict=True)
            ]
        elif isinstance(value, dict):
            whole[key] = _completed(tensors.get(key, {}), value, groups)
        elif key not in whole:
            whole[key] = value
    return whole
