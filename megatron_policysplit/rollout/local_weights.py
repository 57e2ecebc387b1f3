"""A transformers model's weights under the names that its files have."""

from __future__ import annotations

import torch


def weights_by_file_name(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Name in a Hugging Face file -> the memory of that weight; a tied head under both its names,
    as one object.

    transformers 5 holds all experts of a layer in two parameters, gate_up_proj [experts, 2 x inner,
    hidden] and down_proj [experts, hidden, inner]; the files hold a matrix for each expert, and
    gate and up apart.
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
