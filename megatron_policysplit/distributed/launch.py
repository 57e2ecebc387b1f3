"""Starts the local ranks of a run and ends them together.

torch elastic's launcher is not used: it imports torch (seconds before the first message), gives
ranks 30 seconds after a signal where saving a checkpoint may take longer, and kills the healthy
ranks as soon as one fails, before they can say what they saw. What is needed here fits in this
file, in the standard library.

Where torchrun or srun starts the ranks, `rank_variables.started_environment` says so and nothing is
started here.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from megatron_policysplit.distributed.rank_variables import without_launcher
from megatron_policysplit.errors import BAD_INPUT, DONE, FAILED, STOPPED

_PR_SET_PDEATHSIG = 1
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class Patience:
    """How many seconds the ranks of `launch` have to end."""

    save: float = 1800.0  # to save and exit after a signal
    # To notice that another rank failed, and exit: with `rank_watch.Pace` as it is, a rank in a
    # collective that never ends takes up to 52 s after another was killed.
    peers: float = 53.0
    terminate: float = 5.0  # from SIGTERM to SIGKILL


def launch(
    config_argv: list[str],
    nproc: int,
    command: Sequence[str] = (sys.executable, "-m", "megatron_policysplit.training.worker"),
    patience: Patience = Patience(),  # noqa: B008
    inherited: Sequence[int] = (),
) -> int:
    """Run `command ARGS` as `nproc` ranks of one group on this machine; return the exit code.

    - SIGTERM or SIGINT is forwarded once; the ranks have `patience.save` seconds to save and exit.
    - A rank that fails is named on stderr; the others have `patience.peers` seconds to notice by
      their watch or collectives, then get SIGTERM and `patience.terminate` seconds later SIGKILL.
    - If this process is killed, the kernel kills the ranks.

    The exit code is that of the ranks where all have the same, else FAILED; STOPPED if all saved
    and stopped after a signal. Must be called in the main thread, which takes the signals.

    inherited: open files that the ranks get, too. A lock among them lasts until the last rank has
    ended, also where this process is killed.
    """
    group = _Group(config_argv, nproc, command, patience, inherited)
    previous = {number: signal.signal(number, group.stop) for number in _STOP_SIGNALS}
    try:
        group.start()
        while group.running():
            group.watch()
            time.sleep(0.05)
        return group.verdict()
    finally:
        group.kill()
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Group:
    """The rank processes of one `launch`.

    Every rank leads a session of its own, so that a terminal's Ctrl-C reaches it only through
    `signal_all`: once, and all ranks alike.
    """

    def __init__(
        self,
        argv: Sequence[str],
        nproc: int,
        command: Sequence[str],
        patience: Patience,
        inherited: Sequence[int],
    ):
        self.argv, self.nproc, self.command, self.patience = argv, nproc, command, patience
        self.inherited = inherited
        self.ranks: list[subprocess.Popen] = []
        # Times are of time.monotonic; None until it happens.
        self.stop_signal: int | None = None  # the first that came
        self.forwarded_at: float | None = None  # the signal, to the ranks
        self.failed_at: float | None = None  # the first rank that failed
        self.failed_rank = -1
        self.announced = False  # whether that rank has been named on stderr
        self.terminated_at: float | None = None  # SIGTERM to ranks that are late
        self.stopped_early = False  # the signal came before there was anything to save

    def stop(self, number: int, frame) -> None:
        """Signal handler: remembers the first signal; `watch` forwards it."""
        self.stop_signal = self.stop_signal or number

    def start(self) -> None:
        """Start all ranks, with this machine's cores shared out among their threads."""
        port = free_port()
        threads = str(max(1, len(os.sched_getaffinity(0)) // self.nproc))
        die_with_parent = partial(_die_with, os.getpid(), ctypes.CDLL(None).prctl)
        for rank in range(self.nproc):
            self.ranks.append(
                subprocess.Popen(
                    [*self.command, *self.argv],
                    env={
                        "OMP_NUM_THREADS": threads,
                        **without_launcher(os.environ),
                        **rank_environment(rank, self.nproc, port),
                    },
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                    pass_fds=self.inherited,
                    preexec_fn=die_with_parent,
                )
            )

    def running(self) -> bool:
        """Whether any rank runs. Every rank is looked at, so that none is left unreaped."""
        return not all([ended(process) for process in self.ranks])

    def watch(self) -> None:
        """Do what is due now: forward a signal, name a rank that failed, end late ranks."""
        now = time.monotonic()
        if self.stop_signal is not None and self.forwarded_at is None:
            self.forwarded_at = now
            name = signal.Signals(self.stop_signal).name
            _say(
                f"{name}: waiting up to {self.patience.save:g} s for {self.nproc} ranks to save "
                "and exit"
            )
            self.signal_all(self.stop_signal)
        if self.stop_signal is not None and any(
            p.returncode == -self.stop_signal for p in self.ranks
        ):
            # A rank died of the signal: it had no handler yet, so the ranks had not met and there
            # is nothing to save.
            self.stopped_early = True
            self.signal_all(signal.SIGKILL)
            return
        if self.failed_at is None:
            for rank, process in enumerate(self.ranks):
                if process.returncode not in (None, DONE) and not self.stopped_as_asked(
                    process.returncode
                ):
                    self.failed_at, self.failed_rank = now, rank
                    break
        if self.failed_at is not None and not self.announced:
            # A rank that ended with one of these codes has printed its error, and the others are
            # about to end with the same one. It is named only if they do not follow.
            reported = self.ranks[self.failed_rank].returncode in (FAILED, BAD_INPUT, STOPPED)
            if not reported or now - self.failed_at > 2:
                self.announce()
        self.end_late_ranks(now)

    def stopped_as_asked(self, code: int | None) -> bool:
        """Whether a rank with this exit code saved and stopped, or was stopped while it started."""
        return self.stop_signal is not None and code in (STOPPED, -self.stop_signal)

    def end_late_ranks(self, now: float) -> None:
        """SIGTERM, then SIGKILL, to ranks that still run when the time they had is over."""
        deadlines = []
        if self.forwarded_at is not None:
            deadlines.append(self.forwarded_at + self.patience.save)
        if self.failed_at is not None:
            deadlines.append(self.failed_at + self.patience.peers)
        if self.terminated_at is None and deadlines and now > min(deadlines):
            self.terminated_at = now
            late = ", ".join(
                str(rank) for rank, process in enumerate(self.ranks) if process.returncode is None
            )
            _say(f"ending rank {late}: still running after the time it had")
            self.signal_all(signal.SIGTERM)
        if self.terminated_at is not None and now > self.terminated_at + self.patience.terminate:
            self.signal_all(signal.SIGKILL)

    def signal_all(self, number: int) -> None:
        """Send a signal to every rank that runs."""
        for process in self.ranks:
            process.send_signal(number)  # does nothing where the process has ended

    def announce(self) -> None:
        """Say on stderr which rank failed first, and how."""
        self.announced = True
        process = self.ranks[self.failed_rank]
        code = process.returncode
        how = (
            f"was killed by {signal.Signals(-code).name}"
            if code < 0
            else f"exited with code {code}"
        )
        _say(f"rank {self.failed_rank} (pid {process.pid}) {how}")

    def verdict(self) -> int:
        """Return the exit code of the whole group, once no rank runs."""
        self.watch()  # a rank may have failed since the last look
        codes = {process.returncode for process in self.ranks}
        if (
            self.stopped_early
            or self.terminated_at is None
            and all(self.stopped_as_asked(code) for code in codes)
        ):
            return STOPPED
        common = codes.pop() if len(codes) == 1 else None
        if self.failed_at is not None and not self.announced and common is None:
            self.announce()
        return FAILED if common is None or common < 0 else common  # < 0: killed by a signal

    def kill(self) -> None:
        """SIGKILL to every rank that still runs, however this launcher came to its end."""
        for process in self.ranks:
            if not ended(process):
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def ended(process: subprocess.Popen) -> bool:
    """Return whether a rank has ended; if so, kill what it left running in its session.

    Such as graders. Also used for servers (`serving/processes.py`).
    """
    if process.returncode is not None:
        return True
    # WNOWAIT looks without reaping. Until the process is reaped its id is nobody else's, so the
    # group that is killed is certainly its own.
    if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        return False
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return True


def forks_die_with_us() -> None:
    """From now on the kernel ends what this process forks when this process ends, however it ends.

    Megatron-Core writes checkpoints in forked processes, which wait for a killed rank for ever.
    What is forked by a thread ends with that thread. Does not concern processes started by
    subprocess or the spawn method.
    """
    # prctl is looked up now, and the parent's id kept over the fork: a forked child may do little.
    prctl, forking = ctypes.CDLL(None).prctl, []
    os.register_at_fork(
        before=lambda: forking.append(os.getpid()),
        after_in_parent=forking.pop,
        after_in_child=lambda: _die_with(forking.pop(), prctl),
    )


def _die_with(parent: int, prctl) -> None:
    """Have the kernel send SIGKILL to this new process once the thread that made it ends."""
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # If the parent ended before that call, the signal never comes.
    if os.getppid() != parent:
        os._exit(FAILED)


def _say(message: str) -> None:
    print(f"policysplit: {message}", file=sys.stderr, flush=True)


def free_port() -> int:
    """Return a TCP port that was free on 127.0.0.1 a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_environment(rank: int, nproc: int, port: int) -> dict[str, str]:
    """Return the variables by which torch.distributed finds the group on this machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
