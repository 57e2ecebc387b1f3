"""The variables by which a launcher tells a process which rank it is, read in this one place.

torchrun sets RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT; srun sets
SLURM_*. docs/gpu.md ("Starting ranks") has a table of what each combination means. Two rules decide
it: a process is a rank only if RANK is set (or srun's step has several tasks), and a rank must know
all the rest. So what another launcher left in a shell is ignored or refused, never half believed.

Only `train`, `convert hf-to-megatron` and `convert megatron-to-hf` run as ranks. The other commands
are one process whatever is set.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_policysplit.errors import ConfigError

# What launchers set for their ranks alone. A process that is to be no rank, or a rank of another
# group, must not inherit them.
LAUNCHER_VARIABLES = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*|"
    r"SLURM_(PROCID|LOCALID|STEP_ID)|OMPI_COMM_WORLD_.*|PMI_(RANK|SIZE)|PMIX_RANK"
)
# Slurm numbers the steps that are no srun of the user's (batch script, salloc's shell, external
# processes) from here on; a batch script mostly has no SLURM_STEP_ID at all.
_SPECIAL_STEPS = 0xFFFFFFF0
# Rank and number of ranks as MPI's launchers set them: Open MPI, then MPICH and Intel MPI.
_MPI = (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE"))
_REMEDY = "`unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT` if they are "


@dataclass(frozen=True)
class RankPlace:
    """Which of several ranks this process is. Made by `rank_place`."""

    rank: int
    local_rank: int  # among the ranks of its node
    world_size: int
    first_of_node: bool  # whether it is its node's first rank, or was not told which one it is

    @property
    def prefix(self) -> str:
        """What a line on stderr begins with: `rank 4: `, or nothing for rank 0."""
        return "" if self.rank == 0 else f"rank {self.rank}: "


def rank_place(environ: Mapping[str, str]) -> RankPlace | None:
    """Return which rank torchrun or srun started this process as; None if neither did.

    torchrun with one process counts as started, srun with one task does not. Raises ConfigError for
    variables that are empty, out of range, or not complete.
    """
    if "RANK" in environ:
        return _place_by_torchrun(environ)
    tasks = _srun_tasks(environ)
    if tasks is not None:
        rank = _whole(environ, "SLURM_PROCID", 0, tasks - 1)
        local = 0
        if "SLURM_LOCALID" in environ:
            local = _whole(environ, "SLURM_LOCALID", 0, tasks - 1)
        return RankPlace(rank, local, tasks, first_of_node=rank == 0 or local == 0)
    for rank_name, size_name in _MPI:
        # Under srun --mpi=pmi2 these are set, too, and srun's own have been read above. A size of 1
        # is what a shell or a container that mpirun started once leaves.
        size = environ.get(size_name, "1")
        if rank_name in environ and size != "1" and "SLURM_STEP_ID" not in environ:
            raise ConfigError(
                f"mpirun started this process ({rank_name}={environ[rank_name]}, {size_name}="
                f"{size}), whose ranks are not read; start it by torchrun or srun, set RANK, "
                "LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each process, or `unset "
                f"{rank_name} {size_name}` if they are left over"
            )
    return None


def started_environment(environ: Mapping[str, str]) -> dict[str, str] | None:
    """Return the rank variables if torchrun or srun started this process as a rank, else None.

    None also in a batch script outside srun. torchrun sets the variables itself. From srun's they
    are derived: MASTER_ADDR is the first host of the allocation, MASTER_PORT depends on the job id;
    both can be given. Raises ConfigError as `rank_place` does, and if one is missing that cannot be
    derived.
    """
    place = rank_place(environ)
    if place is None:
        return None
    variables = {
        "RANK": str(place.rank),
        "LOCAL_RANK": str(place.local_rank),
        "WORLD_SIZE": str(place.world_size),
    }
    if "RANK" in environ:
        for name in ("LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            if name in environ:
                variables[name] = environ[name]
        return variables
    local_size = environ.get("LOCAL_WORLD_SIZE") or _slurm_tasks_of_node(environ, place.world_size)
    job = environ.get("SLURM_JOB_ID", "0")
    derived = {
        "LOCAL_WORLD_SIZE": local_size,
        "MASTER_ADDR": environ.get("MASTER_ADDR") or _first_slurm_host(environ),
        "MASTER_PORT": environ.get("MASTER_PORT")
        or str(10000 + (int(job) if job.isdecimal() else 0) % 20000),
    }
    _whole(derived, "LOCAL_WORLD_SIZE", 1, place.world_size)
    _whole(derived, "MASTER_PORT", 1, 65535)
    return variables | derived


def _place_by_torchrun(environ: Mapping[str, str]) -> RankPlace:
    """The place of a process with RANK set; all of torchrun's variables are checked."""
    given = [name for name in ("RANK", "WORLD_SIZE") if name in environ]
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if name not in environ:
            shown = " and ".join(f"{name}={environ[name]}" for name in given)
            raise ConfigError(
                f"{shown} {'are' if len(given) > 1 else 'is'} set but {name} is not; set it if "
                f"this process is one of several ranks, or {_REMEDY}left over"
            )
    size = _whole(environ, "WORLD_SIZE", 1)
    rank = _whole(environ, "RANK", 0, size - 1, of=f"of WORLD_SIZE={size}")
    local_size, local, is_told = size, rank, False
    if "LOCAL_WORLD_SIZE" in environ:
        local_size = _whole(environ, "LOCAL_WORLD_SIZE", 1, size, of=f"of WORLD_SIZE={size}")
        local, is_told = rank % local_size, True
    if "LOCAL_RANK" in environ:
        local = _whole(environ, "LOCAL_RANK", 0, local_size - 1, of=f"of {local_size} ranks here")
        is_told = True
    _whole(environ, "MASTER_PORT", 1, 65535)
    if not environ["MASTER_ADDR"].strip():
        raise ConfigError(
            f"MASTER_ADDR is empty; set it to the host of rank 0, or {_REMEDY}left over"
        )
    is_first = rank == 0 or local == 0 or not is_told
    return RankPlace(rank, local, size, first_of_node=is_first)


