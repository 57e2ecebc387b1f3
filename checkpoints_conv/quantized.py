"""FP8 directories as SGLang reads them: which tensors they hold, and how config.json says so.

`fp8`: one scale for all that serving fuses into a matrix (query, key and value; gate and up
projection) and a fixed scale for its input; the layout of ModelOpt's own exports. `fp8-block`: a
scale for each block of 128 x 128 weights, activations scaled as they come; the layout of DeepSeek's
and Qwen's FP8 models. Embedding, head, norms, biases and the routers of experts stay as they are in
both.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints_conv.architectures import find_architecture
from checkpoints_conv.dtypes import FP8, SAFETENSORS
from checkpoints_conv.errors import ModelError
from checkpoints_conv.mapping import gate_up, qkv, row_parallel
from checkpoints_conv.reader import (
    DTYPES,
    TensorInfo,
    check_shape,
    listed,
    read_headers,
    read_hf_config,
)
from checkpoints_conv.writer import Planned

FORMATS = {
    "fp8": "FP8, one scale a matrix, fixed scales of activations",
    "fp8-block": "FP8, a scale for each 128 x 128 weights, activations scaled as they come",
}
BLOCK = 128
KEY = "quantization_config"


def weight_groups(hf_config: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Names of the weights that are quantized, grouped by what serving fuses into one matrix."""
    # A source of one dimension is a bias.
    return [
        tuple(src.name for src in mapping.sources)
        for _, part in find_architecture(hf_config).mappings(hf_config)
        for mapping in part
        if mapping.rule in (qkv, gate_up, row_parallel) and len(mapping.sources[0].dims) == 2
    ]


def scale_shapes(weight: str, shape: tuple[int, ...], form: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the scales that stand beside a quantized weight; all are float32."""
    module = weight.removesuffix(".weight")
    if form == "fp8":
        return {f"{module}.weight_scale": (), f"{module}.input_scale": ()}
    return {f"{module}.weight_scale_inv": tuple(-(-size // BLOCK) for size in shape)}


def quantized_plan(
    hf_config: Mapping[str, Any], dtypes: Mapping[str, str], form: str
) -> dict[str, Planned]:
    """Name -> shape and dtype of every tensor of a quantized model.

    dtypes: name -> dtype of the tensors that are not quantized.
    """
    quantized = {name for group in weight_groups(hf_config) for name in group}
    plan: dict[str, Planned] = {}
    for name, shape in find_architecture(hf_config).hf_tensors(hf_config).items():
        if name not in quantized:
            plan[name] = Planned(shape, dtypes[name])
            continue
        plan[name] = Planned(shape, FP8)
        scales = scale_shapes(name, shape, form)
        plan.update({scale: Planned(size, "float32") for scale, size in scales.items()})
    return plan


def unquantized_modules(hf_config: Mapping[str, Any]) -> list[str]:
    """Module names of the linear maps that are not quantized: the head and routers of experts."""
    architecture = find_architecture(hf_config)
    layers = architecture.sizes(hf_config).layers if architecture.moe else 0
    return ["lm_head", *(f"model.layers.{layer}.mlp.gate" for layer in range(layers))]


def check_blocks(hf_config: Mapping[str, Any]) -> None:
    """Raise ModelError unless every matrix consists of whole blocks, as SGLang requires."""
    for key, size in _block_dimensions(hf_config).items():
        if size % BLOCK:
            raise ModelError(
                f"--format fp8-block cuts matrices into blocks of {BLOCK} x {BLOCK}, but "
                f"{key}={size} of the model is no multiple of {BLOCK}; use --format fp8"
            )


def block_tensor_parallel(hf_config: Mapping[str, Any]) -> list[int]:
    """Tensor-parallel sizes at which every rank of a server has whole blocks of every matrix."""
    sizes = find_architecture(hf_config).sizes(hf_config)
    inner = sizes.expert_ffn or sizes.ffn

    def fits(tensor: int) -> bool:
        fewer, more = sorted((tensor, sizes.kv_heads))
        if sizes.heads % tensor or inner % tensor or more % fewer:
            return False
        kv_heads = max(1, sizes.kv_heads // tensor)  # more ranks than heads have copies
        rows = (sizes.heads // tensor * sizes.head_dim, kv_heads * sizes.head_dim, inner // tensor)
        return not any(size % BLOCK for size in rows)

    return [tensor for tensor in range(1, sizes.heads + 1) if fits(tensor)]


def read_format(hf_config: Mapping[str, Any]) -> str:
    """The format that config.json names; ModelError if it is not one of `FORMATS`."""
    entry = hf_config[KEY]
    if isinstance(entry, Mapping):
        if entry.get("quant_method") == "modelopt" and entry.get("quant_algo") == "FP8":
            return "fp8"
        blocks = (
            entry.get("weight_block_size") == [BLOCK, BLOCK]
            and entry.get("activation_scheme") == "dynamic"
        )
        if entry.get("quant_method") == "fp8" and blocks:
            return "fp8-block"
    method = entry.get("quant_method") if isinstance(entry, Mapping) else entry
    raise ModelError(
        f"config.json: {KEY} with quant_method={method!r} is not one of the formats that are "
        f"known: {', '.join(FORMATS)} of `policysplit convert quantize`"
    )


def check_quantized(path: str | Path) -> dict[str, Planned]:
    """Check that a quantized directory holds exactly its format's tensors, and return them.

    Reads headers only. Raises ModelError for a format that is not known and for a tensor that is
    missing, has another shape or type, or that the model does not have.
    """
    hf_config = read_hf_config(path)
    form = read_format(hf_config)
    plain = {key: value for key, value in hf_config.items() if key != KEY}
    architecture = find_architecture(plain)
    architecture.megatron_arguments(plain)
    headers = read_headers(path)
    # Tensors that are not quantized may have any float type: `_check` does not look at the plan's.
    plan = quantized_plan(plain, dict.fromkeys(architecture.hf_tensors(plain), "float32"), form)
    missing = [name for name in plan if name not in headers]
    if missing:
        raise ModelError(f"{path} lacks {listed(missing)} that {architecture.name} in {form} needs")
    for name, planned in plan.items():
        _check(name, headers[name], planned)
    extra = [name for name in headers if name not in plan]
    if extra:
        raise ModelError(
            f"{path} has {listed(extra)} that {architecture.name} in {form} does not know"
        )
    return {name: Planned(headers[name].shape, SAFETENSORS[headers[name].dtype]) for name in plan}


def _check(name: str, info: TensorInfo, planned: Planned) -> None:
    """Raise ModelError if a tensor has another shape than planned, or not a dtype of its kind."""
    check_shape(name, info.shape, planned.shape, info.file)
    allowed = ("F8_E4M3",) if planned.dtype == FP8 else DTYPES
    if info.dtype not in allowed:
        raise ModelError(
            f"tensor {name} in {info.file} has dtype {info.dtype}; it must be "
            f"{' or '.join(allowed)}"
        )


def _block_dimensions(hf_config: Mapping[str, Any]) -> dict[str, int]:
    """Every dimension of the quantized matrices, under its name in config.json."""
    architecture = find_architecture(hf_config)
    sizes = architecture.sizes(hf_config)
    inner = (
        {"moe_intermediate_size": sizes.expert_ffn}
        if architecture.moe
        else {"intermediate_size": sizes.ffn}
    )
    return {
        "hidden_size": sizes.hidden,
        "num_attention_heads x head_dim": sizes.heads * sizes.head_dim,
        "num_key_value_heads x head_dim": sizes.kv_heads * sizes.head_dim,
        **inner,
    }
