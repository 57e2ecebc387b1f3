"""Variables that a rank sets for its libraries: which, when, and that nobody else gets them."""

import ctypes
import os
import subprocess
import sys
import types

import pytest

from megatron_policysplit.distributed import environment
from megatron_policysplit.errors import ConfigError
from megatron_policysplit.serving.processes import inherited_environment
from tests.support.e2e import ROOT

HOPPER, BLACKWELL = (9, 0), (10, 0)
RECORDS = {"TORCH_NCCL_DUMP_ON_TIMEOUT": "1", "TORCH_FR_BUFFER_SIZE": "2000"}


@pytest.fixture
def nothing_set(monkeypatch):
    monkeypatch.setattr(environment, "_set_here", {})


@pytest.mark.parametrize("capability", [(8, 0), HOPPER])
def test_one_queue_for_tensor_parallelism_up_to_hopper(capability):
    one = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    assert environment.defaults(tensor=2, deterministic=False, capability=capability) == one | RECORDS
    assert environment.defaults(tensor=1, deterministic=False, capability=capability) == RECORDS


@pytest.mark.parametrize("capability", [None, BLACKWELL, (12, 0)])
def test_and_not_elsewhere(capability):
    records = {} if capability is None else RECORDS
    assert environment.defaults(tensor=8, deterministic=False, capability=capability) == records


def test_deterministic():
    """The values that Megatron-Core 0.19.2 sets for its deterministic mode (megatron/training/determinism.py)."""
    assert environment.defaults(tensor=1, deterministic=True, capability=HOPPER) == {
        "NCCL_ALGO": "Ring",
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        **RECORDS,
    }


def test_what_is_set_already_stays(nothing_set):
    environ = {"CUDA_DEVICE_MAX_CONNECTIONS": "32", "CUBLAS_WORKSPACE_CONFIG": ":16:8", "TORCH_FR_BUFFER_SIZE": "7"}
    environment.set_defaults(environ, tensor=4, deterministic=True, capability=HOPPER)
    assert environ == {
        "CUDA_DEVICE_MAX_CONNECTIONS": "32",
        "CUBLAS_WORKSPACE_CONFIG": ":16:8",
        "TORCH_FR_BUFFER_SIZE": "7",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "NCCL_ALGO": "Ring",
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    }
    said = environment.described_defaults()
    assert said == "environment: TORCH_NCCL_DUMP_ON_TIMEOUT=1, NVTE_ALLOW_NONDETERMINISTIC_ALGO=0, NCCL_ALGO=Ring"


def test_nothing_is_said_where_nothing_is_set(nothing_set):
    environ = {"NCCL_ALGO": "Tree"}
    environment.set_defaults(environ, tensor=4, deterministic=False, capability=None)
    assert environ == {"NCCL_ALGO": "Tree"} and environment.described_defaults() is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1"),
        ("CUBLAS_WORKSPACE_CONFIG", ":0:0"),
        ("NCCL_ALGO", "Tree"),
        ("NCCL_ALGO", "Ring,Tree"),
        ("NCCL_ALGO", ""),
    ],
)
def test_a_variable_that_contradicts_is_refused(nothing_set, name, value):
    environ = {name: value}
    with pytest.raises(ConfigError, match=rf"train.deterministic=true .* {name}={value} in the environment; unset it"):
        environment.set_defaults(environ, tensor=1, deterministic=True, capability=HOPPER)
    assert environ == {name: value}, "and nothing has been set"


@pytest.mark.parametrize("value", ["Ring", "^NVLS", "CollnetDirect, CollnetChain"])
def test_other_deterministic_values_are_taken(value):
    environment.check_deterministic({"NCCL_ALGO": value})


def test_servers_do_not_get_them(nothing_set):
    """But what the user set for all."""
    environ = {"NCCL_DEBUG": "WARN", "CUBLAS_WORKSPACE_CONFIG": ":16:8"}
    before = inherited_environment(environ, sys.executable)
    environment.set_defaults(environ, tensor=4, deterministic=True, capability=HOPPER)
    assert environ.keys() > {"NCCL_ALGO", "NVTE_ALLOW_NONDETERMINISTIC_ALGO", "CUDA_DEVICE_MAX_CONNECTIONS"}
    assert inherited_environment(environ, sys.executable) == before
    assert before.items() >= {"NCCL_DEBUG": "WARN", "CUBLAS_WORKSPACE_CONFIG": ":16:8"}.items()


# --- compute capability ------------------------------------------------------------------------------


def driver(initialized=0, found=0, answered=0):
    """A stand-in for libnvidia-ml with these return codes; `calls` is what it was asked."""

    def handle_of(index, handle):
        calls.append("handle")
        handle._obj.value = 77
        return found

    def capability_of(handle, major, minor):
        calls.append("capability")
        assert handle.value == 77
        major._obj.value, minor._obj.value = HOPPER
        return answered

    calls = []
    return types.SimpleNamespace(
        calls=calls,
        nvmlInit_v2=lambda: calls.append("init") or initialized,
        nvmlShutdown=lambda: calls.append("shutdown"),
        nvmlDeviceGetHandleByIndex_v2=handle_of,
        nvmlDeviceGetCudaComputeCapability=capability_of,
    )


@pytest.mark.parametrize(
    ("codes", "expected", "calls"),
    [
        ({}, HOPPER, ["init", "handle", "capability", "shutdown"]),
        ({"initialized": 9}, None, ["init"]),
        ({"found": 6}, None, ["init", "handle", "shutdown"]),
        ({"answered": 3}, None, ["init", "handle", "capability", "shutdown"]),
    ],
)
def test_compute_capability(monkeypatch, codes, expected, calls):
    library = driver(**codes)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library if name == "libnvidia-ml.so.1" else None)
    assert environment.compute_capability() == expected
    assert library.calls == calls


def test_a_machine_without_the_driver(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert environment.compute_capability() is None


# --- in a rank ---------------------------------------------------------------------------------------

RANK = """
import os
import sys
from megatron_policysplit.distributed import environment
from megatron_policysplit.training import worker

def stop(environ, **facts):
    print(facts, "torch" in sys.modules, flush=True)
    os._exit(0)

environment.compute_capability = lambda: (9, 0)
environment.set_defaults = stop
worker.main(sys.argv[1:])
"""


def test_a_rank_sets_them_before_torch_is_imported(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("model: {path: m}\ndata: {path: d}\nrun: {dir: r}\nparallel: {tensor: 3}\n")
    command = [sys.executable, "-c", RANK, str(config), "train.deterministic=true"]
    environ = dict(os.environ) | {"PYTHONPATH": str(ROOT)}
    said = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=60)
    assert said.stdout == "{'tensor': 3, 'deterministic': True, 'capability': (9, 0), 'nccl': None} False\n", (
        said.stderr
    )
