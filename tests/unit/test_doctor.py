"""Verdicts of `policysplit doctor` about a machine and a run's needs, from facts that are made up."""

import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_policysplit.config import Config
from megatron_policysplit.doctor import machine, network, run_directory, variables
from megatron_policysplit.doctor.asking import ProbeFailed, guarded, output_of, within
from megatron_policysplit.doctor.machine import UNLIMITED, Compiler, Limits, Memory, Space
from megatron_policysplit.doctor.needs import Needs
from megatron_policysplit.doctor.network import HostName, PeerFacts, PortFacts
from megatron_policysplit.doctor.record import as_json, counted, fail, from_json, line_of, ok
from megatron_policysplit.doctor.run_directory import Directory

GIB = 2**30
COLOCATED = Needs(ranks=8, local_ranks=8, replicas=8, sglang=True, colocated=True, own_servers=8)


def statuses(records):
    return [record.status for record in records]


# --- records and probes ------------------------------------------------------------------------------


def test_records_as_text_and_json():
    records = [ok("torch", "2.11.0"), fail("port 80", "taken", "take another")]
    assert line_of(records[0]) == "OK    torch                 2.11.0"
    assert line_of(records[1]) == f"FAIL  port 80               taken\n{' ' * 28}-> take another"
    assert counted(records) == "1 OK, 0 WARN, 1 FAIL"
    assert from_json(as_json(records)) == records
    for text in ("", "{}x", '[{"name": "a"}]', '[{"name": "a", "status": "BAD", "value": "", "remedy": ""}]'):
        with pytest.raises(ValueError):
            from_json(text)


def test_a_probe_that_fails_is_a_warning():
    def hangs():
        within(0.05, lambda: time.sleep(5))

    (record,) = guarded("disk", hangs)
    assert (record.status, record.value) == ("WARN", "could not be checked: no answer within 0.05 s")
    (record,) = guarded("disk", lambda: [].pop())
    assert (record.status, record.value) == ("WARN", "could not be checked: IndexError: pop from empty list")


def test_commands_that_hang_fail_or_are_not_there():
    with pytest.raises(ProbeFailed, match="gave no answer within 0.2 s"):
        output_of([sys.executable, "-c", "import time; time.sleep(60)"], 0.2)
    with pytest.raises(ProbeFailed, match=r"ended with code 3 \(last words\)"):
        output_of([sys.executable, "-c", "import sys; print('last words', file=sys.stderr); sys.exit(3)"], 30)
    with pytest.raises(ProbeFailed, match="ended with code -11"):  # an extension for another torch
        output_of([sys.executable, "-c", "import os; os.kill(os.getpid(), 11)"], 30)
    with pytest.raises(ProbeFailed, match="/no/program cannot be run"):
        output_of(["/no/program"], 1)


# --- what a run needs --------------------------------------------------------------------------------


def test_bytes_of_a_run():
    """P parameters: bf16 weights 2, gradients 4, AdamW and master weights 12; in fp32 4, 4 and 8."""
    p = 1_000_000
    assert Needs(parameters=p).rank_bytes == 18 * p
    assert Needs(parameters=p, dtype="float32").rank_bytes == 16 * p
    assert Needs(parameters=p, tensor=2, pipeline=2).rank_bytes == 18 * p // 4
    sharded = replace(COLOCATED, parameters=p, distributed_optimizer=True)
    assert sharded.offload_bytes == 8 * (2 + 12 / 8) * p
    assert replace(COLOCATED, parameters=p).offload_bytes == 8 * 14 * p
    assert Needs(parameters=p).offload_bytes == 0
    assert Needs(parameters=p, reference=True, local_ranks=2).reference_bytes == 4 * p
    assert (Needs(parameters=p).checkpoint_bytes, Needs(parameters=p).export_bytes) == (14 * p, 2 * p)
    assert Needs(parameters=p, dtype="float32").checkpoint_bytes == 12 * p


