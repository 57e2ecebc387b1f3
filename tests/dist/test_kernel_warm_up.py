"""The LM head's kernels before the first step: whose turn it is, where their choice is kept, what is run."""

import os
import sys
import time

import pytest
import torch

from megatron_policysplit.training import kernels
from tests.support.dist import run_distributed
from tests.support.e2e import make_workspace
from tests.support.interpreted_triton import interpreted_kernels
from tests.support.vocabulary import head_of

NODES = ("a", "a", "b", "b", "b")  # of five ranks; rank 0 is of a stage without a head
TURNS = [None, 0, 1, 2, 2]


@pytest.mark.parametrize(
    ("nodes", "turns"),
    [
        (["a"], [0]),
        (["a", "a", "a"], [0, 2, 2]),
        (["a", "b", "a", "b"], [0, 1, 2, 2]),
        ([None, "a", "b", "b", "b"], TURNS),
        ([None, None], [None, None]),
    ],
)
def test_turns(nodes, turns):
    assert kernels._turns(nodes) == turns


# --- in real process groups ----------------------------------------------------------------------------


def warm_up_together(rank, events, broken_rank):
    from megatron_policysplit.actor.parallel import initialize
    from megatron_policysplit.config import ParallelConfig

    layout = initialize(ParallelConfig(data=len(NODES)), seed=1, timeout_seconds=60)
    kernels.socket.gethostname = lambda: NODES[rank]

    def write(event):
        with open(events, "a") as file:  # appended as one write
            file.write(f"{event} {rank}\n")

    def warm_up(head, nucleus):
        assert (head, nucleus) == ("a head", True)
        write("begins")
        if rank == broken_rank:
            raise ValueError("no kernel")
        time.sleep(0.3 if TURNS[rank] < 2 else 0.0)  # time for others to come too early
        write("ends")

    said = []
    try:
        kernels.warm_up_kernels(layout, "a head" if rank else None, True, said.append, warm_up)
    except Exception as error:
        return str(error)
    return said


def test_ranks_take_turns(tmp_path):
    said = run_distributed(warm_up_together, len(NODES), tmp_path / "events", None)
    lines = (tmp_path / "events").read_text().splitlines()
    assert lines[:4] == ["begins 1", "ends 1", "begins 2", "ends 2"]
    assert sorted(lines[4:]) == ["begins 3", "begins 4", "ends 3", "ends 4"]
    for texts in said:
        assert len(texts) == 1 and texts[0].startswith("the LM head's Triton kernels were compiled and tuned")


def test_a_failure_reaches_every_rank(tmp_path):
    errors = run_distributed(warm_up_together, len(NODES), tmp_path / "events", 2)
    assert errors[2] == "no kernel"
    assert all("rank 2 failed" in error and "no kernel" in error for rank, error in enumerate(errors) if rank != 2)
    assert (tmp_path / "events").read_text().splitlines() == ["begins 1", "ends 1", "begins 2"]


def start(rank, file, directory):
    """A run on a machine whose head would have kernels."""
    from functools import partial

    from megatron_policysplit.actor import parallel
    from megatron_policysplit.config.load import load_config
    from megatron_policysplit.distributed.rank_watch import RankWatch
    from megatron_policysplit.distributed.stop_signal import StopSignal
    from megatron_policysplit.training import build

    warmed = []

    def warm_up(head, nucleus):
        import triton

        warmed.append((len(head.weight), nucleus, triton.knobs.cache.dir))

    build.use_triton = lambda: True
    build.warm_up_kernels = partial(build.warm_up_kernels, warm_up=warm_up)
    overrides = ["parallel.tensor=1", "parallel.pipeline=2", f"run.dir={directory}", "log.console=false"]
    config = load_config(str(file), [*overrides, "algorithm.name=siren"])
    run = build.build_run(config, StopSignal(), RankWatch(None))
    columns = None if run.actor.head is None else len(run.actor.head.weight)
    run.close()
    parallel.shutdown()
    return warmed, columns


def test_a_run_warms_up_before_its_first_step(tmp_path):
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_CACHE_DIR"}
    first, last = run_distributed(start, 2, make_workspace(tmp_path), tmp_path / "run", environ=environ)
    assert first == ([], None)
    warmed, columns = last
    assert warmed == [(columns, True, str(tmp_path / "run" / "triton"))]
    log = (tmp_path / "run" / "messages.log").read_text()
    assert log.count("the LM head's Triton kernels were compiled and tuned, or loaded, in 0 s") == 1


# --- in one process ------------------------------------------------------------------------------------


def cache_directories(rank, run_dir):
    """Where Triton writes, before and after the user named a directory; and what a child process would inherit."""
    from triton.runtime.cache import get_cache_manager

    kernels.keep_triton_cache(run_dir)
    path = get_cache_manager("0" * 64).put("text", "choice.json", binary=False)
    inherited = os.environ.get("TRITON_CACHE_DIR")
    return path, inherited


@pytest.mark.parametrize("named", [None, "elsewhere"])
def test_the_choice_is_kept_in_the_run_directory(tmp_path, named):
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_CACHE_DIR"}
    if named is not None:
        environ["TRITON_CACHE_DIR"] = str(tmp_path / named)
    ((path, inherited),) = run_distributed(cache_directories, 1, tmp_path, environ=environ)
    assert path.startswith(str(tmp_path / (named or "triton")) + os.sep) and os.path.exists(path)
    assert inherited == environ.get("TRITON_CACHE_DIR")


@pytest.mark.parametrize("nucleus", [False, True])
def test_every_kernel_is_run_at_both_sizes(monkeypatch, nucleus):
    ran = []
    with interpreted_kernels() as head_module:
        from megatron_policysplit.vocab_parallel.triton_warm_up import warm_up

        launch = head_module.launch

        def recording(kernel, grid, hidden, *rest, **options):
            ran.append((kernel.plain.__name__, len(hidden)))
            launch(kernel, grid, hidden, *rest, **options)

        monkeypatch.setattr(head_module, "launch", recording)
        monkeypatch.setattr(sys.modules[warm_up.__module__], "FEW_TOKENS", 5)
        random = torch.get_rng_state()
        warm_up(head_of(torch.ones(40, 8).bfloat16(), 20, triton=True), nucleus)
    assert torch.equal(torch.get_rng_state(), random)
    names = ["reduce_kernel", "reduce_pair_kernel", "gradient_kernel"]
    names += ["logits_kernel", "nucleus_kernel"] if nucleus else []
    assert set(ran) == {(name, tokens) for name in names for tokens in (5, 20)}
