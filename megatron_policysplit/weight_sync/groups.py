"""The process groups of transport=distributed, and how their sides stop each other.

A group is one pipeline stage's sender (rank 0) and every rank of the engines. It is made beside the
trainer's own groups, the way SGLang makes its half of it.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Generic, TypeVar
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from megatron_policysplit.distributed.device import backend, device_of_thread

T = TypeVar("T")

POLL_SECONDS = 0.005
POLLS_PER_ABORT_CHECK = 10  # the key is in the store, which one process serves for all ranks
# How long a group's store stays after its making was broken off: an engine that has not come to it
# yet would look for it for half an hour if it were gone.
LATE_SECONDS = 3.0


class BroadcastFailed(RuntimeError):
    """A sender could not reach all engines, or was told to stop: the attempt is over everywhere."""


class Abort:
    """Lets the chief and the senders of one attempt stop each other, each looking when it can.

    A key of the default store, not a collective: the chief waits for engines, the engines for the
    senders' broadcasts and the senders for the engines, so that none of them may also wait for
    another rank. Each reads the key while it waits for its own.

    name: of the attempt, the same on every rank, and never used again: a key that was set stays.
    """

    def __init__(self, name: str):
        self._store = c10d._get_default_store()
        self._key = f"policysplit/weight_sync/{name}"
        self._reason: str | None = None  # once known, the store is asked no more

    def set(self, why: str) -> None:
        """Stop the attempt on all ranks, unless it is stopped: the first reason stays."""
        if self.reason() is None:
            self._reason = why
            self._store.set(self._key, why)

    def reason(self) -> str | None:
        """Return why the attempt was stopped, None while it goes on. Does not wait for any rank."""
        # `check` first: `get` alone would wait until somebody sets the key.
        if self._reason is None and self._store.check([self._key]):
            self._reason = self._store.get(self._key).decode()
        return self._reason


class _Call(Generic[T]):
    """A call in a thread of its own, which does not keep the process from ending."""

    def __init__(self, name: str, call: Callable[[], T]):
        self._results: list[T] = []
        self._errors: list[Exception] = []
        self._thread = threading.Thread(target=self._run, args=(call,), name=name, daemon=True)
        self._thread.start()

    def _run(self, call: Callable[[], T]) -> None:
        try:
            self._results.append(call())
        except Exception as error:  # raised by `result`, in the thread that asks
            self._errors.append(error)

    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> T:
        """What it returned, once it is over, or raise what it raised."""
        if self._errors:
            raise self._errors[0]
        return self._results[0]


class SenderGroup:
    """A sender's side of a stage's group, as its rank 0.

    The constructor opens the group's store at (`host`, `port`), where the engines find it; `join`
    waits for them. timeout_seconds: of the store, and of each wait for the engines. Raises OSError
    if `host` is not an address of this machine.
    """

    def __init__(self, name: str, host: str, world_size: int, timeout_seconds: float):
        self.name, self.host, self.world_size = name, host, world_size
        self.timeout = timedelta(seconds=timeout_seconds)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        # The port is taken before the store is made, so that nobody else can have it.
        with socket.create_server((host, 0), family=family) as listener:
            self.port = listener.getsockname()[1]
            # The store's server, an object of its own beside the group's client of it: dropping it
            # ends every wait for the store, here and in the engines.
            self._server: dist.TCPStore | None = dist.TCPStore(
                host,
                self.port,
                world_size,
                True,
                timeout=self.timeout,
                wait_for_workers=False,
                master_listen_fd=listener.detach(),
            )
        self._group: dist.ProcessGroup | None = None
        self._broadcasts: list[tuple[dist.Work, torch.Tensor]] = []
        self._issuing = _Call(name, lambda: None)  # of the last broadcast

    def join(self, abort: Abort) -> None:
        """Wait until all engines have joined; BroadcastFailed if they do not, or on `abort`.

        With gloo all are connected then. With NCCL it shows only that they have come to the store:
        the communicator is made within the first broadcast.
        """
        # In a thread, because making the group waits for the engines and cannot be interrupted: on
        # an abort the thread is left behind, and ends when the server is dropped.
        making = _Call(
            self.name,
            lambda: _make_group(self.name, self.host, self.port, self.world_size, self.timeout),
        )
        try:
            self._wait(making.is_over, abort, f"the engines did not join {self.name}")
        except BroadcastFailed:
            time.sleep(LATE_SECONDS)  # the caller drops the store next
            raise
        try:
            self._group = making.result()
        except Exception as error:
            raise BroadcastFailed(f"{self.name} could not be made: {error}") from error

    def broadcast(self, flat: torch.Tensor, abort: Abort) -> None:
        """Send `flat` to all engines.

        Raises BroadcastFailed if that fails or takes longer than the time-out, or on `abort`.
        """
        why = f"the engines did not take a bucket from {self.name}"
        try:
            # In a thread: NCCL makes its communicator within the first broadcast, in a call that
            # waits for all engines, and for ever if one does not come. Asynchronous besides, so
            # that `abort` is seen while an engine does not take its part.
            self._issuing = _Call(self.name, lambda: self._issue(flat))
            self._wait(self._issuing.is_over, abort, why)
            work = self._issuing.result()
            self._broadcasts = [(work, flat)]
            self._wait(work.is_completed, abort, why)
            work.wait()  # raises what went wrong
        except BroadcastFailed:
            raise
        except RuntimeError as error:  # torch's own errors are of this kind
            raise BroadcastFailed(
                f"a broadcast in {self.name} failed: {str(error).splitlines()[0]}"
            ) from error
        self._broadcasts = []

    def _issue(self, flat: torch.Tensor) -> dist.Work:
        with device_of_thread(flat.device):
            return dist.broadcast(flat, src=0, group=self._group, async_op=True)

    def leave(self) -> None:
        """Destroy the group; engines that wait in it get an error."""
        self._server = None
        if self._group is None:
            return
        # Destroying would wait for the broadcast that nobody takes.
        if self._broadcasts or not self._issuing.is_over():
            c10d._abort_process_group(self._group)
        else:
            dist.destroy_process_group(self._group)
            self._group = None

    @property
    def over(self) -> bool:
        """Whether nothing is under way any more, so that the group may be dropped.

        gloo cannot cut an operation short: it ends when its peer goes or its time-out comes, and
        whoever drops the group before that waits for it.
        """
        return self._issuing.is_over() and all(work.is_completed() for work, _ in self._broadcasts)

    def _wait(self, done: Callable[[], bool], abort: Abort, why: str) -> None:
        """Wait until `done()`; BroadcastFailed at the time-out (with `why`) or on `abort`."""
        deadline = time.monotonic() + self.timeout.total_seconds()
        polls = 0
        while not done():
            polls += 1
            if polls % POLLS_PER_ABORT_CHECK == 0 and abort.reason() is not None:
                raise BroadcastFailed(abort.reason())
            if time.monotonic() > deadline:
                raise BroadcastFailed(f"{why} in {self.timeout.total_seconds():g} s")
            time.sleep(POLL_SECONDS)


def _make_group(
    name: str, host: str, port: int, world_size: int, timeout: timedelta
) -> dist.ProcessGroup:
    """Make rank 0's half of the group; waits for the halves of the engines' ranks.

    With torch's internals, as SGLang does: `dist.new_group` knows ranks of the default group only.
    Nothing in this process may pass `device_id` to `init_process_group`: torch would then split the
    default group's communicator for this one, and the engines have no part in that.
    """
    store = dist.TCPStore(host, port, world_size, False, timeout=timeout, wait_for_workers=False)
    group, _ = c10d._new_process_group_helper(
        world_size,
        0,
        [],
        c10d.Backend(backend()),
        dist.PrefixStore(name, store),
        group_name=name,
        timeout=timeout,
    )
    # `dist.broadcast` looks ranks up here.
    c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(world_size)}
    return group


def own_address(
    master_address: str | None, engines: Sequence[str], *, beside_chief: bool, chief_host: str
) -> str:
    """Return the address at which engines reach this process.

    master_address: the configuration's; taken as it is. engines: their URLs, as the chief knows
    them. beside_chief: whether this process runs on the chief's machine. chief_host: that machine's
    name.
    """
    if master_address is not None:
        return master_address
    hosts = [urlsplit(engine).hostname for engine in engines]
    remote = next((host for host in hosts if not _is_loopback(host)), None)
    if remote is None and beside_chief:
        return "127.0.0.1"
    # An engine on the chief's loopback is reached where the chief is.
    target = remote or chief_host
    family, kind, _, _, address = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # sends nothing; it picks the interface
        return probe.getsockname()[0]


def _is_loopback(host: str) -> bool:
    addresses = [info[4][0] for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    return all(address.startswith("127.") or address == "::1" for address in addresses)
