"""Verdicts of `policysplit doctor` about packages, GPUs and servers, from facts that are made up."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from megatron_policysplit.doctor import gpus, versions
from megatron_policysplit.doctor.gpus import Card, DriverFacts, Holder
from megatron_policysplit.doctor.needs import Needs
from megatron_policysplit.doctor.server_versions import check_server
from megatron_policysplit.doctor.versions import Gpu, Interpreter

GIB = 2**30
H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 79 * GIB, 80 * GIB)
CPU = Interpreter(
    "3.11.7",
    versions={"torch": "2.13.0+cpu", "megatron-core": "0.16.1", "transformers": "5.23.0"},
    torch="2.13.0+cpu",
    no_gpu="torch is a build for CPUs",
)
CUDA = Interpreter(
    "3.12.3",
    versions={
        "torch": "2.11.0",
        "megatron-core": "0.19.2",
        "transformer-engine": "2.11.0",
        "transformer-engine-torch": "2.11.0",
        "transformer-engine-cu13": "2.11.0",
        "triton": "3.6.0",
        "transformers": "5.23.0",
    },
    torch="2.11.0+cu130",
    cuda="13.0",
    cudnn=91900,
    cublas="13.1.0",
    nccl="2.28.9",
    architectures=("sm_80", "sm_90", "sm_100", "compute_120"),
    driver_cuda=(13, 0),
    gpus=(H100,),
)
TENSOR = Needs(sglang=True, own_servers=1, server_python="/envs/sglang/bin/python")


def said(record):
    return record.status, record.value


def by_name(records, name):
    (record,) = [record for record in records if record.name == name]
    return record


def with_versions(interpreter, **changes):
    """The interpreter with other versions; None takes a package away. Names have _ for -."""
    changed = {**interpreter.versions, **{name.replace("_", "-"): value for name, value in changes.items()}}
    return replace(interpreter, versions={name: value for name, value in changed.items() if value is not None})


def test_ranges_are_those_of_setup():
    text = (Path(__file__).resolve().parents[2] / "setup.py").read_text()
    for package, ours in (
        ("torch", versions.TORCH),
        ("megatron-core", versions.MEGATRON),
        ("transformers", versions.TRANSFORMERS),
        ("triton", versions.TRITON),
    ):
        ranges = re.findall(rf'"{package}([<>=][^";\[]*)"', text)
        assert ranges and all(SpecifierSet(given) == ours for given in ranges), package
    assert SpecifierSet(re.search(r'python_requires="(.*)"', text)[1]) == versions.PYTHON


@pytest.mark.parametrize("interpreter, has_gpu", [(CPU, False), (CUDA, True), (replace(CUDA, gpus=()), False)])
def test_a_machine_without_a_fault(interpreter, has_gpu):
    assert {record.status for record in versions.check_versions(interpreter, has_gpu, None)} == {"OK"}


def test_a_build_for_cpus_beside_a_gpu():
    record = versions.check_torch(CPU, has_gpu=True)
    assert record.status == "FAIL" and "this machine has an NVIDIA GPU, which it cannot use" in record.value
    assert "docs/gpu.md" in record.remedy


def test_a_torch_that_cannot_be_imported_or_sees_no_gpu():
    broken = replace(CUDA, torch=None, torch_error="OSError: libcudart.so.13")
    assert said(versions.check_torch(broken, True)) == ("FAIL", "cannot be imported: OSError: libcudart.so.13")
    hidden = replace(CUDA, gpus=(), no_gpu="CUDA driver initialization failed")
    record = versions.check_torch(hidden, has_gpu=True)
    assert record.status == "FAIL" and "CUDA driver initialization failed" in record.value
    assert versions.check_torch(hidden, has_gpu=False).status == "OK"


@pytest.mark.parametrize(
    "driver, expected", [((13, 2), "OK"), ((13, 0), "OK"), ((12, 8), "FAIL"), ((12, 9), "FAIL"), (None, "WARN")]
)
def test_the_driver_against_torch(driver, expected):
    """Within a major version a newer toolkit runs on an older driver (CUDA's minor version compatibility)."""
    assert versions.check_cuda(replace(CUDA, driver_cuda=driver), True)[0].status == expected
    assert versions.check_cuda(replace(CUDA, cuda="13.1", driver_cuda=(13, 0)), True)[0].status == "OK"


def test_megatron_core():
    assert versions.check_megatron(with_versions(CUDA, megatron_core="0.20.0")).status == "FAIL"
    assert versions.check_megatron(with_versions(CUDA, megatron_core=None)).value == "not installed"
    old = replace(with_versions(CPU, megatron_core="0.19.2"), needs_python={"megatron-core": ">=3.12"})
    assert said(versions.check_megatron(old)) == ("FAIL", "0.19.2 asks for Python >=3.12, and this is 3.11.7")


@pytest.mark.parametrize(
    "changes, error, layers, expected, part",
    [
        ({}, None, "auto", "OK", "imported beside torch"),
        ({"transformer_engine": None}, None, "auto", "WARN", "not installed"),
        ({"transformer_engine": None}, None, "transformer_engine", "FAIL", "not installed"),
        ({}, "ImportError: undefined symbol", "local", "OK", "not used"),
        ({}, "ImportError: undefined symbol", "auto", "FAIL", "undefined symbol"),
        ({"transformer_engine_torch": None}, "ImportError: no part", "auto", "FAIL", "without its part for torch"),
        ({"transformer_engine_torch": "2.10.0"}, "AssertionError", "auto", "FAIL", "another version (2.10.0)"),
        # An image has it in one piece: what counts is that it can be imported.
        ({"transformer_engine_torch": None, "transformer_engine_cu13": None}, None, "auto", "OK", "imported"),
        ({"transformer_engine_cu13": None, "transformer_engine_cu12": "2.11.0"}, None, "auto", "WARN", "CUDA 12"),
        ({"megatron_core": "0.16.1", "transformer_engine": "2.12.0"}, None, "auto", "WARN", "0.16.1"),
        ({"transformer_engine": "2.8.0"}, None, "auto", "WARN", ">=2.9"),
    ],
)
def test_transformer_engine(changes, error, layers, expected, part):
    record = versions.check_engine(replace(with_versions(CUDA, **changes), engine_error=error), Needs(layers=layers))
    assert record.status == expected and part in record.value


def test_transformer_engine_without_a_gpu():
    assert versions.check_engine(CPU, Needs(layers="transformer_engine")).status == "FAIL"
    assert versions.check_engine(CPU, None).status == "OK"


@pytest.mark.parametrize("version, expected", [("3.3.1", "WARN"), (None, "WARN"), ("3.4.0", "OK"), ("3.10.0", "OK")])
def test_triton(version, expected):
    assert versions.check_triton(with_versions(CUDA, triton=version)).status == expected
    assert versions.check_triton(with_versions(CPU, triton=version)).status == "OK"


def test_wandb_where_the_configuration_wants_it():
    records = versions.check_extras(CPU, Needs(wandb=True))
    assert by_name(records, "wandb").status == "FAIL" and "log.wandb_project" in by_name(records, "wandb").remedy
    assert {record.status for record in versions.check_extras(CPU, Needs())} == {"OK"}


def test_requirements_of_packages_on_each_other():
    requires = {"sglang": ('torch==2.9.1; python_version >= "3.10"', 'torch==1.0; extra == "old"', "numpy")}
    server = replace(with_versions(CUDA, sglang="0.5.16"), requires=requires)
    record = versions.check_requirements("requirements", server)
    assert said(record) == ("WARN", "sglang 0.5.16 asks for torch==2.9.1, 2.11.0 is installed")
    fitting = replace(server, requires={"sglang": ("torch==2.11.0", 'torch==2.9.1; python_version < "3.12"')})
    assert versions.check_requirements("requirements", fitting).status == "OK"


def test_what_this_package_asks_for():
    requires = {versions.DISTRIBUTION: ("torch>=2.6", "Pebble>=5.0", "triton>=3.7", 'wandb>=1; extra == "wandb"')}
    trainer = replace(with_versions(CUDA, **{versions.DISTRIBUTION: "0.1"}), requires=requires)
    record = versions.check_installation(trainer)
    assert said(record) == ("FAIL", "Pebble is not installed; triton 3.6.0 is not >=3.7")
    good = replace(with_versions(trainer, pebble="5.2.3"), requires={versions.DISTRIBUTION: requires_of("Pebble>=5")})
    assert versions.check_installation(good).status == "OK"


def requires_of(*texts):
    return tuple(texts)


# --- servers -----------------------------------------------------------------------------------------

SERVER = with_versions(CUDA, sglang="0.5.16", sglang_router="0.3.2")


def test_servers_of_another_interpreter():
    assert {record.status for record in check_server(CUDA, SERVER, TENSOR)} == {"OK"}
    missing = check_server(CUDA, CUDA, TENSOR)
    assert said(by_name(missing, "SGLang")) == ("FAIL", "not installed in /envs/sglang/bin/python")
    routed = check_server(CUDA, with_versions(SERVER, sglang_router=None), replace(TENSOR, own_servers=2))
    assert by_name(routed, "SGLang's router").status == "FAIL"


@pytest.mark.parametrize(
    "torch, nccl, transport, failing",
    [
        ("2.11.0+cu128", "2.28.9", "tensor", []),  # another build of the release shares memory
        ("2.9.1+cu130", "2.28.9", "tensor", ["torch of both sides"]),
        ("2.9.1+cu130", "2.28.9", "distributed", []),
        ("2.9.1+cu130", "2.27.5", "distributed", ["NCCL of both sides"]),
        ("2.9.1+cu130", "2.27.5", "disk", []),
    ],
)
def test_torch_and_nccl_of_both_sides(torch, nccl, transport, failing):
    server = replace(SERVER, torch=torch, nccl=nccl)
    records = check_server(CUDA, server, replace(TENSOR, transport=transport))
    assert [record.name for record in records if record.status == "FAIL"] == failing


# --- GPUs --------------------------------------------------------------------------------------------

DRIVER = DriverFacts(True, "580.95", (Card(0, H100.name, 80 * GIB, GIB, False, 0),))


def test_no_gpu():
    assert gpus.check_gpus(DriverFacts(False), CPU, None)[0].value == "none: trains on the CPU"
    assert gpus.check_gpus(DriverFacts(True), CPU, None)[0].status == "FAIL"
    record = gpus.check_gpus(DriverFacts(False), CPU, Needs(devices=(4, 5)))[0]
    assert record.status == "FAIL" and "rollout.server.devices=[4, 5]" in record.value


def test_fewer_gpus_than_the_configuration_takes():
    eight = [H100] * 8
    assert gpus.check_count(eight, Needs(ranks=8, local_ranks=8, colocated=True, own_servers=8)).status == "OK"
    beside = Needs(ranks=8, local_ranks=8, own_servers=2, server_tensor=2)
    record = gpus.check_count(eight, beside)
    assert record.status == "FAIL" and "takes 12 on this node: 8 ranks and 4 of servers" in record.value
    assert "rollout.colocated=true" in record.remedy
    assert gpus.check_count([H100], Needs(devices=(1,))).status == "FAIL"
    assert gpus.check_count([H100, replace(H100, name="NVIDIA A100")], None).status == "WARN"


@pytest.mark.parametrize(
    "architectures, capability, expected",
    [
        (("sm_80", "sm_90"), (8, 6), "OK"),  # a binary runs on later minor versions of its major one
        (("sm_80", "sm_90"), (10, 0), "FAIL"),
        (("sm_80", "compute_90"), (10, 0), "OK"),  # PTX is compiled for newer GPUs
        (("sm_90a",), (9, 0), "OK"),
        (("sm_90",), (8, 9), "FAIL"),
        (("sm_89",), (8, 6), "FAIL"),
        (("sm_100", "sm_120"), (12, 0), "OK"),
        ((), (9, 0), "WARN"),
    ],
)
def test_kernels_for_the_gpu(architectures, capability, expected):
    trainer = replace(CUDA, architectures=architectures, gpus=(replace(H100, capability=capability),))
    assert gpus.check_architectures(trainer).status == expected


def test_gpu_memory_and_who_holds_it():
    holders = replace(DRIVER, holders=(Holder(4711, "python", 40 * GIB), Holder(4712, "sglang", None)))
    busy = replace(H100, free=39 * GIB)
    memory, processes = gpus.check_memory([busy, H100], holders, None)
    assert memory.status == "WARN" and memory.value.startswith("at least 39.0 GiB of 80.0 GiB")
    assert processes.value == "4711 python (40.0 GiB); 4712 sglang"
    # bf16: 2 + 4 + 12 bytes a parameter; 4e9 parameters are 67.1 GiB.
    needs = Needs(parameters=4_000_000_000)
    assert gpus.check_memory([H100], DRIVER, needs)[0].status == "OK"
    assert "67.1 GiB" in gpus.check_memory([H100], DRIVER, needs)[0].value
    assert gpus.check_memory([busy], DRIVER, needs)[0].status == "FAIL"
    assert gpus.check_memory([H100], DRIVER, replace(needs, parameters=8_000_000_000))[0].status == "FAIL"
    cut = replace(needs, parameters=8_000_000_000, replicas=8, distributed_optimizer=True)
    assert gpus.check_memory([H100], DRIVER, cut)[0].status == "OK"


def test_peer_access():
    pair = [replace(H100, peers=(1,)), replace(H100, peers=(0,))]
    record = gpus.check_peers(pair, replace(DRIVER, links=("NV18",)), None)
    assert said(record) == ("OK", "between all GPUs (links: NV18)")
    record = gpus.check_peers([H100, H100], DRIVER, Needs(tensor=2))
    assert record.status == "WARN" and "GPUs 0 and 1" in record.value and "parallel.tensor=2" in record.value


def test_mig_and_memory_errors():
    bad = replace(DRIVER, cards=(Card(0, "A", 1, 1, True, 3), Card(1, "A", 1, 1, False, None)))
    assert [record.status for record in gpus.check_cards(bad)] == ["WARN", "FAIL"]
    assert [record.name for record in gpus.check_cards(DRIVER)] == ["ECC"]


def test_answers_of_nvidia_smi():
    driver, cards = gpus.parse_cards(
        "0, NVIDIA H100 80GB HBM3, 81559, 1024, Disabled, 0, 580.95.05\n"
        "1, NVIDIA RTX A4000, 16376, 2, [N/A], [N/A], 580.95.05\n"
    )
    assert driver == "580.95.05"
    assert cards[0] == Card(0, "NVIDIA H100 80GB HBM3", 81559 << 20, GIB, False, 0)
    assert cards[1].ecc_errors is None and not cards[1].mig
    assert gpus.parse_holders("123, /usr/bin/python, 512\n9, [Not Found], [N/A]\n\n") == (
        Holder(123, "/usr/bin/python", 512 << 20),
        Holder(9, "[Not Found]", None),
    )
    matrix = (
        "\tGPU0\tGPU1\tNIC0\tCPU Affinity\nGPU0\t X \tNV18\tPXB\t0-31\nGPU1\tNV18\t X \tSYS\t0-31\nNIC0\tPXB\tSYS\tX\n"
    )
    assert gpus.parse_links(matrix) == ("NV18",)
