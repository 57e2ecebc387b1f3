"""Lets Megatron-Core run on a machine without a GPU.

Megatron-Core names CUDA in its allocations, its RNG tracker and a few type checks. Without a GPU,
`install()` answers those with the CPU: placements on "cuda" go to the CPU, streams and events do
nothing, the RNG tracker uses the CPU generator, and `Tensor.type()` answers as the optimizer
expects. With a GPU nothing is changed.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_policysplit.distributed.device import hide_gpu_packages, on_cpu

_redirect: _Redirect | None = None


def model_options(transformer_engine: bool, deterministic: bool) -> dict[str, Any]:
    """TransformerConfig fields that differ between devices: fused kernels exist on a GPU only.

    transformer_engine: whether the layers are Transformer Engine's.
    deterministic: train.deterministic.
    """
    fused = not on_cpu()
    return {
        "use_cpu_initialization": not fused,
        "bias_activation_fusion": fused,
        "bias_dropout_fusion": fused,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": fused and transformer_engine,  # by its kernel
        # Each product that gives a weight's gradient adds it to the fp32 sum at once, where bf16
        # would round it first. Megatron's own layers need a kernel of Apex for it.
        "gradient_accumulation_fusion": fused and transformer_engine,
        # The embedding's gradient is then summed by another operation. On the CPU the usual one
        # gives the same bits every time already, and the other one sums in another order.
        "deterministic_mode": deterministic and not on_cpu(),
    }


def import_megatron() -> None:
    """Import Megatron-Core without packages that it asks for and this process does not use.

    wandb, which only Megatron's inference server needs, takes a third of a second to import and
    leaves two directories in /tmp behind a process that ends by os._exit; `logs/wandb.py` imports
    it where a run logs to it.
    """
    hide_gpu_packages()
    is_hidden = "wandb" not in sys.modules
    if is_hidden:
        sys.modules["wandb"] = None  # an import fails as if it were not installed
    try:
        import megatron.core  # noqa: F401
    finally:
        if is_hidden:
            del sys.modules["wandb"]


def install() -> None:
    """Redirect Megatron-Core's CUDA calls to the CPU in this thread, if there is no GPU.

    A second call does nothing. It must run before the first model or process group is made.
    """
    global _redirect
    if not on_cpu() or _redirect is not None:
        return
    import_megatron()
    cuda = torch.cuda
    # Devices: Megatron places tensors on what this returns.
    cuda.current_device = lambda: torch.device("cpu")
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.set_device = lambda *args, **kwargs: None
    # Streams and events order work on a GPU; on the CPU everything is in order already.
    cuda.Stream = cuda.Event = _NoOp
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.default_stream = cuda.current_stream = lambda *args, **kwargs: _NoOp()
    # RNG states: Megatron's tracker forks them around tensor-parallel regions.
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.random.get_rng_state = cuda.get_rng_state

    import megatron.core.tensor_parallel.mappings as mappings
    import megatron.core.tensor_parallel.random as megatron_random
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    # The tracker goes through these two, which read torch's CUDA generators directly.
    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # A router of experts asks whether this is None, but some versions of Megatron-Core leave it
    # undefined without Transformer Engine.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    token_dispatcher.maybe_move_tensor_to_cpu = _host_tensor
    # Collectives over unequal numbers of rows, which NCCL has and gloo has not.
    mappings._gather_along_first_dim = partial(_gather, mappings._gather_along_first_dim)
    mappings._reduce_scatter_along_first_dim = partial(
        _reduce_scatter, mappings._reduce_scatter_along_first_dim
    )
    # Entered and never left: the mode stays on for the life of the thread.
    _redirect = _Redirect()
    _redirect.__enter__()


def _host_tensor(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Return what Megatron expects of a copy to the host, where the tensor is already.

    The MoE token dispatcher copies numbers of tokens, in numpy where they are split sizes.
    """
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def _gather(
    gather_equal,
    tensor,
    group,
    output_split_sizes: Sequence[int] | None = None,
    use_global_buffer: bool = False,
):
    """Gather the rows of all ranks, one rank after the other (one all-gather).

    gather_equal: Megatron's function. gloo gathers equal numbers of rows only, so unequal ones are
    padded to the largest number and cut again.
    """
    sizes = output_split_sizes
    if sizes is None or len(set(sizes)) == 1:
        return gather_equal(tensor, group, sizes, use_global_buffer)
    padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(parts, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _reduce_scatter(
    scatter_equal,
    tensor,
    group,
    input_split_sizes: Sequence[int] | None = None,
    use_global_buffer=False,
):
    """Sum over ranks and return this rank's rows of the sum (one all-reduce).

    scatter_equal: Megatron's function. gloo scatters equal numbers of rows only, so with unequal
    ones every rank gets the whole sum and takes its rows.
    """
    sizes = input_split_sizes
    if sizes is None or len(set(sizes)) == 1:
        return scatter_equal(tensor, group, sizes, use_global_buffer)
    total = tensor.clone()
    torch.distributed.all_reduce(total, group=group)
    return total.split(list(sizes))[group.rank()].clone()


class _NoOp:
    """A stream or event whose every method does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name):
        return lambda *args, **kwargs: None

    def record_event(self, *args, **kwargs) -> _NoOp:
        return _NoOp()


def _names_cuda(value) -> bool:
    """Whether a device argument means a GPU, in any of the forms that torch accepts."""
    # A bool is an int, but the second argument of `Tensor.to` may be `non_blocking`.
    if isinstance(value, bool):
        return False
    if isinstance(value, int):  # torch takes a bare number as that of a GPU
        return True
    if isinstance(value, str):
        return value.startswith("cuda")
    return isinstance(value, torch.device) and value.type == "cuda"


class _Redirect(TorchFunctionMode):
    """Sends every CUDA placement to the CPU.

    torch hands each of its function calls to an active mode first, so this also reaches calls deep
    inside Megatron-Core.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if "device" in kwargs and _names_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": "cpu"}
        name = getattr(func, "__name__", "")
        # tensor.cuda(): it is where it should be.
        if name == "cuda" and args and isinstance(args[0], torch.Tensor):
            return args[0]
        # tensor.to("cuda", ...): the device is positional here.
        if name == "to" and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        # tensor.type(): Megatron's optimizers sort parameters by names such as
        # "torch.cuda.FloatTensor" and refuse all others.
        if name == "type" and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.")
        return func(*args, **kwargs)
