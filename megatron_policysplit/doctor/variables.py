"""Environment variables that break or slow a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from megatron_policysplit.config import Config
from megatron_policysplit.config.engine_checks import check_actor_allocator, check_allocator
from megatron_policysplit.distributed.environment import check_deterministic, defaults
from megatron_policysplit.distributed.rank_variables import rank_place
from megatron_policysplit.doctor.needs import Needs
from megatron_policysplit.doctor.network import proxies
from megatron_policysplit.doctor.record import Record, fail, ok, warn
from megatron_policysplit.errors import ConfigError

# Settings that make a run slow or let it hang, left over from a search for an error.
_SLOW = {
    "CUDA_LAUNCH_BLOCKING": ("1", "every kernel is waited for"),
    "NCCL_P2P_DISABLE": ("1", "NCCL does without peer access"),
    "NCCL_SHM_DISABLE": ("1", "NCCL does without shared memory"),
    "NCCL_IB_DISABLE": ("1", "NCCL does without InfiniBand, over sockets"),
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": ("0", "a lost rank is not noticed in a collective"),
    "PYTORCH_NO_CUDA_MEMORY_CACHING": ("1", "torch asks the driver for each tensor"),
}
_CUDA_LIBRARIES = ("libnccl.so*", "libcudart.so*", "libcudnn.so*", "libcublas.so*")


def check_variables(
    environ: Mapping[str, str],
    needs: Needs | None,
    *,
    capability: tuple[int, int] | None,
    cuda: str | None,
    cores: int,
    libraries: Callable[[str], list[str]],
) -> list[Record]:
    """Records about the variables that are set; one OK where none is amiss.

    capability: of the GPUs; None without one. cuda: that torch is built for; None for a CPU build.
    cores: that this process may use. libraries: `cuda_libraries`.
    """
    records = [
        *_ranks(environ),
        *_visible(environ, needs),
        *_proxies(environ, needs),
        *_threads(environ, needs, cores),
        *_defaults(environ, needs, capability),
    ]
    if cuda is not None:
        records += _slow(environ) + _library_path(environ, libraries)
    return records or [ok("environment", "no variable is set that would break or slow a run")]


def check_allocators(config: Config, environ: Mapping[str, str]) -> list[Record]:
    """Expandable segments: of the actor with CUDA IPC, of servers with their memory saver."""
    records = []
    for check in (
        lambda: check_actor_allocator(config, environ),
        lambda: config.rollout.colocated and check_allocator(config.rollout.server.environment),
    ):
        try:
            check()
        except ConfigError as error:
            records.append(fail("allocator", str(error), "unset expandable_segments"))
    return records


def cuda_libraries(directory: str) -> list[str]:
    """Libraries of CUDA in a directory."""
    place = Path(directory)
    if not directory or not place.is_dir():
        return []
    return sorted(path.name for name in _CUDA_LIBRARIES for path in place.glob(name))


def _ranks(environ: Mapping[str, str]) -> list[Record]:
    """What torchrun, srun or mpirun left behind. A step of srun's own is none of that."""
    if "RANK" not in environ and "SLURM_STEP_ID" in environ:
        return []
    try:
        place = rank_place(environ)
    except ConfigError as error:
        return [fail("rank variables", str(error), "unset them")]
    if place is None:
        return []
    return [
        warn(
            "rank variables",
            f"`train` started from here would be rank {place.rank} of {place.world_size}",
            "`unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT` if they "
            "are left over",
        )
    ]


def hides_gpus(environ: Mapping[str, str]) -> bool:
    """Whether CUDA_VISIBLE_DEVICES leaves no GPU; CUDA reads it up to the first that is none."""
    value = environ.get("CUDA_VISIBLE_DEVICES")
    return value is not None and value.split(",")[0].strip() in ("", "-1")


