"""What a checkpoint directory holds, after checking that it is whole; no tensor is read."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from checkpoints_conv.architectures import find_architecture
from checkpoints_conv.megatron_reader import MegatronCheckpoint, is_megatron, read_json
from checkpoints_conv.quantized import FORMATS, KEY, check_quantized, read_format
from checkpoints_conv.reader import check_safetensors, model_dtypes, read_headers, read_hf_config
from checkpoints_conv.writer import Planned


def describe(path: str | Path, hf: str | Path | None = None) -> dict[str, str]:
    """Describe a Hugging Face directory or a torch_dist checkpoint, as label -> text.

    hf: the Hugging Face directory of a torch_dist checkpoint, see `MegatronCheckpoint`. Raises
    ModelError or CheckpointError, as `check_safetensors`, `check_quantized` and
    `MegatronCheckpoint` do, unless the directory is whole.
    """
    path = Path(path)
    if not is_megatron(path):
        return _describe_hf(path)
    checkpoint = MegatronCheckpoint(path, hf)
    shapes = find_architecture(checkpoint.hf_config).hf_tensors(checkpoint.hf_config)
    stored = {name: Planned(shapes[name], dtype) for name, dtype in checkpoint.hf_dtypes().items()}
    files = len(list(path.glob("*.distcp")))
    return {
        "format": f"Megatron-Core torch_dist, {_count(files, 'file')}",
        **_model(checkpoint.hf_config, stored),
        "padding": f"{_count(checkpoint.vocabulary_padding, 'row')} of the vocabulary",
        "optimizer": "its state is here, too" if checkpoint.has_optimizer else "none",
        **_step(path),
        "config and tokenizer": str(checkpoint.hf),
    }


def _describe_hf(path: Path) -> dict[str, str]:
    hf_config = read_hf_config(path)
    quantized = {}
    if hf_config.get(KEY) is not None:
        stored = check_quantized(path)
        form = read_format(hf_config)
        quantized = {"quantized": f"{form} ({FORMATS[form]}), for serving alone"}
    else:
        headers = check_safetensors(path)
        # The architecture's tensors, not the files': those may hold a second copy of a tied head.
        shapes = find_architecture(hf_config).hf_tensors(hf_config)
        stored = {
            name: Planned(shapes[name], dtype)
            for name, dtype in model_dtypes(hf_config, headers).items()
        }
    files = len({info.file for info in read_headers(path).values()})
    return {
        "format": f"Hugging Face safetensors, {_count(files, 'file')}",
        **_model(hf_config, stored),
        **quantized,
    }


def _model(hf_config: Mapping[str, Any], stored: Mapping[str, Planned]) -> dict[str, str]:
    architecture = find_architecture(hf_config)
    sizes = architecture.sizes(hf_config)
    parameters = sum(map(prod, architecture.hf_tensors(hf_config).values()))
    nbytes = sum(planned.nbytes for planned in stored.values())
    head = "tied to the embedding" if sizes.tied else "of its own"
    heads = f"{sizes.heads} heads, {sizes.kv_heads} KV heads"
    experts = {}
    if architecture.moe:
        experts["experts"] = f"{sizes.experts} in each layer, inner width {sizes.expert_ffn}"
    return {
        "architecture": architecture.name,
        "layers": f"{sizes.layers}, hidden size {sizes.hidden}, {heads}",
        **experts,
        "vocabulary": f"{sizes.vocab}, head {head}",
        "parameters": f"{parameters:,} in {_count(len(stored), 'tensor')}, {nbytes / 1e9:.3f} GB",
        "dtype": ", ".join(sorted({planned.dtype for planned in stored.values()})),
    }


def _step(path: Path) -> dict[str, str]:
    """The training step of a checkpoint of training; nothing for a converted one."""
    if not (path / "trainer.json").exists():
        return {}
    state = read_json(path / "trainer.json").get("state")
    return {"training step": str(state.get("step"))} if isinstance(state, dict) else {}


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
