"""Megatron-Core on a machine without a GPU. The only place that asks which device there is.

Megatron-Core names CUDA in its allocations, its RNG tracker and a few type checks. Without a GPU,
`install()` answers those with the CPU: placements on "cuda" go to the CPU, streams and events do
nothing, the RNG tracker uses the CPU generator, and `Tensor.type()` answers as the optimizer expects.
With a GPU nothing is changed.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import math
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_redirect: "_Redirect | None" = None


def active() -> bool:
    """Whether this process trains on the CPU."""
    return not torch.cuda.is_available()


def device() -> torch.device:
    """The device of this rank's parameters (call after `parallel.initialize` on a GPU)."""
    return torch.device("cpu") if active() else torch.device("cuda", torch.cuda.current_device())


def backend() -> str:
    """torch.distributed backend of the model-parallel and data-parallel groups."""
    return "gloo" if active() else "nccl"


def use_transformer_engine() -> bool:
    """Transformer Engine layers on a GPU, Megatron's own layers without one."""
    return not active()


def model_options() -> dict[str, Any]:
    """TransformerConfig fields that differ between the devices: fused kernels exist on the GPU only."""
    fused = not active()
    return {
        "use_cpu_initialization": not fused,
        "bias_activation_fusion": fused,
        "bias_dropout_fusion": fused,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": fused,
        "gradient_accumulation_fusion": False,
    }


def head_chunk_tokens() -> int:
    """Tokens whose logits are made at a time, unless the configuration says. Enough to keep the device busy."""
    return 256 if active() else 1024


def use_triton() -> bool:
    """Whether the LM head is computed by Triton kernels: on a GPU where nothing is missing."""
    return not active() and missing_triton() is None


def missing_triton() -> str | None:
    """Why a GPU computes the LM head in plain torch, and what to do; None if its kernels can run, or without a GPU.

    They need Triton 3.4, which torch 2.8 brings.
    """
    if active():
        return None
    if importlib.util.find_spec("triton") is None:
        found = "is not installed"
    elif tuple(map(int, importlib.metadata.version("triton").split(".")[:2])) < (3, 4):
        found = f"{importlib.metadata.version('triton')} is too old for its kernels"
    else:
        return None
    return f"the LM head is computed in plain torch: triton {found}; pip install 'triton>=3.4' (torch 2.8 brings it)"


def gpu_count() -> int:
    """GPUs that this process sees."""
    return 0 if active() else torch.cuda.device_count()


def server_options(device: str | None, tensor: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Flags and environment variables that SGLang needs on the CPU; none on a GPU.

    device: as the user asks for it; None is what this machine has. tensor: tensor-parallel size of the server.

    PyPI has no compiled CPU kernels, so that the compute is plain torch. The threads of an idle pool must sleep, or
    decoding single requests is several times slower, and the key-value cache would take most of the memory there is.
    """
    if device != "cpu" and (device is not None or not active()):
        return {}, {}
    arguments = {
        "device": "cpu",
        "attention-backend": "torch_native",
        "sampling-backend": "pytorch",
        "grammar-backend": "none",
        "cuda-graph-backend-decode": "disabled",
        "disable-overlap-schedule": True,
        "sleep-on-idle": True,
        "enable-memory-saver": False,
        "max-total-tokens": 16384,
    }
    environment = {"SGLANG_USE_CPU_ENGINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    if tensor > 1:  # else SGLang wants a NUMA node for each rank
        cores = sorted(os.sched_getaffinity(0))
        shares = [cores[rank::tensor] or [cores[rank % len(cores)]] for rank in range(tensor)]
        environment["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, share)) for share in shares)
    return arguments, environment


def set_device(local_rank: int) -> None:
    """Bind this process to its GPU, if there is one."""
    if not active():
        torch.cuda.set_device(local_rank)


def peak_memory_bytes() -> int:
    """Peak memory of this rank: allocated on the GPU, or resident on the CPU."""
    if not active():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def free_memory_bytes() -> float:
    """Memory of this rank's GPU that no process holds; infinite on the CPU, where nothing shares one with engines."""
    return math.inf if active() else float(torch.cuda.mem_get_info()[0])


def return_freed_memory() -> None:
    """Finish what is queued on the GPU, and let other processes have the memory that this one freed."""
    if not active():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def host_memory(nbytes: int) -> torch.Tensor:
    """uint8[nbytes] on the host, pinned where there is a GPU to copy from."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=not active())


def rng_states() -> dict[str, torch.Tensor]:
    """Generator states of this rank (uint8 tensors): the CPU's and, on a GPU, the device's."""
    states = {"cpu": torch.get_rng_state()}
    if not active():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_rng_states(states: dict[str, torch.Tensor]) -> None:
    """Inverse of `rng_states`."""
    torch.set_rng_state(states["cpu"])
    if not active():
        torch.cuda.set_rng_state(states["cuda"])


def install() -> None:
    """Redirect Megatron-Core's CUDA calls to the CPU in this thread; once, and only without a GPU."""
    global _redirect
    if not active() or _redirect is not None:
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
    if not hasattr(moe_utils, "te_general_gemm"):  # a router asks whether it is None; without Transformer Engine
        moe_utils.te_general_gemm = None  # some versions do not say so
    token_dispatcher.maybe_move_tensor_to_cpu = _as_on_the_host
    mappings._gather_along_first_dim = partial(_gather, mappings._gather_along_first_dim)
    mappings._reduce_scatter_along_first_dim = partial(_reduce_scatter, mappings._reduce_scatter_along_first_dim)
    _redirect = _Redirect()
    _redirect.__enter__()


def _as_on_the_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """What Megatron makes of a tensor that it copies from the GPU: numbers of tokens, in numpy for collectives."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def _gather(equal, tensor, group, output_split_sizes: Sequence[int] | None = None, use_global_buffer: bool = False):
    """Rows of all ranks one after the other; gloo gathers equal numbers only, so that fewer rows are padded."""
    sizes = output_split_sizes
    if sizes is None or len(set(sizes)) == 1:
        return equal(tensor, group, sizes, use_global_buffer)
    padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(parts, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _reduce_scatter(equal, tensor, group, input_split_sizes: Sequence[int] | None = None, use_global_buffer=False):
    """This rank's rows of the sum over ranks; gloo scatters equal numbers only, so that all get all and take theirs."""
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

    def record_event(self, *args, **kwargs) -> "_NoOp":
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