def test_shared_memory_ports_and_gpus_of_a_run():
    needs = Needs(sglang=True, own_servers=2, server_tensor=2, server_port=30000, local_ranks=4)
    assert needs.shared_bytes == 2 * 512 * 2**20
    assert replace(needs, largest_tensor=GIB).shared_bytes == 2 * 2 * GIB  # goes alone, in a bucket of its own
    assert replace(needs, transport="disk").shared_bytes == 0
    assert needs.fixed_ports == [30000, 30001, 30002]  # two servers and their router
    assert replace(needs, own_servers=1).fixed_ports == [30000]
    assert needs.gpus == 8 and replace(needs, colocated=True).gpus == 4


# --- machine -----------------------------------------------------------------------------------------


def test_shared_memory():
    small = Space("/dev/shm", 64 << 20, 60 << 20, True)  # a container's default
    tensor = Needs(sglang=True, own_servers=1)
    assert machine.check_shared_memory(small, 0, None).status == "OK"
    assert machine.check_shared_memory(small, 1, None).status == "OK"
    assert machine.check_shared_memory(small, 2, None).status == "WARN"  # NCCL
    assert machine.check_shared_memory(small, 0, tensor).status == "FAIL"
    assert machine.check_shared_memory(small, 1, replace(tensor, colocated=True)).status == "OK"  # CUDA IPC
    assert machine.check_shared_memory(Space("/dev/shm", 9 * GIB, 8 * GIB, True), 8, tensor).status == "OK"
    assert machine.check_shared_memory(None, 0, None).status == "FAIL"
    assert machine.check_shared_memory(replace(small, writable=False), 0, None).status == "FAIL"


def test_temporary_files():
    assert machine.check_temporary(Space("/tmp", 9 * GIB, GIB, True)).status == "OK"
    assert machine.check_temporary(Space("/tmp", 9 * GIB, GIB - 1, True)).status == "WARN"
    assert machine.check_temporary(Space("/tmp", 9 * GIB, GIB, False)).status == "FAIL"


def test_host_memory_of_colocated_actors():
    node = Memory(1000 * GIB, 900 * GIB)
    needs = replace(COLOCATED, parameters=8 * GIB)  # 8 ranks x 14 bytes: 896 GiB
    record = machine.check_memory(node, 8, needs)
    assert record.status == "OK" and "896.0 GiB" in record.value
    assert machine.check_memory(replace(node, available=890 * GIB), 8, needs).status == "WARN"
    assert machine.check_memory(replace(node, limit=800 * GIB), 8, needs).status == "FAIL"
    assert machine.check_memory(node, 8, replace(needs, colocated=False)).status == "OK"


def test_host_memory_of_training_on_a_cpu():
    needs = Needs(parameters=GIB, dtype="float32", local_ranks=2)  # 2 ranks x 16 GiB
    assert machine.check_memory(Memory(40 * GIB, 33 * GIB), 0, needs).status == "OK"
    assert machine.check_memory(Memory(40 * GIB, 31 * GIB), 0, needs).status == "WARN"
    limited = machine.check_memory(Memory(400 * GIB, 300 * GIB, limit=30 * GIB, used=GIB), 0, needs)
    assert limited.status == "FAIL" and limited.value.startswith("29.0 GiB of 30.0 GiB are free (limit of the control")
    assert machine.check_memory(Memory(GIB, GIB), 0, replace(needs, parameters=None)).status == "OK"


def test_control_groups_of_both_versions():
    second = machine.control_groups("0::/job/step\n", root="/cg")
    assert [str(path) for path in second] == ["/cg/job/step", "/cg/job", "/cg"]
    first = machine.control_groups("5:cpu:/x\n4:memory:/job\n", root="/cg")
    assert [str(path) for path in first] == ["/cg/memory/job", "/cg/memory"]


FREE = Limits(*[(UNLIMITED, UNLIMITED)] * 3, core=(0, UNLIMITED), tasks=100)


def test_limits_that_are_no_limits():
    assert statuses(machine.check_limits(FREE, 8, COLOCATED)) == ["OK"] * 4


def test_locked_memory_matters_to_infiniband():
    little = replace(FREE, locked=(8 << 20, UNLIMITED))
    assert machine.check_limits(little, 8, None)[0].status == "OK"
    assert machine.check_limits(replace(little, infiniband=True), 8, None)[0].status == "WARN"