def _whole(
    environ: Mapping[str, str], name: str, least: int, most: int | None = None, of: str = ""
) -> int:
    """The whole number of a variable; ConfigError unless it is one from `least` to `most`.

    of: what the upper bound comes from, for the message.
    """
    text = environ.get(name, "").strip()
    if text.isascii() and text.isdecimal() and int(text) >= least:
        if most is None or int(text) <= most:
            return int(text)
    bounds = f"from {least} to {most}" if most is not None else f"of at least {least}"
    remedy = f"{_REMEDY}left over"
    if name.startswith("SLURM_"):
        remedy = f"`unset {name} SLURM_STEP_ID` if srun did not start it"
    raise ConfigError(
        f"{name}={text or ' (empty)'} is not a whole number {bounds}{of and f' ({of})'}; set it "
        f"right if this process is one of several ranks, or {remedy}"
    )


def _srun_tasks(environ: Mapping[str, str]) -> int | None:
    """The tasks of the srun step that started this process; None if there is none, or one task."""
    if "SLURM_PROCID" not in environ or "SLURM_STEP_ID" not in environ:
        return None
    step = environ["SLURM_STEP_ID"]
    if step.isdecimal() and int(step) >= _SPECIAL_STEPS:
        return None
    name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    if name not in environ:
        return None
    tasks = _whole(environ, name, 1)
    return tasks if tasks > 1 else None


def _slurm_tasks_of_node(environ: Mapping[str, str], tasks: int) -> str:
    """Return the ranks of the first node, 8 in "8(x4)" or "8,4"; all of them if Slurm is silent."""
    per_node = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "")
    match = re.match(r"\d+", per_node)
    return match.group() if match else str(tasks)


def _first_slurm_host(environ: Mapping[str, str]) -> str:
    """Return the first host of the allocation, as scontrol spells SLURM_JOB_NODELIST out."""
    nodes = environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise ConfigError(
            "srun started this rank but neither MASTER_ADDR nor SLURM_JOB_NODELIST is set; set "
            "MASTER_ADDR"
        )
    try:
        answer = subprocess.run(
            ["scontrol", "show", "hostnames", nodes],
            check=True,
            capture_output=True,
            text=True,
            env=dict(environ),
        )
        return answer.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise ConfigError(
            f"MASTER_ADDR is not set and `scontrol show hostnames {nodes}` failed; set MASTER_ADDR "
            "to the first host"
        ) from error


def check_world(config, started: Mapping[str, str]) -> None:
    """Raise ConfigError unless as many ranks were started as the layout has."""
    parallel = config.parallel
    ranks = parallel.tensor * parallel.pipeline * parallel.data
    if int(started["WORLD_SIZE"]) != ranks:
        raise ConfigError(
            f"WORLD_SIZE={started['WORLD_SIZE']} ranks were started, but "
            f"parallel.tensor={parallel.tensor} x parallel.pipeline={parallel.pipeline} x "
            f"parallel.data={parallel.data} = {ranks}; start {ranks} ranks, change the layout, or "
            "unset RANK and WORLD_SIZE to let policysplit start them"
        )


def without_launcher(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that a process may inherit which is no rank of this one's group."""
    return {
        name: value for name, value in environ.items() if not LAUNCHER_VARIABLES.fullmatch(name)
    }
