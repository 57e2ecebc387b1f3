"""`policysplit doctor`: what each check makes of a machine, and the command on this one."""

import json
import os
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_policysplit.config import Config
from megatron_policysplit.doctor import examine, machine, network, run_directory, variables, versions
from megatron_policysplit.doctor.finding import FAIL, OK, WARN, Finding, guarded, output_of
from megatron_policysplit.doctor.machine import NO_LIMIT, Gpu, Space
from megatron_policysplit.doctor.versions import Torch, Trainer
from megatron_policysplit.errors import MachineError
from tests.support.commands import run_module
from tests.support.toy_chat import make_chat_model

GIB = 2**30
CUDA = Torch("3.12.3", "2.11.0+cu130", "13.0", 91900, "2.28.9")
CPU = Torch("3.11.7", "2.13.0+cpu")


def statuses(findings):
    return [finding.status for finding in findings]


def test_a_line():
    assert str(Finding("port", FAIL, "80 is taken", "take another")) == (
        "FAIL  port                  80 is taken; take another"
    )
    assert str(Finding("port", OK, "80 is free")) == "OK    port                  80 is free"


def test_a_check_that_fails_itself_is_a_warning():
    def broken():
        raise KeyError("lost")

    assert guarded("disk", broken) == [Finding("disk", WARN, "cannot be checked (KeyError: 'lost')")]


def test_a_program_that_hangs_or_fails():
    with pytest.raises(TimeoutError, match="did not answer within 0.2 s"):
        output_of([sys.executable, "-c", "import time; time.sleep(60)"], 0.2)
    with pytest.raises(RuntimeError, match="ended with 3: last words"):
        output_of([sys.executable, "-c", "print('first'); print('last words'); raise SystemExit(3)"], 30)


# --- versions ----------------------------------------------------------------------------------------


def test_requirements_of_this_environment():
    (finding,) = versions.check_requirements()
    assert finding.status == OK and "required ones fit" in finding.value


def test_requirements_that_do_not_fit(monkeypatch):
    wanted = ["torch>=2.6", "megatron-core<0.20,>=0.16", 'triton>=3.4; extra == "gpu"', "pebble>=5"]
    monkeypatch.setattr(versions.importlib.metadata, "requires", lambda name: wanted)
    has = {"torch": "2.5.1", "megatron-core": "0.16.1", "pebble": None}
    monkeypatch.setattr(versions, "installed", has.__getitem__)
    (finding,) = versions.check_requirements()
    assert (finding.status, finding.value) == (FAIL, "torch 2.5.1 is not >=2.6; pebble is not installed")


@pytest.mark.parametrize(
    "torch, trainer, expected",
    [
        (CPU, Trainer(), [OK]),
        (CUDA, Trainer(gpus=8), [OK]),
        (Torch("3.12.3", error="OSError: libcudart.so.13"), Trainer(), [FAIL]),
        (CPU, Trainer(unused="training on the CPU: this machine has an NVIDIA GPU"), [FAIL]),
    ],
)
def test_torch(torch, trainer, expected):
    assert statuses(versions.check_torch(torch, trainer)) == expected


def test_a_driver_too_old_for_torch(monkeypatch):
    monkeypatch.setattr(versions.Path, "exists", lambda path: True)
    good, driver = versions.check_torch(CUDA, Trainer(gpus=0))
    assert good.value == "2.11.0+cu130 for CUDA 13.0, Python 3.12.3, NCCL 2.28.9, cuDNN 91900"
    assert driver.status == FAIL and "a newer torch needs a newer driver" in driver.remedy


MISSING = "Transformer Engine is not installed"


@pytest.mark.parametrize(
    "trainer, layers, expected",
    [
        (Trainer(transformer_engine=MISSING), "auto", []),
        (Trainer(gpus=1, transformer_engine=MISSING), "auto", [WARN, OK]),
        (Trainer(gpus=1, transformer_engine=MISSING), "transformer_engine", [FAIL, OK]),
        (Trainer(gpus=1, transformer_engine=MISSING), "local", [OK, OK]),
        (Trainer(gpus=1, triton="the LM head is computed in plain torch"), "auto", [OK, WARN]),
    ],
)
def test_packages_of_a_gpu(trainer, layers, expected):
    assert statuses(versions.check_gpu_packages(trainer, layers)) == expected


