"""`policysplit doctor` about other nodes, and the command itself on this machine."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_policysplit.doctor import nodes
from megatron_policysplit.doctor.asking import ProbeFailed
from megatron_policysplit.doctor.examine import examine, question_of
from megatron_policysplit.doctor.network import HostName
from megatron_policysplit.doctor.nodes import Clock, Reach
from megatron_policysplit.doctor.record import as_json, from_json, ok, warn
from megatron_policysplit.errors import DOCTOR, MachineError, PortError, machine_hint
from megatron_policysplit.serving.processes import Process
from tests.support.commands import run_module
from tests.support.toy_chat import make_chat_model

ROOT = Path(__file__).resolve().parents[2]


def statuses(records):
    return [record.status for record in records]


def test_hosts():
    reached = [
        Reach(HostName("n1", ("10.0.0.1",))),
        Reach(HostName("n2", ("10.0.0.2",))),
        Reach(HostName("n3", ("10.0.0.3",)), "timed out"),
        Reach(HostName("n4", (), "Name or service not known")),
        Reach(HostName("n5", ("127.0.1.1",))),
    ]
    silent, unknown, loopback, rest = nodes.check_hosts(reached)
    assert statuses([silent, unknown, loopback, rest]) == ["FAIL", "FAIL", "WARN", "OK"]
    assert unknown.value.startswith("does not resolve (Name or service not known)")
    assert rest.value == "resolve and can be reached: n1, n2"


def test_hosts_are_looked_at():
    """Nothing need listen: a host that refuses a connection is there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    here, nowhere = nodes.look_at_hosts(["localhost", "no-such-host.invalid"], port)
    assert here.host.is_loopback and here.error is None
    assert not nowhere.host.addresses


@pytest.mark.parametrize(
    "said, expected, part",
    [
        (1000.5, "OK", "1 nodes"),
        (999.0, "OK", "1 nodes"),
        (1011.0, "WARN", "n1's is at least 10.0 s ahead of"),
        (990.0, "WARN", "n1's is at least 10.0 s behind"),
        (0.0, "FAIL", "munge"),
    ],
)
def test_clocks(said, expected, part):
    """Only what no order of events explains counts as a difference."""
    (record,) = nodes.check_clocks([Clock("n1", 1000.0, said, 1001.0)])
    assert record.status == expected and part in record.value


def test_nodes_that_differ():
    here = [ok("torch", "2.11.0"), ok("GPU", "8 x A"), ok("host name", "n1 is 10.0.0.1"), warn("core files", "x", "y")]
    other = [ok("torch", "2.9.1"), ok("GPU", "8 x B"), ok("host name", "n2 is 10.0.0.2"), warn("core files", "x", "y")]
    torch, gpu, core = nodes.check_alike({"n1": here, "n2": other}, 2)
    assert (torch.name, torch.status, torch.value) == ("torch on nodes", "FAIL", "n1: 2.11.0; n2: 2.9.1")
    assert (gpu.name, gpu.status) == ("GPU on nodes", "WARN")
    assert (core.name, core.status) == ("core files on n1, n2", "WARN")
    alike, core = nodes.check_alike({"n1": here, "n2": here}, 2)
    assert alike.value == "the same on n1, n2"
    assert nodes.check_alike({"n1": here}, 2)[0].value == "1 of 2 nodes answered: n1"


def test_output_of_srun_is_taken_apart():
    first, second = [ok("torch", "2.11.0")], [ok("torch", "2.9.1"), warn("core files", "a", "b")]
    lines = ["0: n1", "1: n2"]  # lines of two tasks come in any order
    texts = [iter(as_json(first).splitlines()), iter(as_json(second).splitlines())]
    for turn in range(40):
        lines += [f"{turn % 2}: {line}" for line in [next(texts[turn % 2], None)] if line is not None]
    assert nodes.parse_answers("\n".join(lines)) == {"n1": first, "n2": second}
    with pytest.raises(ProbeFailed, match="n1 printed no records"):
        nodes.parse_answers("0: n1\n0: Segmentation fault\n")


