"""A transformers model's weights under the names that its files have, and new values for them."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def weights_by_file_name(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Map the names in Hugging Face files to the model's own memory.

    A tied head stands under both its names, as one object. transformers 5 holds all experts of a
    layer in two parameters, gate_up_proj [experts, 2 x inner, hidden] and down_proj [experts,
    hidden, inner]; the files hold a matrix for each expert, and gate and up apart.
    """
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        module, _, part = name.rpartition(".")
        if not (module.endswith(".experts") and parameter.dim() == 3):
            weights[name] = parameter
        elif part == "gate_up_proj":
            inner = parameter.shape[1] // 2
            for expert, matrix in enumerate(parameter):
                weights[f"{module}.{expert}.gate_proj.weight"] = matrix[:inner]
                weights[f"{module}.{expert}.up_proj.weight"] = matrix[inner:]
        else:
            for expert, matrix in enumerate(parameter):
                weights[f"{module}.{expert}.{part}.weight"] = matrix
    return weights


@torch.no_grad()
def copy_weights(model: torch.nn.Module, tensors: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
    """Copy tensors, by their names in Hugging Face files, into a model.

    Returns what does not fit: missing, unexpected, repeated or misshapen tensors. All tensors are
    read even then: they may come from a generator whose collectives other ranks take part in.
    """
    parameters = weights_by_file_name(model)
    # id of a parameter -> the name it came under; a tied head may come under both its names.
    source_names: dict[int, str] = {}
    names, problems = set(), []
    for name, tensor in tensors:
        parameter = parameters.get(name)
        if parameter is None:
            problems.append(f"unexpected {name}")
        elif name in names:
            problems.append(f"repeated {name}")
        elif parameter.shape != tensor.shape:
            problems.append(
                f"{name} has shape {list(tensor.shape)} instead of {list(parameter.shape)}"
            )
        elif id(parameter) not in source_names:
            parameter.copy_(tensor)
            source_names[id(parameter)] = name
        elif not torch.equal(parameter, tensor.to(parameter)):
            problems.append(f"{name} is tied to {source_names[id(parameter)]} and differs from it")
        names.add(name)
    absent = [
        name
        for name in parameters
        if id(parameters[name]) not in source_names and name not in names
    ]
    # A tied head once, under the first of its names.
    missing = {id(parameters[name]): name for name in reversed(absent)}
    return problems + [f"missing {name}" for name in reversed(missing.values())]
