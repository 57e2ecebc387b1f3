"""The process groups of transport=distributed: one pipeline stage's sender and every rank of the
engines.

They are made beside the trainer's own groups, the way SGLang makes its half of them.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from megatron_policysplit.distributed.device import backend

POLL_SECONDS = 0.005
# An engine that has not come to the store yet would look for it for half an hour once it is gone.
LATE_SECONDS = 3.0


class BroadcastFailed(RuntimeError):
    """A sender could not reach all engines, or was told to stop; the attempt is over on all ranks."""


class Abort:
    """Lets the chief and the senders stop each other while none of them may wait for another: a key
    of the default store. The first reason stays.
    """

    def __init__(self, name: str):
        self._store = c10d._get_default_store()
        self._key = f"policysplit/weight_sync/{name}"
        self._own: str | None = None

    def set(self, why: str) -> None:
        if self.reason() is None:
            self._own = why
            self._store.set(self._key, why)

    def reason(self) -> str | None:
        if self._own is None and self._store.check([self._key]):
            self._own = self._store.get(self._key).decode()
        return self._own


class SenderGroup:
    """A sender's side of a stage's group; it is rank 0. address, port: where the engines find the
    group's store.

    The store's server is an object of its own: dropping it ends every wait for it, here and in the
    engines.
    """

    def __init__(self, name: str, host: str, world_size: int, timeout_seconds: float):
        self.name, self.host, self.world_size = name, host, world_size
        self.timeout = timedelta(seconds=timeout_seconds)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, 0), family=family) as listener:
            self.port = listener.getsockname()[1]
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
        self._unfinished: list[tuple[dist.Work, torch.Tensor]] = []

    def join(self, abort: Abort) -> None:
        """Wait until all engines have joined. Raises BroadcastFailed if they do not, or on `abort`."""
        failure: list[Exception] = []

        def make() -> None:
            try:
                self._group = _make_group(
                    self.name, self.host, self.port, self.world_size, self.timeout
                )
            except Exception as error:  # raised again below, in the main thread
                failure.append(error)

        thread = threading.Thread(target=make, name=self.name, daemon=True)
        thread.start()
        try:
            self._wait(
                lambda: not thread.is_alive(), abort, f"the engines did not join {self.name}"
            )
        except BroadcastFailed:
            time.sleep(LATE_SECONDS)
            raise
        if failure:
            raise BroadcastFailed(f"{self.name} could not be made: {failure[0]}")

    def broadcast(self, flat: torch.Tensor, abort: Abort) -> None:
        """Send `flat` to all engines. Raises BroadcastFailed if that fails or takes too long, or on
        `abort`.
        """
        try:
            work = dist.broadcast(flat, src=0, group=self._group, async_op=True)
            self._unfinished = [(work, flat)]
            self._wait(
                work.is_completed, abort, f"the engines did not take a bucket from {self.name}"
            )
            work.wait()
        except BroadcastFailed:
            raise
        except RuntimeError as error:  # torch's own errors are of this kind
            raise BroadcastFailed(
                f"a broadcast in {self.name} failed: {str(error).splitlines()[0]}"
            ) from error
        self._unfinished = []

    def leave(self) -> None:
        """Destroy the group; engines that wait in it get an error."""
        self._server = None
        if self._group is None:
            return
        if self._unfinished:
            c10d._abort_process_group(self._group)
        else:
            dist.destroy_process_group(self._group)
            self._group = None

    @property
    def over(self) -> bool:
        """Whether nothing is under way any more, so that the group's memory may go. gloo cannot cut
        an operation short; it ends when its peer goes or its time-out comes, and who drops it
        before that waits for it.
        """
        return all(work.is_completed() for work, _ in self._unfinished)

    def _wait(self, done: Callable[[], bool], abort: Abort, why: str) -> None:
        deadline = time.monotonic() + self.timeout.total_seconds()
        checks = 0
        while not done():
            checks += 1
            if checks % 10 == 0 and abort.reason() is not None:
                raise BroadcastFailed(abort.reason())
            if time.monotonic() > deadline:
                raise BroadcastFailed(f"{why} in {self.timeout.total_seconds():g} s")
            time.sleep(POLL_SECONDS)


def _make_group(
    name: str, host: str, port: int, world_size: int, timeout: timedelta
) -> dist.ProcessGroup:
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
    c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(world_size)}
    return group


def own_address(
    master_address: str | None, engines: Sequence[str], *, beside_chief: bool, chief_host: str
) -> str:
    """The address at which engines reach this process. engines: their URLs, as the chief knows
    them.

    beside_chief: whether this process runs on the chief's machine. chief_host: that machine's name.
    """
    if master_address is not None:
        return master_address
    hosts = [urlsplit(engine).hostname for engine in engines]
    far = next((host for host in hosts if not _is_loopback(host)), None)
    if far is None and beside_chief:
        return "127.0.0.1"
    # An engine on the chief's loopback is reached where the chief is.
    family, kind, _, _, place = socket.getaddrinfo(far or chief_host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(place)  # sends nothing; it picks the interface
        return probe.getsockname()[0]


def _is_loopback(host: str) -> bool:
    return all(
        place[4][0].startswith("127.") or place[4][0] == "::1"
        for place in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    )
