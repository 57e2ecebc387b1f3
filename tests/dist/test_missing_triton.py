"""What a GPU lacks for a fast LM head (Triton's kernels, products of bf16 added to fp32); a run says so, once."""

import importlib.metadata
import importlib.util

import pytest
import torch

from megatron_policysplit.distributed.device import missing_triton, mixed_products, slow_head, use_triton
from megatron_policysplit.distributed import device
from megatron_policysplit.errors import MachineError
from tests.support.dist import run_distributed
from tests.support.e2e import make_workspace

REASON = "the LM head is computed in plain torch: for the test"


def machine(monkeypatch, gpu, triton):
    """A machine with a GPU or none, and with this release of Triton or none."""
    monkeypatch.setattr(device, "on_cpu", lambda: not gpu)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: triton and object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: triton)


@pytest.mark.parametrize("triton", ["3.4.0", "3.10.1", "4.0.0+git1a2b3c"])
def test_kernels_are_used_where_they_can_be(monkeypatch, triton):
    machine(monkeypatch, True, triton)
    assert use_triton() and missing_triton() is None


@pytest.mark.parametrize(("triton", "found"), [(None, "triton is not installed"), ("3.3.1", "triton 3.3.1 is too old")])
def test_what_is_missing_is_named_with_its_remedy(monkeypatch, triton, found):
    machine(monkeypatch, True, triton)
    assert not use_triton()
    assert found in missing_triton() and "pip install 'triton>=3.4'" in missing_triton()


@pytest.mark.parametrize("triton", [None, "3.3.1", "3.4.0"])
def test_a_machine_without_a_gpu_misses_nothing(monkeypatch, triton):
    machine(monkeypatch, False, triton)
    assert not use_triton() and missing_triton() is None


@pytest.fixture
def gpu_of_torch(monkeypatch):
    """A function that makes this a machine with a GPU whose torch.addmm with `out_dtype` does as it is told."""

    def make(mixed_addmm):
        monkeypatch.setattr(device, "on_cpu", lambda: False)
        monkeypatch.setattr(device, "training_device", lambda: torch.device("cpu"))
        monkeypatch.setattr(device, "missing_triton", lambda: None)
        monkeypatch.setattr(torch, "addmm", mixed_addmm)
        mixed_products.cache_clear()

    yield make
    mixed_products.cache_clear()


def of_torch_2_10(total, a, b, *, out_dtype, out):
    assert out_dtype == total.dtype == out.dtype == torch.float32 and a.dtype == b.dtype == torch.bfloat16


def of_torch_2_8(total, a, b, *, out_dtype, out):
    raise RuntimeError("self and mat2 must have the same dtype, but got Float and BFloat16")


def of_torch_2_7(total, a, b, *, out):
    raise AssertionError("has no argument out_dtype")


def test_mixed_products_are_found_by_trying(gpu_of_torch):
    gpu_of_torch(of_torch_2_10)
    assert mixed_products() and slow_head() == []
    for older in (of_torch_2_8, of_torch_2_7):
        gpu_of_torch(older)
        assert not mixed_products()
        (reason,) = slow_head()
        assert f"torch {torch.__version__} cannot add a bf16 product" in reason and "pip install 'torch>=2.10'" in reason


def test_a_machine_without_a_gpu_has_no_mixed_products_and_misses_nothing():
    mixed_products.cache_clear()
    assert not mixed_products() and slow_head() == []


def test_tiles_are_larger_on_a_gpu(monkeypatch):
    assert device.tile_elements() == 2**18
    monkeypatch.setattr(device, "on_cpu", lambda: False)
    assert device.tile_elements() == 2**25


def test_a_gpu_does_not_round_parts_of_sums_to_bf16(monkeypatch):
    bound = []
    monkeypatch.setattr(device, "on_cpu", lambda: False)
    monkeypatch.setattr(device, "gpu_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", bound.append)
    before = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    try:
        device.set_device(1)
        assert bound == [1] and not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    finally:
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = before


def test_a_rank_without_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(device, "on_cpu", lambda: False)
    monkeypatch.setattr(device, "gpu_count", lambda: 1)
    with pytest.raises(MachineError, match="^local rank 1 needs a GPU of its own, but this process sees only 1; give each"):
        device.set_device(1)


def start(rank, file, directory, reason):
    """Every rank starts a run on a machine of which `slow_head` gives `reason`."""
    from megatron_policysplit.actor import parallel
    from megatron_policysplit.config.load import load_config
    from megatron_policysplit.distributed.rank_watch import RankWatch
    from megatron_policysplit.distributed.stop_signal import StopSignal
    from megatron_policysplit.training import build

    build.slow_head = lambda: [] if reason is None else [reason]
    overrides = ["parallel.tensor=1", "parallel.pipeline=2", f"run.dir={directory}", "log.console=false"]
    run = build.build_run(load_config(str(file), overrides), StopSignal(), RankWatch(None))
    run.close()
    parallel.shutdown()


def test_a_run_says_it_once(tmp_path):
    file = make_workspace(tmp_path)
    for name, reason in (("complete", None), ("missing", REASON)):
        run_distributed(start, 2, file, tmp_path / name, reason)
        log = tmp_path / name / "messages.log"
        said = [line.split(" ", 2)[2] for line in log.read_text().splitlines()]
        assert said.pop(0).startswith("layers: Megatron-Core's own (")
        assert said == ([] if reason is None else [reason])
