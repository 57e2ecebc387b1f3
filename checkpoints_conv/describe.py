"""What a checkpoint directory holds, after checking that it is whole; no tensor is read."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from checkpoints_conv.architectures import architecture_of
from checkpoints_conv.dtypes import BYTES, SAFETENSORS
from checkpoints_conv.megatron_reader import MegatronCheckpoint, is_megatron, read_json
from checkpoints_conv.reader import check_safetensors, read_hf_config


def describe(path: str | Path, hf: str | Path | None = None) -> dict[str, str]:
    """Label -> text about a Hugging Face directory or a torch_dist checkpoint. hf: see `MegatronCheckpoint`.

    Raises ModelError or CheckpointError, as `check_safetensors` and `MegatronCheckpoint` do, unless it is whole.
    """
    path = Path(path)
    if not is_megatron(path):
        tensors = check_safetensors(path)
        hf_config = read_hf_config(path)
        wanted = architecture_of(hf_config).hf_tensors(hf_config)
        dtypes = {name: SAFETENSORS[tensors[name].dtype] for name in wanted}
        files = len({info.file for info in tensors.values()})
        return {"format": f"Hugging Face safetensors, {_count(files, 'file')}", **_model(hf_config, dtypes)}
    checkpoint = MegatronCheckpoint(path, hf)
    files = len(list(path.glob("*.distcp")))
    return {
        "format": f"Megatron-Core torch_dist, {_count(files, 'file')}",
        **_model(checkpoint.hf_config, checkpoint.hf_dtypes()),
        "padding": f"{_count(checkpoint.vocabulary_padding, 'row')} of the vocabulary",
        "optimizer": "its state is here, too" if checkpoint.has_optimizer else "none",
        **_step(path),
        "config and tokenizer": str(checkpoint.hf),
    }


def _model(hf_config: Mapping[str, Any], dtypes: Mapping[str, str]) -> dict[str, str]:
    architecture = architecture_of(hf_config)
    sizes = architecture.sizes(hf_config)
    shapes = architecture.hf_tensors(hf_config)
    parameters = sum(map(prod, shapes.values()))
    nbytes = sum(prod(shape) * BYTES[dtypes[name]] for name, shape in shapes.items())
    head = "tied to the embedding" if sizes.tied else "of its own"
    return {
        "architecture": architecture.name,
        "layers": f"{sizes.layers}, hidden size {sizes.hidden}, {sizes.heads} heads, {sizes.kv_heads} KV heads",
        **({"experts": f"{sizes.experts} in each layer, inner width {sizes.expert_ffn}"} if architecture.moe else {}),
        "vocabulary": f"{sizes.vocab}, head {head}",
        "parameters": f"{parameters:,} in {_count(len(shapes), 'tensor')}, {nbytes / 1e9:.3f} GB",
        "dtype": ", ".join(sorted(set(dtypes.values()))),
    }


def _step(path: Path) -> dict[str, str]:
    if not (path / "trainer.json").exists():
        return {}
    state = read_json(path / "trainer.json").get("state")
    return {"training step": str(state.get("step"))} if isinstance(state, dict) else {}


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
