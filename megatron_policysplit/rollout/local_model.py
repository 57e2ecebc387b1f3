"""What the `local` engine runs: a transformers model from its directory, on a usable device."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from checkpoints_conv import find_architecture, read_hf_config
from megatron_policysplit.errors import ConfigError, ModelError, cannot_load


def check_device(device: str | torch.device) -> torch.device:
    """Return the device that `device` names; raises ConfigError if torch cannot use it here."""
    try:
        result = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(
            f"device {device!r} is not a name that torch knows; use cpu, cuda or cuda:1"
        ) from error
    # A name that torch knows need not be there; what torch raises then differs by device.
    try:
        torch.ones(1, device=result).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).split("\n")[0].split(". ")[0]
        raise ConfigError(
            f"device {str(device)!r} cannot be used on this machine ({reason}); use cpu, "
            "or cuda where there is a GPU and a torch built for it"
        ) from error
    return result


def _explained(path: str, error: Exception) -> ModelError:
    """Why transformers cannot load a model, with the key of its config.json if one is wrong."""
    try:
        hf_config = read_hf_config(path)
        architecture = find_architecture(hf_config)
    except ModelError:  # transformers loads more architectures than those of the conversion
        return cannot_load("model", path, error)
    try:
        architecture.megatron_arguments(hf_config)
    except ModelError as reason:
        return ModelError(
            f"cannot load the model in {path}: {reason} (transformers: {type(error).__name__}: "
            f"{' '.join(str(error).split())})"
        )
    return cannot_load("model", path, error)


def read_model(path: str, dtype: torch.dtype) -> PreTrainedModel:
    """Read the model of a Hugging Face directory, on the CPU, without gradients.

    Every tensor comes from its safetensors, no code of the directory is run, and its generation
    defaults are dropped. Raises ModelError for a directory that is not complete.
    """
    if not (Path(path) / "config.json").is_file():
        raise ModelError(
            f"{path} has no config.json; model.path must be the directory of a Hugging Face model"
        )
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
    except Exception as error:  # many kinds; each means a model that cannot be read
        raise _explained(path, error) from error
    # transformers would leave these at random values, with no more than a warning.
    lacking = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if lacking:
        raise ModelError(
            f"{path} lacks or has misshapen weights: {', '.join(lacking[:8])}; "
            "fetch the model again"
        )
    # What the model's author set (top_k, penalties, forced tokens) would bend the distribution.
    model.generation_config = GenerationConfig()
    return model.eval().requires_grad_(False)
