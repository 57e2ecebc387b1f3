"""Processes that tests fork from a server are like those that pytest itself would start."""

import multiprocessing
import os
import sys
import time

import psutil
import pytest
import torch

from tests.support.dist import PRELOAD, Surroundings, forking_context, run_distributed

VARIABLE, OTHER = "POLICYSPLIT_TEST_OF_A_RANK", "POLICYSPLIT_TEST_OF_THE_SERVER"


def describe(rank: int) -> dict:
    print(f"rank {rank} to stdout")
    print(f"rank {rank} to stderr", file=sys.stderr)
    return {
        "rank": (rank, os.environ["RANK"], os.environ["WORLD_SIZE"]),
        "variables": (os.environ.get(VARIABLE), os.environ.get(OTHER)),
        "preloaded": PRELOAD in sys.modules,
        "directory": os.getcwd(),
        "threads of the server": len(os.listdir(f"/proc/{os.getppid()}/task")),
    }


@pytest.mark.parametrize("start", ["server", "spawn"])
def test_a_rank_has_the_environment_and_the_output_of_the_test(monkeypatch, capfd, start):
    """Also where both have changed since the server was started."""
    monkeypatch.setenv(OTHER, "1")
    forking_context()
    monkeypatch.delenv(OTHER)
    monkeypatch.setenv(VARIABLE, "set")
    ranks = run_distributed(describe, 2, start=start)
    assert [rank["rank"] for rank in ranks] == [(0, "0", "2"), (1, "1", "2")]
    assert [rank["variables"] for rank in ranks] == [("set", None)] * 2
    assert [rank["directory"] for rank in ranks] == [os.getcwd()] * 2
    printed = capfd.readouterr()
    assert sorted(printed.out.splitlines()) == ["rank 0 to stdout", "rank 1 to stdout"]
    assert {"rank 0 to stderr", "rank 1 to stderr"} <= set(printed.err.splitlines())


def test_output_goes_to_a_file_where_one_is_given(tmp_path, capfd):
    with (tmp_path / "output.txt").open("wb") as file:
        run_distributed(describe, 1, output=file)
    lines = (tmp_path / "output.txt").read_text().splitlines()
    assert {"rank 0 to stdout", "rank 0 to stderr"} <= set(lines)
    assert capfd.readouterr().out == ""


def test_the_server_has_imported_the_trainer_and_started_no_thread():
    """A thread does not survive a fork, and may hold a lock then."""
    if forking_context().get_start_method() != "forkserver":
        pytest.skip("a machine with a GPU forks no ranks")
    (rank,) = run_distributed(describe, 1)
    assert rank["preloaded"] and rank["threads of the server"] == 1


def make_tensor(rank: int) -> torch.Tensor:
    return torch.full((3,), float(rank))


def test_tensors_come_back():
    for _ in range(5):  # a rank may end before its answer is read, or not
        ranks = run_distributed(make_tensor, 2)
        assert [tensor.tolist() for tensor in ranks] == [[0.0] * 3, [1.0] * 3]


def fail(rank: int, how: str) -> None:
    if rank == 1 and how == "raise":
        raise ValueError("of rank 1")
    if rank == 1 and how == "exit":
        os._exit(3)
    time.sleep(60)


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("raise", "rank 1 failed:\n(.|\n)*ValueError: of rank 1"),
        ("exit", "rank 1 ended with exit code 3 and no answer"),
        ("wait", r"ranks \[0, 1\] gave no answer in time"),
    ],
)
def test_a_failing_rank_is_told_and_no_process_is_left(how, error):
    with pytest.raises(RuntimeError, match=error):
        run_distributed(fail, 2, how, timeout_seconds=3.0 if how == "wait" else 60.0)
    assert multiprocessing.active_children() == []


def wait_for_nothing(surroundings: Surroundings, pipe) -> None:
    surroundings.take_over()
    pipe.send(os.getpid())
    time.sleep(60)


def start_one_that_waits(pipe) -> None:
    context = multiprocessing.get_context("spawn")
    context.Process(target=wait_for_nothing, args=(Surroundings.of(), pipe)).start()
    time.sleep(60)


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_rank_ends_when_the_process_that_started_it_is_killed():
    context = multiprocessing.get_context("spawn")
    answer, pipe = context.Pipe()
    parent = context.Process(target=start_one_that_waits, args=(pipe,))
    parent.start()
    assert answer.poll(60)
    orphan = psutil.Process(answer.recv())
    parent.kill()
    parent.join()
    deadline = time.monotonic() + 30
    while is_alive(orphan):
        assert time.monotonic() < deadline, "it goes on"
        time.sleep(0.05)