@pytest.mark.parametrize(
    "server, transport, expected",
    [
        (CUDA, "tensor", OK),
        (Torch("3.12", "2.11.0+cu128", "12.8", 1, "2.27.5"), "tensor", OK),
        (Torch("3.12", "2.14.1+cu130", "13.0", 1, "2.28.9"), "tensor", FAIL),
        (Torch("3.12", "2.14.1+cu130", "13.0", 1, "2.28.9"), "distributed", OK),
        (Torch("3.12", "2.14.1+cu130", "13.0", 1, "2.29.2"), "distributed", FAIL),
        (Torch("3.12", "2.14.1+cu130", "13.0", 1, "2.29.2"), "disk", OK),
    ],
)
def test_the_torch_of_servers(server, transport, expected):
    assert statuses(versions.compare_torches(CUDA, server, transport)) == [expected]


def test_wandb_where_it_is_wanted(monkeypatch):
    config = Config()
    monkeypatch.setattr(versions, "installed", lambda name: None)
    assert [finding.name for finding in versions.check_wanted_packages(config)] == ["modelopt"]
    config.log.wandb_project = "split"
    assert statuses(versions.check_wanted_packages(config)) == [FAIL, OK]


def test_this_interpreter_is_asked():
    import torch

    asked = versions.ask_torch(sys.executable)
    assert asked.torch == torch.__version__ and asked.cuda == torch.version.cuda and not asked.error


# --- machine -----------------------------------------------------------------------------------------

H100 = Gpu(0, "NVIDIA H100 80GB HBM3", 80 * GIB, 79 * GIB, "9.0", False)


@pytest.mark.parametrize(
    "gpus, wanted, expected",
    [
        ([], 8, [OK]),
        ([H100], None, [OK]),
        ([H100], 2, [OK, WARN]),
        ([Gpu(0, "NVIDIA H100", 80 * GIB, 40 * GIB, "9.0", False)], 1, [WARN]),
        ([Gpu(0, "NVIDIA H100", 80 * GIB, 79 * GIB, "9.0", True)], 1, [WARN]),
        ([H100, Gpu(1, "NVIDIA A100", 80 * GIB, 79 * GIB, "8.0", False)], 2, [OK, OK, WARN]),
    ],
)
def test_gpus(gpus, wanted, expected):
    assert statuses(machine.check_gpus(gpus, wanted)) == expected