def _visible(environ: Mapping[str, str], needs: Needs | None) -> list[Record]:
    value = environ.get("CUDA_VISIBLE_DEVICES")
    if value is None:
        return []
    devices = [device for device in value.split(",") if device.strip()]
    if hides_gpus(environ):
        return [ok("CUDA_VISIBLE_DEVICES", f"{value!r}: GPUs are hidden, a run is on the CPU")]
    if needs is not None and len(devices) < needs.gpus and needs.gpus > 1:
        return [
            fail(
                "CUDA_VISIBLE_DEVICES",
                f"{value}: {len(devices)} of the {needs.gpus} GPUs that the configuration takes on "
                "this node; every rank must see all GPUs of its node",
                "unset it, or ask Slurm for GPUs by node (--gpus-per-node), not by task",
            )
        ]
    return [ok("CUDA_VISIBLE_DEVICES", value)]


def _proxies(environ: Mapping[str, str], needs: Needs | None) -> list[Record]:
    """Proxies: requests to engines and to the judge do not use them (aiohttp's default)."""
    found = proxies(environ)
    if not found:
        return []
    named = ", ".join(f"{name}={value}" for name, value in found.items())
    if needs is not None and needs.judge is not None:
        return [
            warn(
                "proxies",
                f"{named}: requests to eval.judge.url do not go through a proxy",
                "make sure that the judge can be reached without",
            )
        ]
    return [ok("proxies", f"{named} (requests to engines do not go through a proxy)")]


def _threads(environ: Mapping[str, str], needs: Needs | None, cores: int) -> list[Record]:
    """Threads of the ranks of a node; `train` shares the cores out where it starts them itself."""
    ranks = 1 if needs is None else needs.local_ranks
    value = environ.get("OMP_NUM_THREADS")
    if value is None:
        if ranks == 1 or "SLURM_JOB_ID" not in environ:
            return []
        return [
            warn(
                "OMP_NUM_THREADS",
                f"not set: each of {ranks} ranks that srun starts here uses all {cores} cores",
                f"export OMP_NUM_THREADS={max(1, cores // ranks)}",
            )
        ]
    if value.isdecimal() and int(value) * ranks > max(cores, ranks):
        return [
            warn(
                "OMP_NUM_THREADS",
                f"{value} threads for each of {ranks} ranks are more than the {cores} cores",
                f"export OMP_NUM_THREADS={max(1, cores // ranks)}",
            )
        ]
    return [ok("OMP_NUM_THREADS", value)]


def _defaults(
    environ: Mapping[str, str], needs: Needs | None, capability: tuple[int, int] | None
) -> list[Record]:
    """What a rank would set for its layout, where it is set to something else."""
    if needs is None:
        return []
    try:
        if needs.deterministic:
            check_deterministic(environ)
    except ConfigError as error:
        return [fail("environment", str(error), "unset it")]
    wanted = defaults(tensor=needs.tensor, deterministic=False, capability=capability)
    # The others that a rank sets may be chosen freely.
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    value = wanted.get(name)
    if value is None or environ.get(name, value) == value:
        return []
    return [warn(name, f"{environ[name]}, where a rank would set {value}", f"unset {name}")]


def _slow(environ: Mapping[str, str]) -> list[Record]:
    return [
        warn(name, f"{value}: {meaning}", f"unset {name}, unless a search for an error needs it")
        for name, (value, meaning) in _SLOW.items()
        if environ.get(name) == value
    ]


def _library_path(
    environ: Mapping[str, str], libraries: Callable[[str], list[str]]
) -> list[Record]:
    """Libraries that the loader takes before those which torch was installed with."""
    records = []
    for directory in environ.get("LD_LIBRARY_PATH", "").split(":"):
        if names := libraries(directory):
            records.append(
                warn(
                    "LD_LIBRARY_PATH",
                    f"{directory} has {', '.join(names[:4])}{' ...' * (len(names) > 4)}, which may "
                    "be loaded instead of torch's own",
                    "take that directory out, unless torch was built against it (NGC images)",
                )
            )
    return records