def test_open_files():
    """256 + 17 for each other rank + 2 for each request in flight."""
    assert machine.check_limits(replace(FREE, files=(384, 4096)), 8, Needs())[1].status == "OK"
    few = machine.check_limits(replace(FREE, files=(1024, 4096)), 8, Needs(ranks=64))[1]
    assert few.status == "WARN" and few.remedy.startswith("ulimit -n 1455 ")
    hard = machine.check_limits(replace(FREE, files=(1024, 1024)), 8, Needs(ranks=64))[1]
    assert hard.remedy == "have the administrator raise the hard limit, which is 1024"


def test_processes_and_core_files():
    assert machine.check_limits(replace(FREE, processes=(4096, 4096)), 96, COLOCATED)[2].status == "WARN"
    assert machine.check_limits(replace(FREE, processes=(4096, 4096)), 8, Needs())[2].status == "OK"
    crash = replace(FREE, core=(UNLIMITED, UNLIMITED))
    assert machine.check_limits(crash, 8, None)[3].remedy == "ulimit -c 0"
    assert machine.check_limits(replace(crash, core_pattern="|/usr/lib/collect %P"), 8, None)[3].status == "OK"


@pytest.mark.parametrize(
    "compiler, part",
    [
        (Compiler(None, None), "none on PATH"),
        (Compiler("gcc", None), "Python.h is missing"),
        (Compiler("gcc", "/include", "gcc ended with code 1 (no header)"), "does not compile"),
    ],
)
def test_compilers_that_do_not_do(compiler, part):
    assert machine.check_compiler(compiler, has_gpu=True).status == "FAIL"
    record = machine.check_compiler(compiler, has_gpu=False)
    assert record.status == "OK" and part in record.value


# --- network -----------------------------------------------------------------------------------------

LOOPBACK = HostName("n1", ("127.0.1.1",))


@pytest.mark.parametrize(
    "host, environ, count, expected",
    [
        (HostName("n1", ("10.0.0.1",)), {}, 4, "OK"),
        (LOOPBACK, {}, 1, "WARN"),
        (LOOPBACK, {}, 2, "FAIL"),
        (LOOPBACK, {"GLOO_SOCKET_IFNAME": "eth0"}, 2, "OK"),
        (HostName("n1", ("::1", "127.0.0.1")), {}, 2, "FAIL"),
        (HostName("n1", ("127.0.1.1", "10.0.0.1")), {}, 2, "OK"),
        (HostName("n1", (), "Name or service not known"), {}, 1, "WARN"),
        (HostName("n1", (), "Name or service not known"), {}, 2, "FAIL"),
    ],
)
def test_own_host_name(host, environ, count, expected):
    assert network.check_host_name(host, environ, count).status == expected


@pytest.mark.parametrize(
    "variable, value, expected",
    [
        ("GLOO_SOCKET_IFNAME", "eth0", "OK"),
        ("GLOO_SOCKET_IFNAME", "eth", "FAIL"),
        ("GLOO_SOCKET_IFNAME", "eth0,ib9", "FAIL"),
        ("NCCL_SOCKET_IFNAME", "eth", "OK"),
        ("NCCL_SOCKET_IFNAME", "=eth", "FAIL"),
        ("NCCL_SOCKET_IFNAME", "bond,ib", "OK"),
        ("NCCL_SOCKET_IFNAME", "bond", "FAIL"),
    ],
)
def test_interfaces_that_variables_name(variable, value, expected):
    assert statuses(network.check_interfaces({variable: value}, ["lo", "eth0", "ib0"])) == [expected]


def test_interfaces_that_need_not_exist():
    assert network.check_interfaces({"NCCL_SOCKET_IFNAME": "^docker"}, ["lo"]) == []


def test_ports():
    free, taken = PortFacts("MASTER_PORT", "", 29500, None), PortFacts("rollout.server.port", "", 80, "in use")
    assert statuses(network.check_ports([free, taken], None, None)) == ["FAIL", "OK"]
    assert statuses(network.check_ports([free], (20000, 60999), None)) == ["WARN", "OK"]
    assert statuses(network.check_ports([], (32768, 33000), Needs(local_ranks=8))) == ["WARN"]
    derived = network.check_ports([], (1024, 65535), Needs(nodes=2))
    assert statuses(derived) == ["WARN"] and "MASTER_PORT" in derived[0].remedy
    assert statuses(network.check_ports([], (32768, 60999), Needs(nodes=2))) == ["OK"]


