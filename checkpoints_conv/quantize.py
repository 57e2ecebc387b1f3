"""Quantization of a Hugging Face directory to FP8 for SGLang, with ModelOpt's arithmetic."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints_conv.dtypes import FP8
from checkpoints_conv.errors import ConfigError, ModelError
from checkpoints_conv.megatron_to_hf import MAX_SHARD_BYTES
from checkpoints_conv.output import check_free, written_beside
from checkpoints_conv.progress import Advance, Progress, silent
from checkpoints_conv.quantized import (
    BLOCK,
    KEY,
    block_tensor_parallel,
    check_blocks,
    quantized_plan,
    unquantized_modules,
    weight_groups,
)
from checkpoints_conv.ranks import Ranks
from checkpoints_conv.reader import (
    SafetensorsReader,
    check_safetensors,
    model_dtypes,
    read_hf_config,
)
from checkpoints_conv.writer import HfFiles, copy_companions, write_config, write_json

if TYPE_CHECKING:
    import torch

LARGEST = 448.0  # of float8_e4m3fn
BLOCKS = {-1: BLOCK, -2: BLOCK}


@dataclass(frozen=True)
class Quantized:
    """What `quantize` wrote."""

    nbytes: int  # of all tensors
    # Tensor-parallel sizes of a server whose ranks hold whole blocks; None for a format without.
    tensor_parallel: list[int] | None


def quantize(
    hf: str | Path,
    out: str | Path,
    form: str,
    *,
    input_maxima: Callable[[], Mapping[str, float]] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress = silent,
) -> Quantized:
    """Write the model of directory `hf` to `out` in FP8.

    Tensors that are not quantized keep their bits. Six times the largest matrix in float32 is held.
    `out` is complete or does not exist. Raises ConfigError without ModelOpt; ModelError for a
    damaged or unsupported model, blocks that do not fit, an `out` that is taken or has no room, and
    values that are not finite.

    hf: a Hugging Face model directory.
    out: the directory to write.
    form: `fp8` or `fp8-block`, see `quantized`.
    input_maxima: for fp8: measures the largest absolute value of the input that each quantized
    weight (by its name) is multiplied with. Called once all else is checked, because it is slow.
    max_shard_bytes: the largest file's bytes of data; a larger tensor gets its own file.
    progress: shows the bytes that are written.
    """
    check_modelopt()
    hf, out = Path(hf), Path(out)
    headers = check_safetensors(hf)
    hf_config = read_hf_config(hf)
    dtypes = model_dtypes(hf_config, headers)
    if form == "fp8-block":
        check_blocks(hf_config)
    plan = quantized_plan(hf_config, dtypes, form)
    nbytes = sum(planned.nbytes for planned in plan.values())
    check_free(out, nbytes)
    maxima = {} if input_maxima is None else input_maxima()
    import_modelopt()
    with written_beside(out, Ranks()) as partial, SafetensorsReader(hf) as reader:
        files = HfFiles(partial, plan, max_shard_bytes)
        files.create()
        try:
            with progress(nbytes) as advance:
                _write_tensors(files, reader, hf_config, form, maxima, advance)
            files.check_complete()
        finally:
            files.close()
        copy_companions(hf, partial)
        _write_configs(partial, hf_config, form)
    return Quantized(nbytes, block_tensor_parallel(hf_config) if form == "fp8-block" else None)


def check_modelopt() -> None:
    """Raise ConfigError if the extra `quantize` is not installed."""
    if importlib.util.find_spec("modelopt") is None:
        raise ConfigError(
            "quantizing needs nvidia-modelopt; run `pip install megatron_policysplit[quantize]`"
        )


def import_modelopt() -> None:
    """Import ModelOpt without the warnings that it prints at import.

    They are about a transformers newer than the one it names, and about what a CPU does not have.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        import modelopt.torch.export.convert_hf_config
        import modelopt.torch.quantization  # noqa: F401


def _write_tensors(
    files: HfFiles,
    reader: SafetensorsReader,
    hf_config: Mapping[str, Any],
    form: str,
    maxima: Mapping[str, float],
    advance: Advance,
) -> None:
    """Write every tensor of `files.plan`: the quantized ones with their scales, then the others."""
    import torch

    def write(name: str, tensor: torch.Tensor) -> None:
        files.write(name, tensor)
        advance(files.plan[name].nbytes)

    for group in weight_groups(hf_config):
        weights = {name: reader.get(name).float() for name in group}
        for name, weight in weights.items():
            if not weight.isfinite().all():
                raise ModelError(
                    f"tensor {name} in {reader.path} has values that are not finite; nothing is "
                    "kept"
                )
        if form == "fp8-block":
            quantized = {name: quantize_blocks(weight) for name, weight in weights.items()}
        else:
            quantized = quantize_together(weights)
        for name, (values, scale) in quantized.items():
            module = name.removesuffix(".weight")
            write(name, values)
            if form == "fp8-block":
                write(f"{module}.weight_scale_inv", scale)
            else:
                write(f"{module}.weight_scale", scale)
                write(f"{module}.input_scale", _positive(torch.tensor(maxima[name]) / LARGEST))
    for name, planned in files.plan.items():
        if name in reader.tensors and planned.dtype != FP8:
            write(name, reader.get(name))


def quantize_together(
    weights: Mapping[str, torch.Tensor],
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Quantize float32 weights by name to (values in FP8, their common scale, a scalar).

    The scale is the largest absolute value of all the weights / 448. SGLang gives matrices that it
    fuses the largest of their scales and rounds again those that had another; with one scale from
    the start it serves what is written here.
    """
    import torch
    from modelopt.torch.quantization.qtensor import FP8QTensor
    from modelopt.torch.quantization.utils import reduce_amax

    scale = _positive(
        torch.stack([reduce_amax(weight) for weight in weights.values()]).max() / LARGEST
    )
    return {
        name: (FP8QTensor.quantize(weight, scales=scale)[0]._quantized_data, scale)
        for name, weight in weights.items()
    }


def quantize_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize weight[n, k] to FP8 values [n, k] and scales of its blocks [n / 128, k / 128]."""
    from modelopt.torch.quantization.qtensor import FP8QTensor
    from modelopt.torch.quantization.utils import reduce_block_amax

    scales = _positive(reduce_block_amax(weight, BLOCKS) / LARGEST)
    return FP8QTensor.quantize(weight, scales=scales, block_sizes=BLOCKS)[0]._quantized_data, scales


def _positive(scales: torch.Tensor) -> torch.Tensor:
    """Replace scales of 0 by 1, because weights that are all zero would be divided by theirs."""
    return scales.masked_fill(scales == 0, 1.0)


def _write_configs(directory: Path, hf_config: Mapping[str, Any], form: str) -> None:
    """Write config.json with what SGLang reads about the format.

    `fp8` gets hf_quant_config.json, too, which older readers of ModelOpt's exports need.
    """
    from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format

    unquantized = unquantized_modules(hf_config)
    if form == "fp8-block":
        quantization: dict[str, Any] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": unquantized,
        }
    else:
        modelopt = {
            "producer": {
                "name": "modelopt",
                "version": importlib.metadata.version("nvidia-modelopt"),
            },
            "quantization": {
                "quant_algo": "FP8",
                "kv_cache_quant_algo": None,
                "exclude_modules": unquantized,
            },
        }
        write_json(directory / "hf_quant_config.json", modelopt)
        quantization = convert_hf_quant_config_format(modelopt)
    write_config(directory, {**hf_config, KEY: quantization}, None)
