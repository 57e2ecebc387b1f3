"""Environment variables that a rank sets for the libraries which it trains with.

They are set before torch is imported, because each library reads its own when it starts. A value
that is set already stays. What was set here is the rank's alone: servers that it starts do not get
it (`without_defaults`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, MutableMapping

from megatron_policysplit.errors import ConfigError

# What may be set where gradients must have the same bits in every run. Megatron-Core asks for the
# first where Transformer Engine computes attention, cuBLAS and NCCL say so in their manuals.
_DETERMINISTIC = {
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    # Not Tree: its order of summation is NCCL's own choice, which another start may make otherwise.
    "NCCL_ALGO": ("Ring", "CollnetDirect", "CollnetChain", "^NVLS"),
}

# What torch writes down where an NCCL collective runs past its time limit. The watch of the other
# ranks (`rank_watch`) ends a run when a rank fails or is gone; what is left for the limit is a
# collective that some ranks never came to, and the record of the last ones says which. Names of
# torch 2.13; a torch that does not know one passes over it.
_RECORDS = {"TORCH_NCCL_DUMP_ON_TIMEOUT": "1", "TORCH_FR_BUFFER_SIZE": "2000"}

_set_here: dict[str, str] = {}


def engines_nccl(arguments: Mapping[str, object]) -> dict[str, str]:
    """Return the variables that SGLang sets for its NCCL; arguments: rollout.server.arguments.

    SGLang sets both where they are unset, and with these flags in any case (releases 0.5.16 and
    0.5.23). All processes of a group must have the same: memory that one shares by another way than
    its peer expects is a hang or an error.
    """
    symmetric = arguments.get("enable-symm-mem") is True
    multicast = symmetric or arguments.get("enable-nccl-nvls") is True
    return {
        "NCCL_CUMEM_ENABLE": str(int(symmetric)),
        "NCCL_NVLS_ENABLE": str(int(multicast)),
    }


def defaults(
    *,
    tensor: int,
    deterministic: bool,
    capability: tuple[int, int] | None,
    nccl: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return the variables that a rank should have, by name.

    tensor: tensor-parallel ranks.
    deterministic: train.deterministic.
    capability: the GPU's compute capability; None without a GPU.
    nccl: of `engines_nccl` where engines join a group of the actor's; else None.
    """
    variables = {}
    if capability is not None:
        variables |= _RECORDS | (nccl or {})
    if tensor > 1 and capability is not None and capability < (10, 0):
        # One queue to the GPU keeps kernels in the order of their launch. A tensor-parallel layer
        # launches its collective before the product that is to hide it, and with more queues the
        # product may go first. Blackwell needs this no more.
        variables["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    if deterministic:
        # Attention backward, products split over several streams, and sums over ranks.
        variables |= {name: values[0] for name, values in _DETERMINISTIC.items()}
    return variables


def check_deterministic(environ: Mapping[str, str]) -> None:
    """Raise ConfigError if a variable that is set contradicts train.deterministic=true."""
    for name, values in _DETERMINISTIC.items():
        value = environ.get(name, values[0])
        parts = value.split(",") if name == "NCCL_ALGO" else [value]
        if not all(part.strip() in values for part in parts):
            raise ConfigError(
                f"train.deterministic=true cannot keep its promise with {name}={value} in the "
                f"environment; unset it, or set it to {' or '.join(values)}"
            )


def set_defaults(
    environ: MutableMapping[str, str],
    *,
    tensor: int,
    deterministic: bool,
    capability: tuple[int, int] | None,
    nccl: Mapping[str, str] | None = None,
) -> None:
    """Set the variables of `defaults` that are not set yet, and remember which these were.

    Raises ConfigError as `check_deterministic` does.
    """
    if deterministic:
        check_deterministic(environ)
    variables = defaults(
        tensor=tensor, deterministic=deterministic, capability=capability, nccl=nccl
    )
    for name, value in variables.items():
        if name not in environ:
            environ[name] = _set_here[name] = value


def described_defaults() -> str | None:
    """What was set here, as one line of the log; None if nothing was."""
    if not _set_here:
        return None
    return "environment: " + ", ".join(f"{name}={value}" for name, value in _set_here.items())


def without_defaults(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment as it would be had `set_defaults` set nothing."""
    return {name: value for name, value in environ.items() if name not in _set_here}


def compute_capability() -> tuple[int, int] | None:
    """Return the compute capability of this machine's first GPU; None without NVIDIA's driver.

    Asked of the driver's library for management. CUDA itself must not be asked: it reads
    CUDA_DEVICE_MAX_CONNECTIONS when it starts.
    """
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    if nvml.nvmlInit_v2() != 0:
        return None
    try:
        handle, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
        failed = nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(handle)) or (
            nvml.nvmlDeviceGetCudaComputeCapability(
                handle, ctypes.byref(major), ctypes.byref(minor)
            )
        )
        return None if failed else (major.value, minor.value)
    finally:
        nvml.nvmlShutdown()
