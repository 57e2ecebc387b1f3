"""How the kernels of the LM head are launched: in which blocks, and where the choice is kept.

Importing this module imports triton.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
FEW_TOKENS = 256  # calls of at most so many tokens are tuned apart


class Kernel:
    """A jitted function in two forms: `plain` takes its blocks, `tuned` finds them by timing.

    The choice is kept on disk, in Triton's cache: another one would change the last bits of a
    resumed run.
    """

    def __init__(self, plain, blocks: list[tuple[int, int, int, int, int]]):
        configs = [
            triton.Config(
                {"BLOCK_T": t, "BLOCK_V": v, "BLOCK_H": h}, num_warps=warps, num_stages=stages
            )
            for t, v, h, warps, stages in blocks
        ]
        self.plain = plain
        # With a nucleus the kernel of the gradient needs more registers.
        key = [name for name in ("H", "FEW", "NUCLEUS") if name in plain.arg_names]
        self.tuned = triton.autotune(configs, key=key, cache_results=True)(plain)


# Candidates for tuning: tokens, columns and features of a block, warps, stages. Shared memory holds
# the blocks of its operands, 2 bytes a number, once for each stage (one stage less before compute
# capability 9.0, and at 12.0). A candidate that needs more than the GPU has is passed over. The
# last of each list needs at most 72 KiB on any GPU. A kernel that makes two products at a time
# keeps two tiles of logits in registers, so its blocks are smaller.
ONE_PRODUCT = [
    (128, 256, 64, 8, 3),
    (128, 256, 64, 8, 4),
    (128, 128, 64, 4, 3),
    (64, 128, 64, 4, 4),
    (64, 128, 64, 4, 3),
]
TWO_PRODUCTS = [
    (128, 128, 64, 8, 3),
    (128, 128, 64, 8, 4),
    (64, 256, 64, 8, 3),
    (64, 128, 64, 4, 4),
    (64, 64, 64, 4, 3),
]


def launch(
    kernel: Kernel, grid, hidden: Tensor, tensors: tuple, numbers: tuple, **options: bool
) -> None:
    """Run a kernel with the blocks that suit the dtype of `hidden` and the machine."""
    tokens, features = hidden.shape
    constants = {
        "H": features,
        # The interpreter cannot multiply bf16 (see `triton_kernels._operand`).
        "UPCAST": INTERPRETED and hidden.dtype == torch.bfloat16,
        # No kernel reads it. It is a key of the tuning: blocks that suit many tokens do not suit
        # few, and tuning for each number of tokens would take too long.
        "FEW": tokens <= FEW_TOKENS,
    }
    if INTERPRETED:
        run, constants = kernel.plain, constants | {"BLOCK_T": 16, "BLOCK_V": 32, "BLOCK_H": 32}
    elif hidden.dtype == torch.float32:
        # No tensor cores: wide tiles would only spill registers.
        blocks = {"BLOCK_T": 64, "BLOCK_V": 64, "BLOCK_H": 32, "num_warps": 8, "num_stages": 2}
        run, constants = kernel.plain, constants | blocks
    else:
        run = kernel.tuned
    run[grid](*tensors, *numbers, **constants, **options)
