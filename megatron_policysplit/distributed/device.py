"""The device that a rank trains on. Every question about it is asked here."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_policysplit.errors import MachineError


def on_cpu() -> bool:
    """Whether this process trains on the CPU."""
    return not torch.cuda.is_available()


def hide_gpu_packages() -> None:
    """Without a GPU, make Megatron-Core pass over Transformer Engine and Apex.

    Where they are installed for a GPU that is hidden now, it would take its norms, its optimizers
    and its reductions from them, which do not run on a CPU. Call before Megatron-Core is imported.
    """
    if on_cpu():
        for name in ("transformer_engine", "apex"):
            sys.modules.setdefault(name, None)  # None: an import fails as if it were not installed


def training_device() -> torch.device:
    """The device of this rank's parameters (call after `parallel.initialize` on a GPU)."""
    return torch.device("cpu") if on_cpu() else torch.device("cuda", torch.cuda.current_device())


def backend() -> str:
    """torch.distributed backend of the model-parallel and data-parallel groups."""
    return "gloo" if on_cpu() else "nccl"


@functools.cache
def transformer_engine_problem() -> str | None:
    """Return why Transformer Engine cannot be used, as half a sentence; None if it can.

    Megatron-Core takes an import that fails for a package that is not installed, so this must be
    asked before its layers are made.
    """
    if on_cpu():
        return "there is no GPU"
    if importlib.util.find_spec("transformer_engine") is None:
        return "Transformer Engine is not installed"
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # of its loader, of ctypes, or of an extension for another torch
        said = " ".join(str(error).split())[:200] or type(error).__name__
        try:
            importlib.metadata.version("transformer_engine_torch")
        except importlib.metadata.PackageNotFoundError:
            return f"Transformer Engine's part for torch is not installed ({said})"
        return f"Transformer Engine cannot be imported ({said})"
    return None


def nccl_version() -> str | None:
    """Return the version of torch's NCCL; None without a GPU, where gloo stands in for it."""
    return None if on_cpu() else ".".join(map(str, torch.cuda.nccl.version()))


def use_fused_attention() -> bool:
    """Whether local layers use torch's fused attention kernels: on a GPU.

    On the CPU they use plain products, whose bits do not depend on what else is computed.
    """
    return not on_cpu()


def head_chunk_tokens() -> int:
    """Tokens whose logits are made at a time by default; enough to keep the device busy."""
    return 256 if on_cpu() else 1024


def width_multiple() -> int:
    """What the width of a micro-batch is a multiple of, beside what its layout asks for.

    On a GPU every new width costs a table of rotary positions and kernels of its own: compiled ones
    for the fused functions, chosen ones for the products. On the CPU it costs nothing.
    """
    return 1 if on_cpu() else 64


def tile_elements() -> int:
    """Logits that the LM head's elementwise work takes at a time in plain torch.

    On a CPU a tile and its temporary tensors stay in the cache (1 MiB in fp32). On a GPU each of
    the dozen operations on a tile should take longer than its launch, and each temporary tensor is
    128 MiB.
    """
    return 2**18 if on_cpu() else 2**25


@functools.cache
def mixed_products() -> bool:
    """Whether torch adds the product of two bf16 matrices to an fp32 matrix here.

    On a GPU from torch 2.10; 2.8 knows `out_dtype` but wants a bf16 matrix to add to, and so do
    some builds that call themselves 2.10. So it is tried.
    """
    if on_cpu():
        return False
    factor = torch.ones(16, 16, dtype=torch.bfloat16, device=training_device())
    total = factor.float()
    try:
        torch.addmm(total, factor, factor, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):  # not this mixture; no such argument
        return False
    return True


def use_triton() -> bool:
    """Whether the LM head is computed by Triton kernels: on a GPU where nothing is missing."""
    return not on_cpu() and missing_triton() is None


def missing_triton() -> str | None:
    """Return why a GPU computes the LM head in plain torch, and what to do; None if it need not.

    The kernels need Triton 3.4, which torch 2.8 brings. None also without a GPU.
    """
    if on_cpu():
        return None
    if importlib.util.find_spec("triton") is None:
        problem = "is not installed"
    elif tuple(map(int, importlib.metadata.version("triton").split(".")[:2])) < (3, 4):
        problem = f"{importlib.metadata.version('triton')} is too old for its kernels"
    else:
        return None
    return (
        f"the LM head is computed in plain torch: triton {problem}; "
        "pip install 'triton>=3.4' (torch 2.8 brings it)"
    )


