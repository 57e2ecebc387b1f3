"""Memory, shared memory, limits of the user, and the C compiler."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron_policysplit.doctor.asking import ProbeFailed, output_of
from megatron_policysplit.doctor.needs import Needs
from megatron_policysplit.doctor.record import GIB, Record, fail, gib, ok, warn

UNLIMITED = float("inf")
# What NVIDIA's documentation of NCCL has containers start with (--shm-size=1g).
NCCL_SHARED_BYTES = GIB
# Compilers' temporary files, sockets, and what libraries unpack.
TEMPORARY_BYTES = GIB
COMPILER_SECONDS = 30.0
# An estimate of open files: libraries and logs; and a connection to each other rank for each of our
# four groups, Megatron-Core's dozen, and the store.
BASE_FILES, FILES_PER_RANK = 256, 17
# An estimate of a server's processes and threads, beside those that count its cores.
SERVER_TASKS, RANK_TASKS = 512, 64


@dataclass(frozen=True)
class Space:
    """A place in the file system. Sizes in bytes."""

    path: str
    total: int
    free: int
    writable: bool


@dataclass(frozen=True)
class Limits:
    """Limits of this process: (soft, hard); `UNLIMITED` where there is none."""

    locked: tuple[float, float]  # bytes
    files: tuple[float, float]
    processes: tuple[float, float]
    core: tuple[float, float]  # bytes
    core_pattern: str = "core"
    tasks: int = 0  # processes and threads that the user has now
    infiniband: bool = False  # whether the machine has such adapters


@dataclass(frozen=True)
class Memory:
    """Host memory in bytes."""

    total: int
    available: int
    limit: float = UNLIMITED  # of this process's control group
    used: int = 0  # by that group


@dataclass(frozen=True)
class Compiler:
    """What Triton and torch.compile build their launchers with."""

    command: str | None  # None: none on PATH
    headers: str | None  # the directory of Python.h; None where it has none
    error: str | None = None  # why a program that includes Python.h does not compile


def look_at_space(path: str) -> Space | None:
    """A directory's file system; None if there is no such directory."""
    if not os.path.isdir(path):
        return None
    usage = shutil.disk_usage(path)
    return Space(path, usage.total, usage.free, os.access(path, os.W_OK | os.X_OK))


def look_at_limits() -> Limits:
    """The limits that processes started from here inherit."""

    def limit(which: int) -> tuple[float, float]:
        soft, hard = resource.getrlimit(which)
        return tuple(UNLIMITED if n == resource.RLIM_INFINITY else n for n in (soft, hard))

    adapters = Path("/sys/class/infiniband")
    pattern = Path("/proc/sys/kernel/core_pattern")
    return Limits(
        limit(resource.RLIMIT_MEMLOCK),
        limit(resource.RLIMIT_NOFILE),
        limit(resource.RLIMIT_NPROC),
        limit(resource.RLIMIT_CORE),
        core_pattern=pattern.read_text().strip() if pattern.exists() else "core",
        tasks=_tasks_of_user(),
        infiniband=adapters.is_dir() and any(adapters.iterdir()),
    )


def _tasks_of_user() -> int:
    """Processes and threads of this user."""
    user, tasks = os.getuid(), 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if process.stat().st_uid == user:
                tasks += len(os.listdir(process / "task"))
        except OSError:  # it has ended
            continue
    return tasks


def look_at_memory() -> Memory:
    """Memory of the machine, and of the control group (version 2 or 1) of this process."""
    memory = psutil.virtual_memory()
    limit, used = UNLIMITED, 0
    for directory in control_groups(Path("/proc/self/cgroup").read_text()):
        for limit_file, used_file in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            value = _number(directory / limit_file)
            # Version 1 writes a number near 2^63 where there is no limit.
            if value is not None and value < min(limit, memory.total):
                limit, used = value, _number(directory / used_file) or 0
    return Memory(memory.total, memory.available, limit, used)


def control_groups(text: str, root: str = "/sys/fs/cgroup") -> list[Path]:
    """The directories that limit the memory of a process: of its groups and all above them.

    text: of /proc/self/cgroup, `number:controllers:path` a line. Within a container the path may be
    that of the host, and the root is the container's own group.
    """
    directories = []
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        base = Path(root, controllers)
        group = base / path.strip("/")
        directories += [group, *(p for p in group.parents if p == base or base in p.parents)]
    return directories


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None  # "max" is no limit


