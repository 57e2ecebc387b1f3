"""Megatron-Core on a machine without a GPU. The only place that asks which device there is.

Megatron-Core names CUDA in its allocations, its RNG tracker and a few type checks. Without a GPU,
`install()` answers those with the CPU: placements on "cuda" go to the CPU, streams and events do
nothing, the RNG tracker uses the CPU generator, and `Tensor.type()` answers as the optimizer
expects. With a GPU nothing is changed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_policysplit.distributed.device import on_cpu

_redirect: _Redirect | None = None


def model_options() -> dict[str, Any]:
    """TransformerConfig fields that differ between the devices: fused kernels exist on the GPU
    only.
    """
    fused = not on_cpu()
    return {
        "use_cpu_initialization": not fused,
        "bias_activation_fusion": fused,
        "bias_dropout_fusion": fused,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": fused,
        "gradient_accumulation_fusion": False,
    }


def install() -> None:
    """Redirect Megatron-Core's CUDA calls to the CPU in this thread; once, and only without a GPU."""
    global _redirect
    if not on_cpu() or _redirect is not None:
        return
    cuda = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.set_device = lambda *args, **kwargs: None
    cuda.Stream = cuda.Event = _NoOp
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.default_stream = cuda.current_stream = lambda *args, **kwargs: _NoOp()
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.random.get_rng_state = cuda.get_rng_state

    import megatron.core.tensor_parallel.mappings as mappings
    import megatron.core.tensor_parallel.random as megatron_random
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    if not hasattr(
        moe_utils, "te_general_gemm"
    ):  # a router asks whether it is None; without Transformer Engine
        moe_utils.te_general_gemm = None  # some versions do not say so
    token_dispatcher.maybe_move_tensor_to_cpu = _as_on_the_host
    mappings._gather_along_first_dim = partial(_gather, mappings._gather_along_first_dim)
    mappings._reduce_scatter_along_first_dim = partial(
        _reduce_scatter, mappings._reduce_scatter_along_first_dim
    )
    _redirect = _Redirect()
    _redirect.__enter__()


def _as_on_the_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """What Megatron makes of a tensor that it copies from the GPU: numbers of tokens, in numpy for
    collectives.
    """
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def _gather(
    equal,
    tensor,
    group,
    output_split_sizes: Sequence[int] | None = None,
    use_global_buffer: bool = False,
):
    """Rows of all ranks one after the other; gloo gathers equal numbers only, so that fewer rows
    are padded.
    """
    sizes = output_split_sizes
    if sizes is None or len(set(sizes)) == 1:
        return equal(tensor, group, sizes, use_global_buffer)
    padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(parts, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _reduce_scatter(
    equal, tensor, group, input_split_sizes: Sequence[int] | None = None, use_global_buffer=False
):
    """This rank's rows of the sum over ranks; gloo scatters equal numbers only, so that all get all
    and take theirs.
    """
    sizes = input_split_sizes
    if sizes is None or len(set(sizes)) == 1:
        return equal(tensor, group, sizes, use_global_buffer)
    total = tensor.clone()
    torch.distributed.all_reduce(total, group=group)
    return total.split(list(sizes))[group.rank()].clone()


class _NoOp:
    """A stream or event that does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name):
        return lambda *args, **kwargs: None

    def record_event(self, *args, **kwargs) -> _NoOp:
        return _NoOp()


def _names_cuda(value) -> bool:
    if isinstance(value, bool):
        return False
    if isinstance(value, int):
        return True
    if isinstance(value, str):
        return value.startswith("cuda")
    return isinstance(value, torch.device) and value.type == "cuda"


class _Redirect(TorchFunctionMode):
    """Sends every CUDA placement to the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if "device" in kwargs and _names_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": "cpu"}
        name = getattr(func, "__name__", "")
        if name == "cuda" and args and isinstance(args[0], torch.Tensor):
            return args[0]
        if name == "to" and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        if name == "type" and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.")
        return func(*args, **kwargs)
