"""Worker processes that grade responses, each within a time limit."""

from __future__ import annotations

import math
import multiprocessing
import numbers
import os
import signal
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, TimeoutError, wait
from dataclasses import dataclass
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

from megatron_policysplit.data.questions import Question
from megatron_policysplit.errors import TrainingError
from megatron_policysplit.rewards.functions import load_reward

# Workers have this long to start, and to be replaced, before the pool is taken for broken.
_STALL_SECONDS = 120.0
# A worker that hangs ends itself this long after its time limit, should nobody be left to end it.
_ORPHAN_SECONDS = 10.0
_MAX_REBUILDS = 3


@dataclass(frozen=True)
class Graded:
    """The reward of one response."""

    reward: float
    error: str | None = None  # why the reward is 0, if grading failed


def all_failed(errors: Sequence[str | None]) -> str | None:
    """`all N gradings (first: ERROR)` where each of these gradings failed, else None."""
    if not errors or not all(error is not None for error in errors):
        return None
    return f"all {len(errors)} gradings (the first with {errors[0]})"


class _WorkerContext(SpawnContext):
    """Spawns processes, and knows those that are in use."""

    def __init__(self) -> None:
        super().__init__()
        self._processes: weakref.WeakSet[SpawnProcess] = weakref.WeakSet()

    def Process(self, *args: Any, **kwargs: Any) -> SpawnProcess:  # noqa: N802, SpawnContext's name
        process = SpawnProcess(*args, **kwargs)
        self._processes.add(process)
        return process

    def terminate(self) -> None:
        """Send SIGTERM to all processes."""
        for process in list(self._processes):
            if process.ident is not None:  # it may be about to start
                process.terminate()


class RewardPool:
    """Grades responses in worker processes, whatever a reward function does to its process.

    Use it as a context manager, or call `close`. Workers are spawned and import the reward function
    anew: a script that uses a pool needs the guard `if __name__ == "__main__":`, and each worker
    imports what its module imports at the top.

    function: as the key `reward.function`. It is loaded here once: a wrong one raises ConfigError
    at once.
    workers: the number of processes.
    timeout_seconds: the time limit of one response.
    """

    def __init__(self, function: str, workers: int, timeout_seconds: float):
        load_reward(function)
        self._function = function
        self._workers = workers
        self._timeout = timeout_seconds
        self._lock = threading.Lock()  # held while grading
        self._interrupted: Future = Future()  # done as soon as `close` is called
        self._context = _WorkerContext()
        self._pool = None

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def grade(self, items: Sequence[tuple[str, Question]]) -> list[Graded]:
        """Grade (response, question) pairs; the result has their order.

        A reward that raises, exceeds the time limit, kills its process or returns anything but a
        finite number is graded 0 with the reason in `error`. Raises TrainingError if workers cannot
        be kept alive, or on `close`.
        """
        with self._lock:
            results: list[Graded | None] = [None] * len(items)
            deaths: set[int] = set()  # responses whose worker has died once
            rebuilds = 0  # in a row, without a result between them
            while todo := [index for index, result in enumerate(results) if result is None]:
                if self._grade_some(items, todo, results, deaths):
                    continue
                # A worker killed from outside (out of memory, a signal to all) can break the whole
                # pool.
                self._stop()
                rebuilds = rebuilds + 1 if len(todo) == results.count(None) else 0
                if rebuilds == _MAX_REBUILDS:
                    raise TrainingError(
                        f"the worker processes of reward.function={self._function} end before they "
                        "grade anything; see their output above, and check that the function's "
                        "module imports in a fresh process"
                    )
            return results

    def close(self) -> None:
        """End all workers at once.

        A `grade` that runs in another thread raises; a later one starts new workers.
        """
        self._interrupted.set_result(None)
        with self._lock:  # once `grade` has noticed and raised
            self._stop()
            self._interrupted = Future()

    def _grade_some(
        self, items, todo: list[int], results: list[Graded | None], deaths: set[int]
    ) -> bool:
        """Fill in the results of `todo`; False if the pool broke on the way.

        A response whose process died goes into `deaths` and is left open the first time: the
        process may have been killed from outside, and a reward must not suffer from that.
        """
        from pebble import ProcessExpired

        try:
            pending = {self._schedule(*items[index]): index for index in todo}
        except RuntimeError:  # the pool broke while it was idle
            return False
        broken = False
        while pending and not broken:
            waited_for = [*pending, self._interrupted]
            done, _ = wait(
                waited_for, timeout=self._timeout + _STALL_SECONDS, return_when=FIRST_COMPLETED
            )
            if self._interrupted in done:
                raise TrainingError("the reward pool was closed while it graded")
            broken = not done  # no worker has answered for longer than any may take
            for future in done:
                index = pending.pop(future)
                error = future.exception()
                if error is None:
                    results[index] = future.result()
                elif isinstance(error, TimeoutError):
                    results[index] = Graded(
                        0.0, f"no result within the time limit of {self._timeout:g} s"
                    )
                elif isinstance(error, ProcessExpired):
                    if index in deaths:
                        results[index] = Graded(
                            0.0, f"the grading process died with exit code {error.exitcode}, twice"
                        )
                    deaths.add(index)
                elif isinstance(error, RuntimeError):
                    broken = True
                else:
                    results[index] = Graded(
                        0.0, f"the question cannot be sent to a grading process: {error}"
                    )
        return not broken

    def _schedule(self, response: str, question: Question) -> Future:
        """Hand one response to the workers, which are started if there are none."""
        if self._pool is None:
            from pebble import ProcessPool

            self._pool = ProcessPool(
                max_workers=self._workers,
                initializer=_start_worker,
                initargs=(self._function, self._timeout),
                context=self._context,
            )
        return self._pool.schedule(_grade, args=(response, question), timeout=self._timeout)

    def _stop(self) -> None:
        if self._pool is not None:
            self._pool.stop()
            # All at once: `join` removes the pool's locks and then ends one worker after the other.
            # A worker that is still starting would not find the locks and print a traceback.
            self._context.terminate()
            self._pool.join()
            self._pool = None


_reward: Any = None
_guard_seconds = 0.0


def _start_worker(function: str, timeout_seconds: float) -> None:
    """Prepare a worker process, in which `_grade` will be called."""
    global _reward, _guard_seconds
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _reward = load_reward(function)
    _guard_seconds = timeout_seconds + _ORPHAN_SECONDS


def _end_with_parent() -> None:
    """End this process when its parent ends, however that ends."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _grade(response: str, question: Question) -> Graded:
    """Grade one response in a worker process; errors of the reward function become a Graded."""
    # The kernel ends a process that hangs in C code, where no Python thread or handler runs.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, _guard_seconds)
    try:
        value = _reward(response, question)
        value = value.item() if hasattr(value, "item") else value  # a scalar of numpy or torch
        if not isinstance(value, numbers.Real):
            return Graded(0.0, f"the reward is a {type(value).__name__}, not a number")
        if not math.isfinite(value):
            return Graded(0.0, f"the reward is {float(value)}, not a finite number")
        return Graded(float(value))
    except BaseException as error:  # SystemExit too: whatever a reward raises is its own failure
        return Graded(0.0, f"{type(error).__name__}: {error}"[:2000])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
