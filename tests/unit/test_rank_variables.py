"""Which rank a process is, by the variables of torchrun, srun and mpirun, and by what they leave behind."""

import os

import pytest

from megatron_policysplit.config import Config
from megatron_policysplit.distributed.rank_variables import (
    RankPlace,
    check_world,
    rank_place,
    started_environment,
    without_launcher,
)
from megatron_policysplit.errors import ConfigError

TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "node7", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "41234",
    "SLURM_JOB_NODELIST": "node[7-8]",
}
REMEDY = "`unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT` if they are left over"


def without(environ: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in names}


def test_ranks_started_by_torchrun():
    assert started_environment(TORCHRUN) == TORCHRUN
    assert rank_place(TORCHRUN) == RankPlace(3, 1, 4, first_of_node=False)
    alone = TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}  # one process is a world, too
    assert rank_place(alone) == RankPlace(0, 0, 1, first_of_node=True) and started_environment(alone) == alone


@pytest.mark.parametrize(
    ("changes", "local_rank", "first", "prefix"),
    [
        ({"LOCAL_RANK": "0"}, 0, True, "rank 3: "),
        ({"LOCAL_RANK": "1"}, 1, False, "rank 3: "),
        ({"LOCAL_WORLD_SIZE": "2"}, 1, False, "rank 3: "),
        ({}, 3, True, "rank 3: "),  # which node it is on was not told
        ({"RANK": "0"}, 0, True, ""),
    ],
)
def test_the_rank_on_its_node(changes, local_rank, first, prefix):
    place = rank_place(without(TORCHRUN, "LOCAL_RANK") | changes)
    assert (place.local_rank, place.first_of_node, place.prefix) == (local_rank, first, prefix)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"WORLD_SIZE": "8"},  # a node count of another launcher
        {"LOCAL_RANK": "1", "MASTER_ADDR": "x", "MASTER_PORT": "no"},
        {"WORLD_SIZE": "", "LOCAL_RANK": ""},
        without(SRUN, "SLURM_STEP_ID"),  # a batch script outside srun
        SRUN | {"SLURM_NTASKS": "1"},  # srun -n 1
        SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # srun -n 1 in a larger allocation
        SRUN | {"SLURM_STEP_ID": "4294967290"},  # salloc's shell
        SRUN | {"SLURM_STEP_ID": "4294967291"},  # a batch script, by its number
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
        {"PMI_RANK": "0"},
    ],
)
def test_a_process_that_is_alone(environ):
    assert rank_place(environ) is None and started_environment(environ) is None


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "3"}, f"RANK=3 is set but WORLD_SIZE is not; set it if this process is one of .*, or {REMEDY}"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, f"RANK=0 and WORLD_SIZE=1 are set but MASTER_ADDR is not; .*{REMEDY}"),
        (without(TORCHRUN, "MASTER_PORT"), "RANK=3 and WORLD_SIZE=4 are set but MASTER_PORT is not; set it"),
        (TORCHRUN | {"RANK": ""}, r"RANK= \(empty\) is not a whole number from 0 to 3 \(of WORLD_SIZE=4\)"),
        (TORCHRUN | {"RANK": "x"}, f"RANK=x is not a whole number from 0 to 3 .*; set it right .*, or {REMEDY}"),
        (TORCHRUN | {"RANK": "-1"}, "RANK=-1 is not a whole number from 0 to 3"),
        (TORCHRUN | {"RANK": "4"}, r"RANK=4 is not a whole number from 0 to 3 \(of WORLD_SIZE=4\)"),
        (TORCHRUN | {"RANK": "1.0"}, "RANK=1.0 is not a whole number"),
        (TORCHRUN | {"RANK": "²"}, "RANK=² is not a whole number"),
        (TORCHRUN | {"WORLD_SIZE": ""}, r"WORLD_SIZE= \(empty\) is not a whole number of at least 1"),
        (TORCHRUN | {"WORLD_SIZE": "abc"}, "WORLD_SIZE=abc is not a whole number of at least 1"),
        (TORCHRUN | {"WORLD_SIZE": "0"}, "WORLD_SIZE=0 is not a whole number of at least 1"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, r"LOCAL_RANK=4 is not a whole number from 0 to 3 \(of 4 ranks here\)"),
        (TORCHRUN | {"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK=2 is not a whole number from 0 to 1"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "8"}, "LOCAL_WORLD_SIZE=8 is not a whole number from 1 to 4"),
        (TORCHRUN | {"MASTER_PORT": "70000"}, "MASTER_PORT=70000 is not a whole number from 1 to 65535"),
        (TORCHRUN | {"MASTER_PORT": "0"}, "MASTER_PORT=0 is not a whole number from 1 to 65535"),
        (TORCHRUN | {"MASTER_ADDR": " "}, f"MASTER_ADDR is empty; set it to the host of rank 0, or {REMEDY}"),
        (SRUN | {"RANK": "0"}, "RANK=0 is set but WORLD_SIZE is not"),  # left over, and srun's own beside it
        (SRUN | {"SLURM_PROCID": "8"}, "SLURM_PROCID=8 is not a whole number from 0 to 7; .*`unset SLURM_PROCID "),
        (SRUN | {"SLURM_NTASKS": "x"}, "SLURM_NTASKS=x is not a whole number of at least 1"),
        (
            {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8"},
            r"mpirun started this process \(OMPI_COMM_WORLD_RANK=3, OMPI_COMM_WORLD_SIZE=8\), whose ranks are not read"
            "; start it by torchrun or srun, .*, or `unset OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE` if they are left",
        ),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, r"mpirun started this process \(PMI_RANK=1, PMI_SIZE=2\)"),
    ],
)
def test_variables_that_are_wrong_or_not_complete(environ, message):
    for read in (rank_place, started_environment):
        with pytest.raises(ConfigError, match=f"^{message}"):
            read(environ)


