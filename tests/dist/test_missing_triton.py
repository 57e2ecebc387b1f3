"""A GPU without a Triton that its kernels can use computes the LM head in plain torch; a run says so, once."""

import importlib.metadata
import importlib.util

import pytest

from megatron_policysplit.distributed.device import missing_triton, use_triton
from megatron_policysplit.distributed import device
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


def start(rank, file, directory, reason):
    """Every rank starts a run on a machine of which `missing_triton` gives `reason`."""
    from megatron_policysplit.actor import parallel
    from megatron_policysplit.config.load import load_config
    from megatron_policysplit.distributed.rank_watch import RankWatch
    from megatron_policysplit.distributed.stop_signal import StopSignal
    from megatron_policysplit.training import build

    if reason is not None:
        build.missing_triton = lambda: reason
    overrides = ["parallel.tensor=1", "parallel.pipeline=2", f"run.dir={directory}", "log.console=false"]
    run = build.build_run(load_config(str(file), overrides), StopSignal(), RankWatch(None))
    run.close()
    parallel.shutdown()


def test_a_run_says_it_once(tmp_path):
    file = make_workspace(tmp_path)
    for name, reason in (("complete", None), ("missing", REASON)):
        run_distributed(start, 2, file, tmp_path / name, reason)
        log = tmp_path / name / "messages.log"
        said = [line.split(" ", 2)[2] for line in log.read_text().splitlines()] if log.exists() else []
        assert said == ([] if reason is None else [reason])
