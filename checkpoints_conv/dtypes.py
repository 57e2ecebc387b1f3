"""The float types of weights by the names that config.json, safetensors and torch give them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from checkpoints_conv.errors import ModelError

if TYPE_CHECKING:
    import torch

FP8 = "float8_e4m3fn"  # of weights that `quantize` wrote; training and conversion read none
SAFETENSORS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F8_E4M3": FP8}
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, FP8: 1}


def torch_dtype(name: str) -> torch.dtype:
    """float32, bfloat16 or float16 as torch has it."""
    import torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def widest(names: set[str]) -> str:
    """The smallest type that holds values of all of them exactly."""
    return next(iter(names)) if len(names) == 1 else "float32"


def check_cast(dtypes: Mapping[str, str], target: str | None, allow_downcast: bool) -> None:
    """Raise ModelError if a tensor's type (name -> dtype) cannot be cast to `target` without
    rounding.
    """
    if target is None or allow_downcast:
        return
    rounded = [name for name, dtype in dtypes.items() if dtype != target and target != "float32"]
    if rounded:
        more = f" and {len(rounded) - 1} more" if len(rounded) > 1 else ""
        raise ModelError(
            f"--dtype {target} would round tensor {rounded[0]} ({dtypes[rounded[0]]}){more}; add "
            "--allow-downcast if that is meant"
        )
