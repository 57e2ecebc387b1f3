"""Converts loaded optimizer states between actors with and without expert parallelism.

With expert parallelism Megatron has two optimizers, one for the experts and one for all other
parameters, and saves the settings and step count of each under its place, 0 or 1. Without it there
is one optimizer, and no place. The tensors themselves need no conversion: they are found by their
parameters' names either way, and have arrived at the places of the actor that loads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Groups = dict[int | None, list[dict[str, Any]]]


def param_groups_by_optimizer(state: Mapping[Any, Any]) -> Groups:
    """Collect the parameter groups of each optimizer by its place (None if it is the only one).

    state: the optimizers' `sharded_state_dict`, before anything is loaded into it.
    """
    places = {place: part for place, part in state.items() if isinstance(place, int)} or {
        None: state
    }
    return {
        place: [dict(group) for group in part.get("optimizer", part)["param_groups"]]
        for place, part in places.items()
    }


def regrouped(loaded: dict[Any, Any], groups: Groups) -> dict[Any, Any]:
    """Return the loaded state in the form that the present optimizers take.

    Where there are more or fewer optimizers than at the save, the first saved one gives the step
    count, and the settings are the present ones. groups: of `param_groups_by_optimizer`.
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
    """Complete the tensors of one optimizer with what was saved beside those of another.

    Settings of param groups: the present ones (`groups`), the saved step count, and what was loaded
    for this optimizer, in rising precedence.
    """
    whole = dict(tensors)
    for key, value in saved.items():
        if key == "param_groups":
            step = {"step": value[0]["step"]} if "step" in value[0] else {}
            loaded = tensors.get(key) or [{} for _ in groups]
            whole[key] = [
                {**group, **step, **local} for group, local in zip(groups, loaded, strict=True)
            ]
        elif isinstance(value, dict):
            whole[key] = _completed(tensors.get(key, {}), value, groups)
        elif key not in whole:
            whole[key] = value
    return whole