def test_nvidia_smi_is_read(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '0, NVIDIA H100 80GB HBM3, 81559, 81076, 9.0, Disabled'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert machine.list_gpus() == [Gpu(0, H100.name, 81559 * 2**20, 81076 * 2**20, "9.0", False)]


@pytest.mark.parametrize(
    "space, needed, expected",
    [
        (Space(64 * GIB, 63 * GIB), 3 * GIB, OK),
        (Space(64 * 2**20, 64 * 2**20), 0, WARN),  # a container's default
        (Space(64 * 2**20, 64 * 2**20), 3 * GIB, FAIL),
    ],
)
def test_shared_memory(space, needed, expected):
    assert statuses(machine.check_shared_memory(space, needed)) == [expected]


def test_memory_and_temporary_files():
    assert statuses(machine.check_host_memory(100 * GIB, 0)) == [OK]
    assert statuses(machine.check_host_memory(100 * GIB, 120 * GIB)) == [FAIL]
    assert statuses(machine.check_temporary(Space(GIB, GIB // 2), "/tmp")) == [WARN]
    assert 0 < machine.available_memory() < 2**50


def test_limits():
    free = {"open files": NO_LIMIT, "processes": NO_LIMIT, "locked memory": NO_LIMIT}
    assert statuses(machine.check_limits(free, has_gpu=True)) == [OK, OK, OK]
    tight = {"open files": 1024, "processes": 100, "locked memory": 65536}
    assert statuses(machine.check_limits(tight, has_gpu=True)) == [WARN, WARN, WARN]
    assert statuses(machine.check_limits(tight, has_gpu=False)) == [WARN, WARN, OK]
    assert set(machine.soft_limits()) == set(free)


def test_compiler(tmp_path):
    header = tmp_path / "Python.h"
    assert statuses(machine.check_compiler("/usr/bin/cc", header, has_gpu=True)) == [FAIL]
    (finding,) = machine.check_compiler(None, header, has_gpu=False)
    assert finding.status == OK and "only a GPU's kernels need them" in finding.value
    header.touch()
    assert statuses(machine.check_compiler("/usr/bin/cc", header, has_gpu=True)) == [OK]


# --- network -----------------------------------------------------------------------------------------


def test_own_name(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(network, "addresses_of", lambda host: ["127.0.1.1"])
    assert statuses(network.check_own_name("node1", several_nodes=False)) == [OK]
    assert statuses(network.check_own_name("node1", several_nodes=True)) == [WARN]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    assert statuses(network.check_own_name("node1", several_nodes=True)) == [OK]

    def unknown(host):
        raise OSError("Name or service not known")

    monkeypatch.setattr(network, "addresses_of", unknown)
    assert statuses(network.check_own_name("node1", several_nodes=True)) == [FAIL]


def test_a_resolver_that_hangs():
    with pytest.raises(TimeoutError, match="no answer within 0.1 s"):
        network.within(0.1, lambda: time.sleep(1))


def test_hosts():
    good, unknown = network.check_hosts(["localhost", "no-such-host.invalid"])
    assert good.status == OK
    assert unknown.status == FAIL and unknown.value.startswith("its name cannot be resolved (")


def test_ports():
    config = Config()
    config.rollout.engine = "sglang"
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (finding,) = network.check_ports(None, {"MASTER_PORT": str(port)})
        assert finding.status == FAIL and f"{port} (MASTER_PORT)" in finding.value
        config.rollout.server.port, config.rollout.server.count = port, 2
        assert network.check_ports(config, {})[0].status == FAIL
        assert len(network.check_ports(config, {})) == 3  # two servers and their router
    assert network.check_ports(Config(), {}) == []


@pytest.mark.parametrize("offset, expected", [(0.5, OK), (5.0, WARN), (-120.0, FAIL)])
def test_clocks(offset, expected):
    (finding,) = network.compare_clocks({"a": 1000.0, "b": "1000.1", "c": 1000.0 + offset})
    assert finding.status == expected
    assert expected == OK or finding.value.startswith("c is ")


def test_nodes_that_differ():
    def of(torch, status=OK):
        return [Finding("torch", status, torch, "").record(), Finding("GPU 0", OK, "x", "").record()]

    alike = network.compare_nodes({"a": of("2.11.0"), "b": of("2.11.0")})
    assert alike == [Finding("nodes", OK, "2 alike")]
    (differs,) = network.compare_nodes({"a": of("2.11.0"), "b": of("2.14.1")})
    assert (differs.status, differs.value) == (WARN, "differs: 2.11.0 on a; 2.14.1 on b")
    (broken,) = network.compare_nodes({"a": of("2.11.0", FAIL)})
    assert (broken.name, broken.status, broken.value) == ("node a", FAIL, "torch: 2.11.0")


def test_nodes_are_asked_by_srun(tmp_path, monkeypatch):
    """A stand-in for srun that runs the command once for each of two nodes."""
    program = tmp_path / "srun"
    program.write_text(
        '#!/bin/sh\necho "$@" >> calls\n'
        'case "$*" in *hostname*) echo "n1 1000.0"; echo "n2 1000.2";;\n'
        '*) for n in n1 n2; do echo "noise"; echo "{\\"host\\": \\"$n\\", \\"findings\\": '
        '[{\\"name\\": \\"torch\\", \\"status\\": \\"OK\\", \\"value\\": \\"$n\\", \\"remedy\\": \\"\\"}]}"; done;;\n'
        "esac\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    clocks, torch = network.check_nodes(["n1", "n2"])
    assert clocks.value == "2 nodes within 0.1 s"
    assert torch.value == "differs: n1 on n1; n2 on n2"
    calls = Path("calls").read_text().splitlines()
    assert all(call.startswith("--overlap --nodes=2 --ntasks-per-node=1 ") for call in calls)
    assert calls[1].endswith("-m megatron_policysplit.cli doctor --json --one-line")


def test_no_job_to_ask_in():
    assert statuses(network.check_nodes([])) == [WARN]
    assert network.slurm_hosts({}) == []


# --- run directory, variables ------------------------------------------------------------------------


def test_file_system():
    mounts = "/dev/a / ext4 rw 0 0\nserver:/x /data nfs4 rw 0 0\nb /data\\040two lustre rw 0 0\n"
    assert run_directory.file_system(Path("/data/runs"), mounts) == "nfs4"
    assert run_directory.file_system(Path("/data two/runs"), mounts) == "lustre"
    assert run_directory.file_system(Path("/database"), mounts) == "ext4"


def test_run_directory(tmp_path, monkeypatch):
    runs = tmp_path / "runs" / "new"
    assert statuses(run_directory.check_run_directory(runs, GIB // 1024, 2)) == [OK]
    assert list(tmp_path.iterdir()) == []  # nothing is left
    monkeypatch.setattr(run_directory.Space, "of", classmethod(lambda cls, path: cls(10 * GIB, 5 * GIB)))
    assert statuses(run_directory.check_run_directory(runs, 2 * GIB, 2)) == [WARN]
    assert statuses(run_directory.check_run_directory(runs, 6 * GIB, 2)) == [FAIL]
    monkeypatch.setattr(run_directory.os, "access", lambda *args: False)
    assert statuses(run_directory.check_run_directory(runs, 1, 2)) == [FAIL]


def test_a_file_system_without_locks_and_with_another_clock(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(run_directory.fcntl, "flock", refuse)
    now = time.time()
    monkeypatch.setattr(run_directory.time, "time", lambda: now + 60)
    locks, clock = run_directory.check_semantics(tmp_path, is_shared=True)
    assert locks.status == OK and "has no locks (Operation not supported)" in locks.value
    assert clock.status == WARN and clock.value.startswith("the file server's clock is -")


def test_variables():
    config = Config()
    assert statuses(variables.check_variables({}, config, has_gpu=False)) == [OK]
    half, shown = variables.check_variables({"RANK": "0", "NCCL_DEBUG": "INFO"}, None, has_gpu=False)
    assert half.status == FAIL and shown.value == "NCCL_DEBUG=INFO"
    of_rank = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert statuses(variables.check_variables(of_rank, None, has_gpu=False)) == [WARN, OK]
    allocator = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert statuses(variables.check_variables(allocator, config, has_gpu=True)) == [OK]
    config.rollout.colocated = True
    assert statuses(variables.check_variables(allocator, config, has_gpu=True)) == [FAIL, OK]
    libraries = {"LD_LIBRARY_PATH": "/usr/local/cuda-12/lib64"}
    assert statuses(variables.check_variables(libraries, None, has_gpu=True)) == [WARN, OK]


# --- the command -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_chat_model(tmp_path_factory.mktemp("model"))


def test_sizes_of_a_run(model):
    config = Config()
    config.model.path, config.model.dtype = str(model), "bfloat16"
    from checkpoints_conv import check_safetensors

    shapes = [tensor.shape for tensor in check_safetensors(model).values()]
    counts = [int(__import__("numpy").prod(shape)) for shape in shapes]
    size = examine.Size.of(config)
    assert (size.checkpoint, size.pinned, size.shared_memory) == (14 * sum(counts), 0, 0)
    config.rollout.engine, config.weight_sync.transport = "sglang", "tensor"
    assert examine.Size.of(config).shared_memory == 4 * max(counts)
    config.rollout.server.count, config.rollout.server.tensor = 2, 2
    assert examine.gpus_wanted(config) == 5
    config.rollout.colocated, config.parallel.tensor, config.parallel.data = True, 2, 2
    config.train.distributed_optimizer = True
    assert examine.Size.of(config).pinned == round(sum(counts) * (2 + 12 / 2) / 2 * 4)
    assert examine.gpus_wanted(config) == 4


def doctor(*arguments):
    return run_module("megatron_policysplit.cli", ["doctor", *arguments])


def test_the_command(model, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {{path: {model}}}\ndata: {{path: q}}\nrun: {{dir: {tmp_path / 'run'}}}\n")
    result = doctor(str(file), "--json")
    records = json.loads(result.stdout)
    assert result.returncode == (1 if any(record["status"] == FAIL for record in records) else 0)
    names = [record["name"] for record in records]
    assert {"packages", "torch", "shared memory", "open files", "compiler", "host name", "run directory"} <= set(names)
    assert not (tmp_path / "run").exists()


def test_the_command_on_a_configuration_that_is_wrong(tmp_path):
    result = doctor(str(tmp_path / "none.yaml"))
    assert result.returncode == 1 and result.stdout.startswith("FAIL  configuration")
    assert result.stderr.rstrip().endswith("would stop a run")


def test_it_does_not_import_torch_itself():
    script = "import sys; from megatron_policysplit.doctor.examine import examine; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_errors_of_the_machine_point_to_it():
    assert str(MachineError("no GPU")) == "no GPU (`policysplit doctor` examines this machine)"
    import pickle

    assert str(pickle.loads(pickle.dumps(MachineError("no GPU")))) == str(MachineError("no GPU"))
