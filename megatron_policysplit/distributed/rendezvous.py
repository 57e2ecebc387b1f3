"""How ranks find each other before torch.distributed is initialized: in a store that rank 0 hosts.

torch's own rendezvous is one blocking call in C++: it is silent, hears no signal, and waits for as
long as a collective may take. Here every blocking call runs in a thread of its own, while the main
thread says what it waits for and looks at the stop signal. The store is torch's TCPStore, so it
does as well for NCCL as for gloo.
"""

from __future__ import annotations

import math
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from megatron_policysplit.distributed.rank_variables import RankPlace, rank_place
from megatron_policysplit.distributed.stop_signal import StopRequested, StopSignal
from megatron_policysplit.errors import ConfigError, MachineError, TrainingError

T = TypeVar("T")
POLL_SECONDS = 0.1
# How long a rank with a stop signal tries to tell the others, which then end, too.
LAST_WORD_SECONDS = 0.5


@dataclass(frozen=True)
class Patience:
    """How many seconds `meet` waits, and when it says so."""

    name: float = 60.0  # for MASTER_ADDR to resolve and to lead to rank 0: a node's DNS may lag
    ranks: float = 1800.0  # for all ranks to come
    answer: float = 10.0  # for what listens at MASTER_PORT to answer as a store does
    first_word: float = 5.0  # until the first message about what is waited for
    next_word: float = 60.0  # between two of them


def meet(
    stop: StopSignal,
    *,
    timeout_seconds: float,
    environ: Mapping[str, str] = os.environ,
    patience: Patience = Patience(),  # noqa: B008 (frozen)
    say: Callable[[str], None] | None = None,
) -> dist.Store:
    """Wait until all ranks of WORLD_SIZE have come; return the store for `init_process_group`.

    Every rank calls it, with the variables of `rank_variables` in `environ`. Under torchrun, which
    has a store of its own (TORCHELASTIC_USE_AGENT_STORE), that one is used.

    timeout_seconds: of the returned store's own operations. say: takes each message; stderr if not
        given.

    Raises ConfigError if MASTER_ADDR does not resolve or is of another host than rank 0's, or if
    MASTER_PORT is taken by another program; TrainingError if ranks do not come, or if rank 0 ends
    first; StopRequested on every rank that has come if one of them got a stop signal.
    """
    place = rank_place(environ)
    if place is None:
        raise ValueError("RANK is not set: a process that is alone has nobody to meet")
    say = say or (lambda text: print(text, file=sys.stderr, flush=True))
    meeting = _Meeting(place, environ, stop, patience, say)
    store = meeting.gather()
    store.set_timeout(timedelta(seconds=timeout_seconds))
    # Processes that torchrun restarts may find the store of those that they replace, and its keys.
    attempt = environ.get("TORCHELASTIC_RESTART_COUNT", 0)
    return dist.PrefixStore(f"policysplit/attempt_{attempt}/default_pg", store)


def store_host(environ: Mapping[str, str] = os.environ) -> int | None:
    """The rank that hosts the store of `meet`; None under torchrun, whose agent does."""
    return None if environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else 0