def test_mpirun_with_torchruns_variables_is_torchrun():
    mpi = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"}
    assert rank_place(TORCHRUN | mpi) == rank_place(TORCHRUN)
    assert rank_place(SRUN | {"PMI_RANK": "5", "PMI_SIZE": "8"}) == rank_place(SRUN)  # srun --mpi=pmi2


def test_ranks_started_by_srun(tmp_path):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames node[7-8]" ] && printf "node7\\nnode8\\n"\n')
    scontrol.chmod(0o755)
    environ = SRUN | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    expected = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "node7", "MASTER_PORT": "11234"}
    assert started_environment(environ) == expected | {"LOCAL_WORLD_SIZE": "4"}
    given = started_environment(environ | {"MASTER_ADDR": "head", "MASTER_PORT": "1234"})
    assert (given["MASTER_ADDR"], given["MASTER_PORT"]) == ("head", "1234")


def test_srun_without_a_first_host(tmp_path):
    environ = SRUN | {"PATH": str(tmp_path)}
    with pytest.raises(ConfigError, match=r"^MASTER_ADDR is not set and `scontrol show hostnames node\[7-8\]` failed"):
        started_environment(environ)
    del environ["SLURM_JOB_NODELIST"]
    with pytest.raises(ConfigError, match="neither MASTER_ADDR nor SLURM_JOB_NODELIST is set; set MASTER_ADDR$"):
        started_environment(environ)


def test_srun_with_variables_that_do_not_fit():
    for name, value in {"MASTER_PORT": "99999", "LOCAL_WORLD_SIZE": "9"}.items():
        with pytest.raises(ConfigError, match=f"^{name}={value} is not a whole number from 1 to "):
            started_environment(SRUN | {"MASTER_ADDR": "head", name: value})


def test_what_a_process_of_its_own_inherits():
    others = {"PATH": "/bin", "SLURM_JOB_ID": "7", "MASTER_KEY": "x", "OMP_NUM_THREADS": "1"}
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_RANK": "0", "ROLE_NAME": "x", "LOCAL_WORLD_SIZE": "2"}
    mpi = {"OMPI_COMM_WORLD_SIZE": "2", "PMI_RANK": "1"}
    step = {name: SRUN[name] for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_ID")}
    assert without_launcher(others | agent | mpi | step | TORCHRUN) == others


def test_world_size_must_match_the_layout():
    config = Config()
    config.parallel.tensor, config.parallel.data = 2, 3
    check_world(config, TORCHRUN | {"WORLD_SIZE": "6"})
    with pytest.raises(ConfigError) as error:
        check_world(config, TORCHRUN)
    assert str(error.value) == (
        "WORLD_SIZE=4 ranks were started, but parallel.tensor=2 x parallel.pipeline=1 x parallel.data=3 = 6; "
        "start 6 ranks, change the layout, or unset RANK and WORLD_SIZE to let policysplit start them"
    )