def look_at_compiler() -> Compiler:
    """Find the compiler as Triton does (CC, gcc, clang), and compile `#include <Python.h>`."""
    candidates = (os.environ.get("CC"), "gcc", "clang", "cc")
    command = next((name for name in candidates if name and shutil.which(name)), None)
    include = sysconfig.get_paths()["include"]
    headers = include if Path(include, "Python.h").is_file() else None
    if command is None or headers is None:
        return Compiler(command, headers)
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory, "probe.c")
        source.write_text("#include <Python.h>\nint probe(void) { return Py_IsInitialized(); }\n")
        arguments = ["-shared", "-fPIC", f"-I{include}", str(source), "-o", f"{directory}/probe.so"]
        try:
            output_of([command, *arguments], COMPILER_SECONDS)
        except (ProbeFailed, subprocess.SubprocessError) as error:
            return Compiler(command, headers, str(error))
    return Compiler(command, headers)


def check_shared_memory(space: Space | None, gpus: int, needs: Needs | None) -> Record:
    """/dev/shm against the buckets of a weight sync, NCCL's segments, and semaphores of graders."""
    name = "shared memory"
    if space is None or not space.writable:
        return fail(
            name,
            "/dev/shm is missing or cannot be written; graders and weight syncs need it",
            "mount a tmpfs there (mount -t tmpfs tmpfs /dev/shm)",
        )
    value = f"{gib(space.free)} of {gib(space.total)} are free in /dev/shm"
    grow = "mount -o remount,size=16g /dev/shm, or start the container with --shm-size=16g"
    need = 0 if needs is None else needs.shared_bytes
    # Colocated engines on a GPU share its memory instead.
    if needs is not None and needs.colocated and gpus:
        need = 0
    if need > space.free:
        return fail(
            name,
            f"{value}, and a weight sync takes {gib(need)}",
            f"{grow}, or lower weight_sync.bucket_mib",
        )
    if gpus > 1 and space.free < NCCL_SHARED_BYTES:
        return warn(name, f"{value}; NCCL wants {gib(NCCL_SHARED_BYTES)} among GPUs", grow)
    return ok(name, value + (f"; a weight sync takes {gib(need)}" if need else ""))


def check_temporary(space: Space | None) -> Record:
    """The directory of temporary files."""
    if space is None or not space.writable:
        where = "no directory" if space is None else space.path
        return fail("temporary files", f"{where} can be written", "set TMPDIR to one that can")
    value = f"{gib(space.free)} are free in {space.path}"
    if space.free < TEMPORARY_BYTES:
        remedy = "make room there, or set TMPDIR to another directory"
        return warn("temporary files", f"{value}, less than {gib(TEMPORARY_BYTES)}", remedy)
    return ok("temporary files", value)


def check_memory(memory: Memory, gpus: int, needs: Needs | None) -> Record:
    """Host memory, and the control group's limit, against what the ranks of this node take."""
    name = "host memory"
    total = min(memory.total, memory.limit)
    free = min(memory.available, memory.limit - memory.used)
    value = f"{gib(free)} of {gib(total)} are free"
    if memory.limit < memory.total:
        value += f" (limit of the control group; the machine has {gib(memory.total)})"
    if needs is None or needs.parameters is None:
        return ok(name, value)
    need, what = _host_need(gpus, needs)
    if not need:
        return ok(name, value)
    value += f"; {what} take {gib(need)}"
    remedy = "use more nodes, a smaller model" + (
        ", or servers beside the actor (rollout.colocated=false)"
        if gpus and needs.colocated
        else ""
    )
    if need > total:
        return fail(name, value, f"{remedy}, or raise the job's memory (--mem)")
    if need > free:
        return warn(name, value, f"end what holds memory; {remedy}")
    return ok(name, value)


def _host_need(gpus: int, needs: Needs) -> tuple[int, str]:
    """Bytes that the ranks of a node take on the host, and what they are."""
    reference = " and the reference policy" if needs.reference else ""
    if not gpus:
        need = needs.local_ranks * needs.rank_bytes + needs.reference_bytes
        return need, f"weights, gradients, optimizer{reference} of {needs.local_ranks} ranks"
    parts = [
        "pinned copies of weights and optimizer" * (needs.offload_bytes > 0),
        "the reference policy" * (needs.reference_bytes > 0),
    ]
    return needs.offload_bytes + needs.reference_bytes, " and ".join(filter(None, parts))