@dataclass
class _Meeting:
    """One rank's part in one call of `meet`."""

    place: RankPlace
    environ: Mapping[str, str]
    stop: StopSignal
    patience: Patience
    say: Callable[[str], None]
    began: float = field(default_factory=time.monotonic)
    spoke: float | None = None  # when something was said last, by time.monotonic

    def __post_init__(self):
        self.host, self.port = self.environ["MASTER_ADDR"], int(self.environ["MASTER_PORT"])
        self.where = f"{self.host}:{self.port}"
        self.hosts = self.place.rank == store_host(self.environ)
        # Processes that torchrun restarts may find the store of those that they replace.
        self.prefix = f"policysplit/meeting/{self.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"

    def gather(self) -> dist.Store:
        """Wait for all ranks; the store that they have in common."""
        store = None
        try:
            addresses = self.addresses()
            store = self.host_store(addresses) if self.hosts else self.joined_store()
            if self.place.rank == 0:
                self.wait_for_others(store)
            else:
                self.wait_for_go(store)
        except StopRequested:
            self.tell_stop(store)
            raise
        return store

    def key(self, name: str) -> str:
        return f"{self.prefix}/{name}"

    def addresses(self) -> list[tuple]:
        """What MASTER_ADDR resolves to, as `socket.bind` takes it, with the family."""
        while True:
            try:
                found = self.attend(
                    lambda: socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
                )
                return [(family, address) for family, _, _, _, address in found]
            except (OSError, UnicodeError) as error:
                reason = getattr(error, "strerror", None) or error
                problem = f"MASTER_ADDR={self.host} does not resolve ({reason})"
            if self.elapsed() > self.patience.name:
                raise MachineError(
                    f"{problem}, tried for {self.patience.name:g} s; set MASTER_ADDR to the name "
                    "or address of the host of rank 0"
                )
            self.speak(f"{problem}; trying for {self.patience.name:g} s")
            self.pause(10 * POLL_SECONDS)

    def host_store(self, addresses: list[tuple]) -> dist.Store:
        """Rank 0's store; other ranks must be led to it by MASTER_ADDR."""
        is_local = any(_is_local(family, address) for family, address in addresses)
        try:
            store = self.attend(lambda: self.store(self.host if is_local else "127.0.0.1", True))
        except dist.DistError as error:
            taken = "EADDRINUSE" in str(error)
            problem = "is in use (EADDRINUSE)" if taken else f"cannot be used ({_short(error)})"
            raise MachineError(
                f"MASTER_PORT={self.port} {problem} on this host, where rank 0 has to listen; set "
                "MASTER_PORT to a free port, the same for all ranks"
            ) from error
        if not is_local:
            self.check_leads_here(store)
        return store

    def check_leads_here(self, store: dist.Store) -> None:
        """Raise ConfigError unless MASTER_ADDR, an address of another host, leads to this store.

        The address of a service in front of this host does, in Kubernetes for example.
        """
        token, key = uuid.uuid4().hex, self.key("token")
        store.set(key, token)
        deadline = time.monotonic() + self.patience.name
        while time.monotonic() < deadline:
            if self.listens():
                try:
                    others = self.attend(lambda: self.store(self.host, False), self.patience.answer)
                    if others.check([key]) and others.get(key).decode() == token:
                        return
                except (dist.DistError, TimeoutError):
                    pass  # something else listens there: told below
                break
            self.speak(f"waiting until {self.where} leads to this host, where rank 0 runs")
            self.pause(5 * POLL_SECONDS)
        raise ConfigError(
            f"MASTER_ADDR={self.host} is not this host ({socket.gethostname()}), where rank 0 runs"
            "; set MASTER_ADDR to the name or address of this host, the same for all ranks"
        )

    def joined_store(self) -> dist.Store:
        """Connect to the store of rank 0 (or of torchrun) as soon as it listens."""
        while not self.listens():
            self.check_time("rank 0")
            self.speak(f"{self.place.prefix}waiting for rank 0 at {self.where}")
            self.pause(2 * POLL_SECONDS)
        try:
            return self.attend(lambda: self.store(self.host, False), self.patience.answer)
        except (dist.DistError, TimeoutError) as error:
            raise ConfigError(
                f"what listens at {self.where} is not rank 0 of this run; set MASTER_ADDR to the "
                "host of rank 0, and MASTER_PORT to a port that is free there"
            ) from error

    def listens(self, seconds: float | None = None, *, heeds_stop: bool = True) -> bool:
        """Whether anything listens at MASTER_ADDR:MASTER_PORT."""

        def connect() -> bool:
            try:
                socket.create_connection((self.host, self.port), timeout=5).close()
            except OSError:
                return False
            return True

        return self.attend(connect, seconds, heeds_stop=heeds_stop)

    def store(self, host: str, is_master: bool) -> dist.Store:
        return dist.TCPStore(
            host,
            self.port,
            self.place.world_size,
            is_master,
            timedelta(seconds=self.patience.answer),
            wait_for_workers=False,
            multi_tenant=is_master,
        )

    def wait_for_others(self, store: dist.Store) -> None:
        """On rank 0: wait until every other rank has come, then let all go on."""
        missing = list(range(1, self.place.world_size))
        while True:
            missing = [rank for rank in missing if not store.check([self.key(f"came/{rank}")])]
            if not missing:
                store.set(self.key("go"), "1")
                return
            self.check_stopped(store)
            size = self.place.world_size
            self.check_time(ranks_in_words(missing))
            self.speak(
                f"waiting for {ranks_in_words(missing)} at {self.where}; "
                f"{size - len(missing)} of {size} "
                f"{'has' if size - len(missing) == 1 else 'have'} come"
            )
            self.pause(POLL_SECONDS)

    def wait_for_go(self, store: dist.Store) -> None:
        """On the other ranks: be counted, and wait for rank 0's word."""
        try:
            self.attend(lambda: store.set(self.key(f"came/{self.place.rank}"), "1"))
            while not self.attend(lambda: store.check([self.key("go")])):
                self.attend(lambda: self.check_stopped(store))
                self.check_time("all other ranks")
                self.pause(2 * POLL_SECONDS)
        except dist.DistError as error:
            raise TrainingError(
                f"rank 0 at {self.where} ended before all {self.place.world_size} ranks had come; "
                "its own message says why"
            ) from error

    def check_stopped(self, store: dist.Store) -> None:
        if store.check([self.key("stopped")]):
            raise StopRequested

    def tell_stop(self, store: dist.Store | None) -> None:
        """Tell the ranks that have come that this one leaves. store: None if it had not joined."""
        try:
            if store is None:
                if self.hosts or not self.listens(LAST_WORD_SECONDS, heeds_stop=False):
                    return  # nobody has come
                store = self.attend(
                    lambda: self.store(self.host, False), LAST_WORD_SECONDS, heeds_stop=False
                )
            store.set(self.key("stopped"), "1")
        except (dist.DistError, TimeoutError):
            return  # rank 0 has left already, or never was there
        if self.hosts:
            time.sleep(LAST_WORD_SECONDS)

    def check_time(self, late: str) -> None:
        """Raise TrainingError if the time for all ranks to come is over."""
        if self.elapsed() > self.patience.ranks:
            raise TrainingError(
                f"{late} of {self.place.world_size} did not come to {self.where} within "
                f"{self.patience.ranks:g} s; look at their output, and check that all ranks were "
                "started with the same MASTER_ADDR and MASTER_PORT"
            )

    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def speak(self, text: str) -> None:
        """Say what is waited for, if it is time to.

        The first rank of a node does soon and again and again; the others once, and later, so that
        a node is told mostly once.
        """
        now, is_first = time.monotonic(), self.place.first_of_node
        if self.spoke is None:
            due = self.began + (self.patience.first_word if is_first else self.patience.next_word)
        else:
            due = self.spoke + self.patience.next_word if is_first else math.inf
        if now >= due:
            self.spoke = now
            self.say(text)

    def pause(self, seconds: float) -> None:
        """Sleep, and raise StopRequested after a stop signal (which wakes from the sleep)."""
        time.sleep(seconds)
        self._raise_if_stopped()

    def attend(
        self, call: Callable[[], T], seconds: float | None = None, *, heeds_stop: bool = True
    ) -> T:
        """Return the result of a blocking call, or raise its error.

        Raises StopRequested after a stop signal, unless told not to heed it, and TimeoutError after
        `seconds`; the thread of the call is then left behind, and ends with the process.
        """
        outcome: list[tuple[bool, object]] = []

        def run() -> None:
            try:
                outcome.append((True, call()))
            except BaseException as error:  # raised again below, in the main thread
                outcome.append((False, error))

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        deadline = None if seconds is None else time.monotonic() + seconds
        while thread.is_alive():
            thread.join(POLL_SECONDS)
            if heeds_stop:
                self._raise_if_stopped()
            if deadline is not None and thread.is_alive() and time.monotonic() > deadline:
                raise TimeoutError
        succeeded, value = outcome[0]
        if not succeeded:
            raise value  # type: ignore[misc]
        return value  # type: ignore[return-value]

    def _raise_if_stopped(self) -> None:
        if self.stop.received is not None:
            raise StopRequested


def _is_local(family: int, address: tuple) -> bool:
    """Whether an address is one of this host's: only those can be bound."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address[0], 0, *address[2:]))
    except OSError:
        return False
    return True


def ranks_in_words(ranks: list[int], most: int = 8) -> str:
    """Ranks in words: `rank 3`, `ranks 1, 2, 3`; at most `most` are named."""
    more = f" and {len(ranks) - most} more" if len(ranks) > most else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:most]))}{more}"


def _short(error: BaseException) -> str:
    """The first sentence of an error of torch's."""
    return str(error).split("\n")[0].split(". ")[0]
