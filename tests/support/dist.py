"""Run a function in real processes that form one torch.distributed world."""

import multiprocessing
import os
import queue
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any


def run_distributed(function: Callable, world_size: int, *args: Any, timeout_seconds: float = 120.0) -> list[Any]:
    """Call `function(rank, *args)` in `world_size` spawned processes; its return values in rank order.

    RANK, WORLD_SIZE and MASTER_* are set; `function` initializes torch.distributed and must be importable.
    If a process raises, ends without an answer or is late, all are killed and RuntimeError carries its
    traceback. No process is left. If another program takes the port first, all start again with another.
    """
    for _ in range(2):
        try:
            return _run(function, world_size, args, timeout_seconds)
        except RuntimeError as error:
            if "EADDRINUSE" not in str(error):
                raise
    return _run(function, world_size, args, timeout_seconds)


def _run(function: Callable, world_size: int, args: tuple, timeout_seconds: float) -> list[Any]:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    port = free_port()
    processes = [
        context.Process(target=_child, args=(function, rank, world_size, port, answers, args))
        for rank in range(world_size)
    ]
    try:
        for process in processes:
            process.start()
        results = _collect(processes, answers, time.monotonic() + timeout_seconds)
        for process in processes:
            process.join(timeout=5)
        return results
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            if process.pid is not None:
                process.join()
        answers.close()


def free_port() -> int:
    """A TCP port on the loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _collect(processes: list, answers: Any, deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(processes):
        try:
            rank, error, value = answers.get(timeout=0.2)
        except queue.Empty:
            dead = [rank for rank, process in enumerate(processes) if process.exitcode and rank not in results]
            if dead:
                code = processes[dead[0]].exitcode
                raise RuntimeError(f"rank {dead[0]} ended with exit code {code} and no answer") from None
            if time.monotonic() > deadline:
                late = sorted(set(range(len(processes))) - set(results))
                raise RuntimeError(f"ranks {late} gave no answer in time") from None
            continue
        if error is not None:
            raise RuntimeError(f"rank {rank} failed:\n{error}")
        results[rank] = value
    return [results[rank] for rank in range(len(processes))]


def _child(function: Callable, rank: int, world_size: int, port: int, answers: Any, args: tuple) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    import torch

    torch.set_num_threads(1)
    try:
        answers.put((rank, None, function(rank, *args)))
    except BaseException:
        answers.put((rank, traceback.format_exc(), None))
