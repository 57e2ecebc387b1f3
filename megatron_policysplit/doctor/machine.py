"""GPUs, memory, limits and the compiler of this machine."""

from __future__ import annotations

import os
import resource
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from megatron_policysplit.doctor.finding import FAIL, OK, WARN, Finding, gib, output_of

SMI_SECONDS = 30.0
_FIELDS = "index,name,memory.total,memory.free,compute_cap,mig.mode.current"
NO_LIMIT = resource.RLIM_INFINITY


@dataclass(frozen=True)
class Gpu:
    """A GPU as nvidia-smi lists it."""

    index: int
    name: str
    total: int  # bytes
    free: int  # bytes
    capability: str
    mig: bool  # whether it is cut into instances


def list_gpus() -> list[Gpu]:
    """The GPUs of this machine; [] without nvidia-smi. Raises as `output_of` does."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits"]
    gpus = []
    for line in output_of(command, SMI_SECONDS).splitlines():
        index, name, total, free, capability, mig = (part.strip() for part in line.split(","))
        mib = 2**20
        gpus.append(
            Gpu(int(index), name, int(total) * mib, int(free) * mib, capability, mig == "Enabled")
        )
    return gpus


def check_gpus(gpus: list[Gpu], wanted: int | None) -> list[Finding]:
    """wanted: GPUs that ranks and servers on this machine need; None without a configuration."""
    if not gpus:
        if Path("/dev/nvidia0").exists():
            remedy = "mount the driver's programs into the container, or install them"
            return [Finding("GPUs", WARN, "there is one, but no nvidia-smi", remedy)]
        return [Finding("GPUs", OK, "none: a run trains on the CPU")]
    findings = []
    for gpu in gpus:
        text = f"{gpu.name}, compute capability {gpu.capability}, {gib(gpu.free)} of "
        text += f"{gib(gpu.total)} free"
        status, remedy = OK, ""
        if gpu.free < 0.9 * gpu.total:
            status, remedy = WARN, "nvidia-smi lists the processes that hold the rest"
        if gpu.mig:
            status, remedy = WARN, "it is cut into MIG instances, which NCCL cannot join"
        findings.append(Finding(f"GPU {gpu.index}", status, text, remedy))
    names = {gpu.name for gpu in gpus}
    if len(names) > 1:
        findings.append(Finding("GPUs", WARN, f"of {len(names)} kinds: {', '.join(sorted(names))}"))
    if wanted is not None and wanted > len(gpus):
        findings.append(
            Finding(
                "GPUs",
                WARN,
                f"the configuration's ranks and servers need {wanted}, this machine has "
                f"{len(gpus)}",
                "start it on several nodes, or change parallel.* or rollout.server.*",
            )
        )
    return findings


@dataclass(frozen=True)
class Space:
    """Room on a file system, in bytes."""

    total: int
    free: int

    @classmethod
    def of(cls, path: str | Path) -> Space:
        stat = os.statvfs(path)
        return cls(stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize)


def check_shared_memory(space: Space, needed: int) -> list[Finding]:
    """needed: bytes that weights need there on their way to servers; 0 if they go another way."""
    text = f"/dev/shm: {gib(space.free)} of {gib(space.total)} free"
    remedy = "give the container more (--shm-size, or --ipc=host)"
    if space.free < needed:
        return [Finding("shared memory", FAIL, f"{text}; {gib(needed)} are needed", remedy)]
    if space.total < 2**30:
        return [Finding("shared memory", WARN, f"{text}; NCCL wants some for every GPU", remedy)]
    return [Finding("shared memory", OK, text)]


def check_temporary(space: Space, directory: str) -> list[Finding]:
    text = f"{directory}: {gib(space.free)} free"
    if space.free < 2**30:
        return [Finding("temporary files", WARN, text, "set TMPDIR to a larger place")]
    return [Finding("temporary files", OK, text)]


def available_memory() -> int:
    """Bytes of host memory that this process may still take, its container's limit included."""
    import psutil

    available = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    try:
        return min(available, int(limit.read_text()) - int(used.read_text()))
    except (OSError, ValueError):  # no such file, or "max"
        return available


def check_host_memory(available: int, needed: int) -> list[Finding]:
    """needed: bytes that the actor takes there while colocated engines generate; 0 if none."""
    text = f"{gib(available)} available"
    if needed and needed > available:
        remedy = "more nodes, or rollout.colocated=false"
        value = f"{text}; the actor needs about {gib(needed)} while engines generate"
        return [Finding("host memory", FAIL, value, remedy)]
    return [Finding("host memory", OK, text)]


def soft_limits() -> dict[str, int]:
    """The limits of this process that runs meet; NO_LIMIT: none."""
    names = {
        "open files": resource.RLIMIT_NOFILE,
        "processes": resource.RLIMIT_NPROC,
        "locked memory": resource.RLIMIT_MEMLOCK,
    }
    return {name: resource.getrlimit(number)[0] for name, number in names.items()}


def check_limits(limits: dict[str, int], has_gpu: bool) -> list[Finding]:
    findings = []
    # Every request in flight is a connection, every file of a checkpoint is open while it is read.
    for name, least, flag in (("open files", 4096, "-n"), ("processes", 4096, "-u")):
        value = limits[name]
        if value != NO_LIMIT and value < least:
            remedy = f"ulimit {flag} {least}, or more"
            findings.append(Finding(name, WARN, f"at most {value}", remedy))
        else:
            findings.append(Finding(name, OK, _limit(value)))
    value = limits["locked memory"]
    if has_gpu and value != NO_LIMIT:
        remedy = "InfiniBand registers memory: ulimit -l unlimited, also for Slurm's daemon"
        findings.append(Finding("locked memory", WARN, f"at most {gib(value)}", remedy))
    else:
        text = "unlimited" if value == NO_LIMIT else f"at most {gib(value)}"
        findings.append(Finding("locked memory", OK, text))
    return findings


def _limit(value: int) -> str:
    return "unlimited" if value == NO_LIMIT else f"at most {value}"


def check_compiler(compiler: str | None, header: Path, has_gpu: bool) -> list[Finding]:
    """The C compiler and Python.h, with which Triton and torch.compile build their launchers."""
    missing = [] if compiler else ["no C compiler (CC, cc, gcc or clang)"]
    if not header.is_file():
        missing.append(f"no {header}")
    if not missing:
        return [Finding("compiler", OK, f"{compiler}, {header}")]
    text = " and ".join(missing)
    if not has_gpu:
        return [Finding("compiler", OK, f"{text}; only a GPU's kernels need them")]
    remedy = "install build-essential and the headers of this Python (python3-dev)"
    return [Finding("compiler", FAIL, text, remedy)]


def find_compiler() -> tuple[str | None, Path]:
    """The C compiler that Triton would take, and where Python.h should be."""
    named = (os.environ.get("CC"), "cc", "gcc", "clang")
    compiler = next((path for name in named if name and (path := shutil.which(name))), None)
    return compiler, Path(sysconfig.get_paths()["include"]) / "Python.h"