def test_ports_of_this_machine():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert network.bind_error("127.0.0.1", port) == "Address already in use"
        environ = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        (facts,) = network.look_at_ports(environ, None)
        assert facts.error == "Address already in use"
        # Of another host nothing is bound here.
        assert network.look_at_ports({**environ, "MASTER_ADDR": "192.0.2.1"}, None) == []
        assert network.connect_error("127.0.0.1", port) is None
    assert network.bind_error("127.0.0.1", port) is None
    assert network.connect_error("127.0.0.1", port) == "Connection refused"
    assert network.connect_error("127.0.0.1", port, refused_is_reachable=True) is None


def test_servers_that_a_run_calls():
    assert network.check_peer(PeerFacts("rollout.addresses", "http://n1:1", "refused")).status == "FAIL"
    assert network.check_peer(PeerFacts("eval.judge.url", "http://n1:1", "refused")).status == "WARN"
    assert network.check_peer(PeerFacts("eval.judge.url", "http://n1:1", None)).status == "OK"
    (judge,) = network.look_at_peers(Needs(judge="http://user:secret@127.0.0.1:9/v1"))
    assert judge == PeerFacts("eval.judge.url", "http://127.0.0.1:9", "Connection refused")


def test_names():
    assert network.resolve("localhost").is_loopback
    unknown = network.resolve("no-such-host.invalid")
    assert not unknown.addresses and unknown.error and not unknown.is_loopback
    assert statuses(network.check_master(unknown)) == ["FAIL"] and network.check_master(None) == []


# --- run directory -----------------------------------------------------------------------------------

PLACE = Directory("/data/runs", "nfs4", free=100 * GIB, total=200 * GIB, clock=0.0)


def test_a_directory_that_does():
    assert statuses(run_directory.check_directory(PLACE, Needs(nodes=2))) == ["OK"] * 5


@pytest.mark.parametrize(
    "changes, needs, name, expected",
    [
        ({"write": "Read-only file system"}, Needs(), "run.dir", "FAIL"),
        ({"kind": "tmpfs"}, Needs(), "run.dir", "WARN"),
        ({"kind": "ext4"}, Needs(), "run.dir", "OK"),
        ({"kind": "ext4"}, Needs(nodes=2), "run.dir", "WARN"),
        ({"replace": "Input/output error"}, Needs(), "run.dir renames", "FAIL"),
        ({"rename": "Input/output error"}, Needs(), "run.dir renames", "FAIL"),
        ({"lock": "No locks available"}, Needs(), "run.dir locks", "WARN"),
        ({"clock": -3.0}, Needs(), "run.dir clock", "WARN"),
        # A checkpoint of P bf16 parameters takes 14 P, an export 2 P; two are kept and one is written.
        ({}, Needs(parameters=7 * GIB), "run.dir space", "FAIL"),
        ({}, Needs(parameters=6 * GIB), "run.dir space", "WARN"),
        ({}, Needs(parameters=2 * GIB), "run.dir space", "OK"),
        ({}, Needs(parameters=2 * GIB, sglang=True, transport="disk", checkpoints_kept=3), "run.dir space", "WARN"),
    ],
)
def test_directories_that_do_not(changes, needs, name, expected):
    records = run_directory.check_directory(replace(PLACE, **changes), needs)
    (record,) = [record for record in records if record.name == name]
    assert record.status == expected
    assert {other.status for other in records if other.name != name} <= {"OK"}


def test_kinds_of_file_systems():
    mounts = (
        "21 1 8:1 / / rw - ext4 /dev/a rw\n"
        "22 21 0:9 / /data rw,noatime shared:1 - nfs4 server:/x rw\n"
        "23 21 0:8 / /data\\040two rw - lustre b rw\n"
        "24 21 0:7 / /data rw - beegfs c rw\n"
    )
    kinds = {path: run_directory.file_system(mounts, Path(path)) for path in ("/data/r", "/data two/r", "/database")}
    assert kinds == {"/data/r": "beegfs", "/data two/r": "lustre", "/database": "ext4"}


