"""examples/slurm/train.sbatch with nodes for engines, and the variants of the example configurations."""

import subprocess
from pathlib import Path

import pytest

from megatron_policysplit.config.checks import check_config
from megatron_policysplit.config.load import load_config, world_size

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run_script(tmp_path, serves: str, **variables):
    """train.sbatch on four nodes, two of them for engines, with stand-ins for Slurm's commands."""
    stand_ins = {
        "policysplit": 'echo "policysplit 0.0"',
        "srun": f'case "$*" in *" serve "*) echo "$*" >"{tmp_path}/served"; {serves};; *) echo "srun $*";; esac',
        "scontrol": 'echo -e "n1\\nn2\\nn3\\nn4"',
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "4",
        "SLURM_JOB_NODELIST": "n[1-4]",
        "SLURM_CPUS_PER_TASK": "8",
        "SLURM_NTASKS_PER_NODE": "8",
        "ENGINE_NODES": "2",
        "SERVERS_PER_NODE": "1",
        **variables,
    }
    return subprocess.run(
        ["bash", EXAMPLES / "slurm" / "train.sbatch", "run.yaml", "train.steps=3"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_slurm_script_with_engine_nodes(tmp_path):
    """Servers on the last nodes first; then the ranks on the others, which are told their addresses."""
    result = run_script(tmp_path, "echo http://n3:30; echo http://n4:31; exec sleep 60")
    assert (result.returncode, result.stderr) == (0, "")
    served = (tmp_path / "served").read_text()
    assert "--nodelist=n3,n4 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=64 policysplit serve run.yaml" in served
    (trained,) = [line for line in result.stdout.splitlines() if line.startswith("srun ")]
    assert "--nodes=2 --nodelist=n1,n2 --ntasks=16 --ntasks-per-node=8" in trained
    for step in (served, trained):
        keys = [word for word in step.split() if "=" in word and not word.startswith("-")]
        config = load_config(str(EXAMPLES / "qwen3_8b" / "config.yaml"), [*keys, "parallel.data=2"])
        assert check_config(config) == [] and not config.rollout.colocated
        assert world_size(config) == 16
    assert config.rollout.addresses == ["http://n3:30", "http://n4:31"]


@pytest.mark.parametrize(
    ("serves", "variables", "says"),
    [("exit 2", {}, "only 0 of 2 servers came up"), ("exit 0", {"ENGINE_NODES": "4"}, "leaves none of 4 nodes")],
)
def test_slurm_script_without_servers_or_ranks(tmp_path, serves, variables, says):
    result = run_script(tmp_path, serves, **variables)
    assert result.returncode != 0 and says in result.stdout + result.stderr and "srun " not in result.stdout


@pytest.mark.parametrize(
    "overrides",
    [
        [
            "parallel.pipeline=1",
            "parallel.data=1",
            "rollout.colocated=false",
            "rollout.server.host=127.0.0.1",
            "rollout.api_key_variable=null",
            "rollout.server.count=4",
            "rollout.server.devices=[4,5,6,7]",
        ],
    ],
)
def test_one_node(overrides):
    config = load_config(str(EXAMPLES / "qwen3_8b" / "config.yaml"), overrides)
    assert check_config(config) == [] and world_size(config) == 4