def stand_ins(directory, **scripts):
    """Programs of Slurm's, by name, as shell scripts in a directory that comes first in PATH."""
    for name, body in scripts.items():
        (directory / name).write_text(f"#!/bin/bash\n{body}\n")
        (directory / name).chmod(0o755)
    return {**os.environ, "PATH": f"{directory}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


# Runs the command once for each of two nodes, as srun --label does, and says so in a file.
SRUN = (
    'echo "$*" >>"$CALLS"; while [[ "$1" == --* ]]; do shift; done\n'
    'for task in 0 1; do SLURMD_NODENAME=n$task SLURM_STEP_ID=1 "$@" | sed "s/^/$task: /"; done'
)


def test_clocks_are_asked_by_srun(tmp_path):
    environ = {**stand_ins(tmp_path, srun=SRUN), "CALLS": str(tmp_path / "calls")}
    first, second = nodes.ask_clocks(["n0", "n1"], environ)
    assert (first.node, second.node) == ("n0", "n1") and first.ahead == second.ahead == 0.0
    assert abs(first.said - time.time()) < 3600
    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert call.startswith("--nodes=2 --ntasks=2 --ntasks-per-node=1 --nodelist=n0,n1 --overlap --label")
    with pytest.raises(ProbeFailed, match="2 of 3 nodes told the time"):
        nodes.ask_clocks(["n0", "n1", "n2"], environ)


def test_hosts_of_an_allocation(tmp_path):
    body = '[ "$*" = "show hostnames n[0-1]" ] && printf "n0\\nn1\\n"'
    environ = stand_ins(tmp_path, scontrol=body)
    assert nodes.allocated_hosts({**environ, "SLURM_JOB_NODELIST": "n[0-1]"}) == ["n0", "n1"]
    with pytest.raises(ProbeFailed, match="SLURM_JOB_NODELIST is not set"):
        nodes.allocated_hosts({})


# --- the command -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    directory = tmp_path_factory.mktemp("doctor")
    model = make_chat_model(directory / "model")
    file = directory / "run.yaml"
    file.write_text(f"model: {{path: {model}}}\ndata: {{path: q.jsonl}}\nrun: {{dir: {directory / 'run'}}}\n")
    return file


def doctor(*arguments, **environ):
    return run_module("megatron_policysplit.cli", ["doctor", *map(str, arguments)], {**os.environ, **environ})


def test_the_command(config):
    result = doctor(config, "--json")
    records = from_json(result.stdout)
    assert result.returncode == int(any(record.status == "FAIL" for record in records)), result.stderr
    names = [record.name for record in records]
    wanted = ("configuration", "Python", "torch", "requirements", "GPU", "shared memory", "host memory", "open files")
    assert set(wanted) | {"C compiler", "host name", "run.dir", "run.dir renames"} <= set(names)
    assert not [record for record in records if record.value.startswith("could not be checked")]
    assert not (config.parent / "run").exists()
    assert sorted(path.name for path in config.parent.iterdir()) == ["model", "run.yaml"]


def test_text_and_exit_code_of_a_machine_with_a_fault(config):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = doctor(config, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    lines = result.stdout.splitlines()
    assert result.returncode == 1 and result.stderr == ""
    (index,) = [number for number, line in enumerate(lines) if line.startswith("FAIL")]
    assert lines[index] == f"FAIL  {f'port {port}':<20}  MASTER_PORT, on any address: Address already in use"
    assert lines[index + 1].strip() == "-> set MASTER_PORT to a free port"
    assert lines[-1].endswith(", 1 FAIL")


def test_a_configuration_that_is_wrong(tmp_path):
    question, (record,) = question_of([str(tmp_path / "none.yaml")], [], False, {})
    assert (record.name, record.status) == ("configuration", "FAIL") and "none.yaml" in record.value
    assert question.config is None and question.arguments == []


def test_a_model_that_cannot_be_read(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {{path: {tmp_path}/none}}\ndata: {{path: q}}\nrun: {{dir: {tmp_path}/run}}\n")
    question, records = question_of([str(file)], [], False, {})
    first = next(examine(question))
    assert records == [] and first.status == "WARN" and "cannot be read" in first.value


def test_command_lines_that_are_wrong():
    both = doctor("--nodes", "--hosts", "a")
    assert both.returncode == 2 and both.stderr.startswith("error: --nodes asks those of the allocation")
    assert doctor("--hosts", ",").returncode == 2


def test_nodes_of_an_allocation(config, tmp_path):
    """Stand-ins for Slurm's commands run this very command for each of two nodes."""
    environ = stand_ins(tmp_path, srun=SRUN, scontrol='printf "localhost\\nno-such-host.invalid\\n"')
    job = {"SLURM_JOB_NODELIST": "x", "SLURM_JOB_NUM_NODES": "2", "CALLS": str(tmp_path / "calls")}
    result = doctor(config, "--nodes", "--json", **environ, **job)
    records = {record.name: record for record in from_json(result.stdout)}
    assert records["node no-such-host.invalid"].status == "FAIL" and result.returncode == 1
    assert records["versions on nodes"].value == "the same on n0, n1"
    assert records["clocks"].status == "OK"
    asked = (tmp_path / "calls").read_text().splitlines()[1]
    assert asked.endswith(f"-m megatron_policysplit.cli doctor {config} --json")


def test_nodes_outside_an_allocation():
    question, (record,) = question_of([], [], True, {})
    assert (record.name, record.status) == ("nodes", "FAIL") and "--hosts" in record.remedy
    assert not question.hosts


def test_the_command_itself_does_without_torch():
    code = (
        "import os, sys\n"
        "from megatron_policysplit.doctor.examine import examine, question_of\n"
        "question, _ = question_of([], [], False, os.environ)\n"
        "records = list(examine(question))\n"
        "print(len(records) > 15, sorted({'torch', 'transformers', 'megatron'} & set(sys.modules)))"
    )
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True)
    assert done.stdout == "True []\n", done.stderr


# --- starts that fail because of the machine ---------------------------------------------------------


def test_errors_of_the_machine_name_the_command(tmp_path):
    assert str(MachineError("no GPU")) == f"no GPU ({DOCTOR})"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        server = Process("server", sys.executable, "127.0.0.1", taken.getsockname()[1], None, tmp_path / "log")
        with pytest.raises(PortError, match=f"cannot listen on .*{DOCTOR}"):
            server.hold_ports(0)


@pytest.mark.parametrize(
    "text, is_told",
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB", True),
        ("No CUDA GPUs are available", True),
        ("NCCL error in: ProcessGroupNCCL.cpp", True),
        ("Found no NVIDIA driver on your system", True),
        ("shape mismatch", False),
        ("[Errno 28] No space left on device", False),
    ],
)
def test_errors_of_a_gpu_name_the_command(text, is_told):
    assert machine_hint(RuntimeError(text)) == (f"; {DOCTOR}" if is_told else "")