def unused_gpu() -> str | None:
    """Say that there is a GPU which this torch cannot use; None if there is none, or it can.

    A GPU that is hidden (CUDA_VISIBLE_DEVICES) from a torch that could use it is meant to be.
    """
    if torch.version.cuda is not None or torch.version.hip is not None:
        return None
    if not Path("/dev/nvidia0").exists():
        return None
    return (
        f"training on the CPU: this machine has an NVIDIA GPU, but torch {torch.__version__} is "
        "a build for CPUs; install one for CUDA (docs/gpu.md)"
    )


def slow_head() -> list[str]:
    """Why a GPU computes the LM head more slowly than it could, and what to do about each reason.

    [] where there is no reason, and without a GPU.
    """
    reasons = [missing_triton()]
    if not on_cpu() and not mixed_products():
        reasons.append(
            "the LM head's weight gradient is multiplied in float32: torch "
            f"{torch.__version__} cannot add a bf16 product to a float32 matrix; "
            "pip install 'torch>=2.10'"
        )
    return [reason for reason in reasons if reason is not None]


def gpu_count() -> int:
    """GPUs that this process sees."""
    return 0 if on_cpu() else torch.cuda.device_count()


def device_of_thread(device: torch.device) -> contextlib.AbstractContextManager:
    """Make `device` the current one of this thread; that of a new thread is the first GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def abort_collectives() -> None:
    """End the collectives that this process waits in on its GPU, from any thread.

    The main thread then comes out of them with an error, and no process group can be used any more.
    Nothing on a CPU: gloo's collectives end when the connections of a peer close, and cannot be
    aborted meanwhile.
    """
    if not on_cpu():
        torch.distributed.distributed_c10d._abort_process_group()


def set_device(local_rank: int) -> None:
    """Bind this process to its GPU, if there is one, and set how precisely it multiplies.

    Raises MachineError where there are fewer GPUs than ranks.
    """
    if not on_cpu():
        if local_rank >= gpu_count():
            raise MachineError(
                f"local rank {local_rank} needs a GPU of its own, but this process sees only "
                f"{gpu_count()}; give each rank all GPUs of its node, or start fewer ranks"
            )
        torch.cuda.set_device(local_rank)
        # Where cuBLAS cuts a product along its sum, the parts are not rounded to bf16 before they
        # are added. The LM head's hidden gradient sums over the vocabulary, whose parts nearly
        # cancel: the gradient of a row of logits adds up to 0.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def peak_memory_bytes() -> int:
    """Peak memory of this rank in bytes: allocated on the GPU, or resident on the CPU."""
    if not on_cpu():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def free_memory_bytes() -> float:
    """Bytes of this rank's GPU that no process holds; infinite on the CPU, which nobody shares."""
    return math.inf if on_cpu() else float(torch.cuda.mem_get_info()[0])


def collect_shared_memory() -> None:
    """Take back GPU memory that was handed to other processes and that they have let go of."""
    if not on_cpu():
        torch.cuda.ipc_collect()


def wait_for_device() -> None:
    """Wait until the GPU has done all that it was given."""
    if not on_cpu():
        torch.cuda.synchronize()


def return_freed_memory() -> None:
    """Let other processes have the GPU memory that this one has freed, once its work is done."""
    collect_shared_memory()
    # Kernels still queued may use the memory: torch's cache gives back only what is idle.
    wait_for_device()
    if not on_cpu():
        torch.cuda.empty_cache()


def host_memory(nbytes: int) -> torch.Tensor:
    """Allocate uint8[nbytes] on the host, pinned where there is a GPU to copy from."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=not on_cpu())


def use_deterministic_kernels() -> None:
    """Have torch take kernels that give the same bits every time, wherever it has any.

    An operation that has none is a warning, once: sampling on a GPU has such ones. Training allows
    none (`deterministic_only`).
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Not part of it: torch would besides fill each new tensor before it is used.
    torch.utils.deterministic.fill_uninitialized_memory = False


@contextlib.contextmanager
def deterministic_only(wanted: bool) -> Iterator[None]:
    """Where wanted, let torch raise RuntimeError for an operation without deterministic kernel.

    After `use_deterministic_kernels`; it counts for the whole process. With warnings alone torch's
    own flash attention would keep its other backward kernel, and only say so.
    """
    if not wanted:
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)


def rng_states() -> dict[str, torch.Tensor]:
    """Return this rank's generator states (uint8 tensors): the CPU's and, on a GPU, the GPU's."""
    states = {"cpu": torch.get_rng_state()}
    if not on_cpu():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_rng_states(states: dict[str, torch.Tensor]) -> None:
    """Set this rank's generators to what `rng_states` returned."""
    torch.set_rng_state(states["cpu"])
    if not on_cpu():
        torch.cuda.set_rng_state(states["cuda"])
