"""Writing a Hugging Face model directory that is either complete or not there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoints_conv.reader import INDEX, SINGLE, read_hf_config
from megatron_policysplit.errors import ModelError

if TYPE_CHECKING:
    import torch

COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "chat_template*",
    "additional_chat_templates",
)


def write_hf(
    path: str | Path,
    source_dir: str | Path,
    tensors: "Iterable[tuple[str, torch.Tensor]]",
    dtype: "torch.dtype",
    max_shard_bytes: int = 5 * 2**30,
) -> None:
    """Write a complete model directory: `tensors` under their names, everything else from `source_dir`.

    Tensors are cast to `dtype` and written in the order they come, in files of at most `max_shard_bytes`
    bytes of data (a larger tensor gets its own file); no more than one file's tensors is held at a time.
    All is written beside `path` and renamed at the end, so a killed run leaves no half-written model. An
    existing model directory at `path` is replaced; ModelError if something else is there.
    """
    path = Path(path)
    hf_config = read_hf_config(source_dir)
    partial, previous = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.previous")
    if path.exists() and not (path / "config.json").is_file() and not (path.is_dir() and not any(path.iterdir())):
        raise ModelError(f"{path} exists and is not a Hugging Face model directory; choose another path")
    if previous.exists() and not path.exists():
        previous.rename(path)  # an earlier writer was killed between its two renames
    shutil.rmtree(previous, ignore_errors=True)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_tensors(partial, tensors, dtype, max_shard_bytes)
        _copy_companions(Path(source_dir), partial)
        name = str(dtype).removeprefix("torch.")
        keys = [key for key in ("dtype", "torch_dtype") if key in hf_config] or ["torch_dtype"]
        _write_json(partial / "config.json", {**hf_config, **dict.fromkeys(keys, name)})
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if path.exists():
        path.rename(previous)
    partial.rename(path)
    shutil.rmtree(previous, ignore_errors=True)


def _write_tensors(directory: Path, tensors, dtype, max_shard_bytes: int) -> None:
    from safetensors.torch import save_file

    shards: list[list[str]] = []
    held: dict[str, "torch.Tensor"] = {}
    held_bytes = total_bytes = 0

    def flush() -> None:
        nonlocal held_bytes
        save_file(held, directory / f"{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()
        held_bytes = 0

    for name, tensor in tensors:
        # A copy, because a streaming source may reuse its buffer for the next tensor.
        tensor = tensor.detach().to(device="cpu", dtype=dtype, copy=True).contiguous()
        if held and held_bytes + tensor.nbytes > max_shard_bytes:
            flush()
        held[name] = tensor
        held_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    if not held:
        raise ModelError(f"no tensors were given to write to {directory}")
    flush()
    if len(shards) == 1:
        (directory / "0.safetensors").rename(directory / SINGLE)
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"{number}.safetensors").rename(directory / file)
        weight_map.update(dict.fromkeys(names, file))
    _write_json(directory / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


def _copy_companions(source_dir: Path, directory: Path) -> None:
    for pattern in COPIED:
        for file in source_dir.glob(pattern):
            (shutil.copytree if file.is_dir() else shutil.copyfile)(file, directory / file.name)


def _write_json(file: Path, value: dict) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