def test_this_directory_is_tried_and_left_as_it_was(tmp_path):
    directory = run_directory.look_at_directory(str(tmp_path / "not" / "there"))
    assert directory.path == str(tmp_path) and list(tmp_path.iterdir()) == []
    assert (directory.write, directory.replace, directory.rename, directory.lock) == (None,) * 4
    assert directory.free > 0 and abs(directory.clock) < 60 and directory.kind != "unknown"


# --- environment -------------------------------------------------------------------------------------


def of_variables(environ, needs=None, *, capability=None, cuda=None, cores=8, libraries=lambda directory: []):
    records = variables.check_variables(
        environ, needs, capability=capability, cuda=cuda, cores=cores, libraries=libraries
    )
    return [(record.name, record.status) for record in records]


@pytest.mark.parametrize(
    "environ, needs, expected",
    [
        ({}, None, ("environment", "OK")),
        ({"RANK": "0"}, None, ("rank variables", "FAIL")),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, None, ("rank variables", "WARN")),
        ({"MASTER_ADDR": "a"}, None, ("environment", "OK")),
        ({"CUDA_VISIBLE_DEVICES": "3"}, Needs(local_ranks=8), ("CUDA_VISIBLE_DEVICES", "FAIL")),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, Needs(local_ranks=2), ("CUDA_VISIBLE_DEVICES", "OK")),
        ({"CUDA_VISIBLE_DEVICES": ""}, Needs(local_ranks=2), ("CUDA_VISIBLE_DEVICES", "OK")),
        ({"https_proxy": "http://p:1"}, Needs(judge="https://j/v1"), ("proxies", "WARN")),
        ({"https_proxy": "http://p:1"}, None, ("proxies", "OK")),
        ({"SLURM_JOB_ID": "7"}, Needs(local_ranks=4), ("OMP_NUM_THREADS", "WARN")),
        ({}, Needs(local_ranks=4), ("environment", "OK")),  # `train` sets it for the ranks that it starts
        ({"OMP_NUM_THREADS": "4"}, Needs(local_ranks=4), ("OMP_NUM_THREADS", "WARN")),
        ({"OMP_NUM_THREADS": "2"}, Needs(local_ranks=4), ("OMP_NUM_THREADS", "OK")),
        ({"NCCL_ALGO": "Tree"}, Needs(deterministic=True), ("environment", "FAIL")),
    ],
)
def test_variables(environ, needs, expected):
    assert of_variables(environ, needs) == [expected]


def test_expandable_segments():
    config, expandable = Config(), {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert variables.check_allocators(config, expandable) == []
    config.rollout.colocated = True
    assert statuses(variables.check_allocators(config, expandable)) == ["FAIL"]
    config.weight_sync.transport = "disk"
    assert variables.check_allocators(config, expandable) == []
    config.rollout.server.environment = expandable
    assert statuses(variables.check_allocators(config, {})) == ["FAIL"]


def test_variables_of_a_gpu():
    connections = {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}
    set_otherwise = [("CUDA_DEVICE_MAX_CONNECTIONS", "WARN")]
    assert of_variables(connections, Needs(tensor=2), capability=(9, 0), cuda="13.0") == set_otherwise
    assert of_variables(connections, Needs(tensor=2), capability=(10, 0), cuda="13.0") == [("environment", "OK")]
    slow = {"NCCL_P2P_DISABLE": "1", "NCCL_DEBUG": "INFO"}
    assert of_variables(slow, cuda="13.0") == [("NCCL_P2P_DISABLE", "WARN")]
    assert of_variables(slow) == [("environment", "OK")]


def test_libraries_on_the_loaders_path(tmp_path):
    (tmp_path / "libnccl.so.2").touch()
    (tmp_path / "libother.so").touch()
    assert variables.cuda_libraries(str(tmp_path)) == ["libnccl.so.2"]
    environ = {"LD_LIBRARY_PATH": f"/nothing::{tmp_path}"}
    assert of_variables(environ, cuda="13.0", libraries=variables.cuda_libraries) == [("LD_LIBRARY_PATH", "WARN")]
    assert of_variables(environ, libraries=variables.cuda_libraries) == [("environment", "OK")]


def test_a_password_of_a_proxy_is_not_shown():
    assert network.proxies({"HTTP_PROXY": "http://me:secret@p:1"}) == {"HTTP_PROXY": "http://***@p:1"}
