"""The float types of weights by the names that config.json, safetensors and torch give them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from checkpoints_conv.errors import ModelError

if TYPE_CHECKING:
    import torch

FP8 = "float8_e4m3fn"  # of weights that `quantize` wrote; training and conversion read none
# safetensors' name -> torch's
SAFETENSORS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F8_E4M3": FP8}
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, FP8: 1}


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype called float32, bfloat16 or float16."""
    import torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a torch dtype, such as float32."""
    return str(dtype).removeprefix("torch.")


def widest(names: set[str]) -> str:
    """The smallest of float32, bfloat16 and float16 that holds values of all `names` exactly."""
    # bfloat16 and float16 differ in range and in precision, so only float32 holds both.
    return next(iter(names)) if len(names) == 1 else "float32"


def check_cast(dtypes: Mapping[str, str], target: str | None, allow_downcast: bool) -> None:
    """Raise ModelError if a cast of one of `dtypes` (tensor name -> dtype) to `target` would round.

    A `target` of None means no cast; `allow_downcast` lets any cast pass.
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
