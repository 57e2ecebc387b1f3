"""Run a function in real processes that form one torch.distributed world.

The processes are forks of a server that has imported torch, Megatron-Core and the trainer
(`preload.py`), which takes seconds of each new interpreter. The server is started by the first test
that needs one and ends with pytest. All forks hash strings alike; ranks that `policysplit train`
starts do not.
"""

import functools
import multiprocessing
import os
import pickle
import queue
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self

ROOT = Path(__file__).resolve().parents[2]
PRELOAD = "tests.support.preload"


def run_distributed(
    function: Callable,
    world_size: int,
    *args: Any,
    timeout_seconds: float = 120.0,
    start: Literal["server", "spawn", "fork"] = "server",
    environ: Mapping[str, str] = os.environ,
    output: BinaryIO | None = None,
) -> list[Any]:
    """Call `function(rank, *args)` in `world_size` new processes; its return values in rank order.

    RANK, WORLD_SIZE and MASTER_* are set; `function` initializes torch.distributed and must be
    importable. If a process raises, ends without an answer or is late, all are killed and
    RuntimeError carries its traceback. No process is left. If another program takes the port first,
    all start again with another.

    start: forks of the server; new interpreters, which have imported nothing; or forks of this
    process, which must have started no thread that works. environ: the variables beside those, this
    process's if not given. output: the file that stdout and stderr go to, this process's if None.
    """
    context = forking_context() if start == "server" else multiprocessing.get_context(start)
    call = pickle.dumps((function, args))
    run = functools.partial(_run, context, call, world_size, timeout_seconds)
    for _ in range(2):
        try:
            return run(environ, output)
        except RuntimeError as error:
            if "EADDRINUSE" not in str(error):
                raise
    return run(environ, output)


@functools.cache
def forking_context():
    """The multiprocessing context that forks from the server, which runs by then.

    On a machine with a GPU, that of fresh interpreters: the driver of a GPU that was asked
    anything, as Megatron-Core does when it is imported, does not survive a fork.
    """
    import torch

    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOAD])
    # The server does not get our sys.path, and reads its environment only once.
    with _environment(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"):
        forkserver.ensure_running()
    return context


@contextmanager
def _environment(**changes: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class Ranks:
    """`function(rank, *args)` in processes that may be killed, hang or leave by os._exit; nobody waits for answers.

    RANK, WORLD_SIZE and MASTER_* are set. What they print goes to the file `output`. On leaving the block, those that
    still run are killed.
    """

    def __init__(self, function: Callable, world_size: int, *args: Any, output: Path):
        self.output, context, port = output, forking_context(), free_port()
        call = pickle.dumps((function, args))
        with output.open("wb") as file:
            self.processes = []
            for rank in range(world_size):
                environ = dict(os.environ) | _variables(rank, world_size, port)
                surroundings = Surroundings.of(environ, file.fileno(), file.fileno())
                self.processes.append(context.Process(target=_alone, args=(rank, surroundings, call)))
            for process in self.processes:
                process.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def codes(self, seconds: float) -> list[int | None]:
        """Exit codes, -N of a rank that signal N ended; None of one that still runs after so many seconds."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def text(self) -> str:
        return self.output.read_text()


def _alone(rank: int, surroundings: "Surroundings", call: bytes) -> None:
    surroundings.take_over()
    function, args = pickle.loads(call)
    function(rank, *args)


@dataclass
class Surroundings:
    """The environment variables, stdout and stderr that a new process is to have.

    A fork has those of the server, as they were when that was started.
    """

    environ: dict[str, str]
    streams: tuple[Connection, Connection]  # a kind of open file that can be handed over

    @classmethod
    def of(cls, environ: Mapping[str, str] = os.environ, stdout: int = 1, stderr: int = 2) -> Self:
        """By descriptors of open files; those of this process if not given."""
        out, err = (Connection(os.dup(file), readable=False) for file in (stdout, stderr))
        return cls(dict(environ), (out, err))

    def take_over(self) -> None:
        """In the new process, before anything else.

        From then on it also ends with the process that made it.
        """
        os.environ.clear()
        os.environ.update(self.environ)
        for descriptor, stream in enumerate(self.streams, start=1):
            os.dup2(stream.fileno(), descriptor)
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Wait for the end of pytest, which may be killed: a rank may wait for others for ever."""
    wait([multiprocessing.parent_process().sentinel])
    os.kill(os.getpid(), signal.SIGKILL)


def _run(
    context: Any,
    call: bytes,
    world_size: int,
    timeout_seconds: float,
    environ: Mapping[str, str],
    output: BinaryIO | None,
) -> list[Any]:
    answers, port = context.Queue(), free_port()
    files = (1, 2) if output is None else (output.fileno(), output.fileno())
    processes = []
    for rank in range(world_size):
        variables = dict(environ) | _variables(rank, world_size, port)
        surroundings = Surroundings.of(variables, *files)
        processes.append(context.Process(target=_child, args=(rank, surroundings, answers, call)))
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


def _variables(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


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
        results[rank] = pickle.loads(value)
    return [results[rank] for rank in range(len(processes))]


def _child(rank: int, surroundings: Surroundings, answers: Any, call: bytes) -> None:
    """call: the function and its arguments, unpickled here so that to fail at that is an answer, too.

    The result is pickled here because a queue would leave tensors where they are, in the memory of
    a process that ends.
    """
    surroundings.take_over()
    import torch

    torch.set_num_threads(1)
    try:
        function, args = pickle.loads(call)
        answers.put((rank, None, pickle.dumps(function(rank, *args))))
    except BaseException:
        answers.put((rank, traceback.format_exc(), None))