def check_limits(limits: Limits, cores: int, needs: Needs | None) -> list[Record]:
    """Records about ulimits; each threshold is explained where it is computed."""
    needs = needs or Needs()
    return [
        _check_locked(limits),
        _check_files(limits, needs),
        _check_processes(limits, cores, needs),
        _check_core(limits),
    ]


def _check_locked(limits: Limits) -> Record:
    """Memory that adapters read is locked by the process; CUDA's pinned memory by the driver."""
    soft, _ = limits.locked
    value = "unlimited" if soft == UNLIMITED else gib(soft)
    if limits.infiniband and soft < UNLIMITED:
        return warn(
            "locked memory",
            f"{value} (ulimit -l): NCCL registers its buffers with InfiniBand adapters, which "
            "counts against it",
            "ulimit -l unlimited; --ulimit memlock=-1 for a container; PropagateResourceLimits="
            "NONE or LimitMEMLOCK=infinity for Slurm's daemon",
        )
    return ok("locked memory", f"{value} (ulimit -l)")


def _check_files(limits: Limits, needs: Needs) -> Record:
    """Open files: connections to all ranks, and to engines."""
    soft, hard = limits.files
    need = BASE_FILES + FILES_PER_RANK * (needs.ranks - 1) + 2 * needs.concurrency
    value = (
        f"{_count(soft)} (ulimit -n); {needs.ranks} rank{'s' * (needs.ranks > 1)} open about {need}"
    )
    if soft >= need:
        return ok("open files", value)
    remedy = f"ulimit -n {need} in the shell that starts the run"
    if hard < need:
        remedy = f"have the administrator raise the hard limit, which is {_count(hard)}"
    return warn("open files", value, remedy)


def _check_processes(limits: Limits, cores: int, needs: Needs) -> Record:
    """Processes and threads: each rank's libraries have pools as large as its share of the cores.

    Two such pools a rank (OpenMP, autograd), graders, and servers.
    """
    soft, _ = limits.processes
    ranks = needs.local_ranks
    need = ranks * (RANK_TASKS + 2 * max(1, cores // ranks) + needs.reward_workers)
    need += needs.local_servers * (SERVER_TASKS + cores)
    value = (
        f"{_count(soft)} (ulimit -u), of which the user has {limits.tasks}; a run here starts "
        f"about {need}"
    )
    if limits.tasks + need > soft:
        return warn("processes", value, f"ulimit -u {limits.tasks + 2 * need}, or end some")
    return ok("processes", value)


def _check_core(limits: Limits) -> Record:
    """A core file holds a rank's whole host memory, pinned copies included."""
    soft, _ = limits.core
    if soft > 0 and not limits.core_pattern.startswith("|"):
        size = "without limit" if soft == UNLIMITED else f"up to {gib(soft)}"
        return warn(
            "core files",
            f"{size} (ulimit -c): a process that crashes writes its host memory to "
            f"{limits.core_pattern}, and holds its GPU meanwhile",
            "ulimit -c 0",
        )
    return ok("core files", "none are written" if soft == 0 else "taken by the system's collector")


def check_compiler(compiler: Compiler, has_gpu: bool) -> Record:
    """The C compiler and Python's headers: Triton and torch.compile need them on a GPU."""
    name = "C compiler"
    if compiler.command is None:
        problem, remedy = "none on PATH (CC, gcc, clang)", "apt-get install gcc, or set CC"
    elif compiler.headers is None:
        problem = f"{compiler.command}, but Python.h is missing"
        remedy = "install the headers of this Python (apt-get install python3-dev)"
    elif compiler.error is not None:
        problem = f"{compiler.command} does not compile a file with Python.h: {compiler.error}"
        remedy = "mend the compiler, or set CC to another one"
    else:
        return ok(name, f"{compiler.command} compiles with Python.h in {compiler.headers}")
    if has_gpu:
        return fail(name, f"{problem}; Triton builds its launchers with it", remedy)
    return ok(name, f"{problem} (not needed without a GPU)")


def _count(number: float) -> str:
    return "unlimited" if number == UNLIMITED else f"{number:.0f}"


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))
