"""The device that a rank trains on. Every question about it is asked here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import sys

import torch


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


def use_transformer_engine() -> bool:
    """Transformer Engine layers on a GPU, Megatron's own layers without one."""
    return not on_cpu()


def head_chunk_tokens() -> int:
    """Tokens whose logits are made at a time by default; enough to keep the device busy."""
    return 256 if on_cpu() else 1024


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


def gpu_count() -> int:
    """GPUs that this process sees."""
    return 0 if on_cpu() else torch.cuda.device_count()


def abort_collectives() -> None:
    """End the collectives that this process waits in on its GPU, from any thread.

    The main thread then comes out of them with an error, and no process group can be used any more.
    Nothing on a CPU: gloo's collectives end when the connections of a peer close, and cannot be
    aborted meanwhile.
    """
    if not on_cpu():
        torch.distributed.distributed_c10d._abort_process_group()


def set_device(local_rank: int) -> None:
    """Bind this process to its GPU, if there is one."""
    if not on_cpu():
        torch.cuda.set_device(local_rank)


def peak_memory_bytes() -> int:
    """Peak memory of this rank in bytes: allocated on the GPU, or resident on the CPU."""
    if not on_cpu():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def free_memory_bytes() -> float:
    """Bytes of this rank's GPU that no process holds; infinite on the CPU, which nobody shares."""
    return math.inf if on_cpu() else float(torch.cuda.mem_get_info()[0])


def return_freed_memory() -> None:
    """Let other processes have the GPU memory that this one has freed, once its work is done."""
    if not on_cpu():
        # Kernels still queued may use the memory: torch's cache gives back only what is idle.
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def host_memory(nbytes: int) -> torch.Tensor:
    """Allocate uint8[nbytes] on the host, pinned where there is a GPU to copy from."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=not on_cpu())


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
