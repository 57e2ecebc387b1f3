"""Ranks wait for each other: who comes late, who never comes, and what else may listen at the port."""

import http.server
import signal
import socket
import socketserver
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron_policysplit.distributed import rendezvous
from megatron_policysplit.distributed.rendezvous import Patience, meet
from megatron_policysplit.distributed.stop_signal import StopRequested, StopSignal
from megatron_policysplit.errors import ConfigError, TrainingError
from tests.support.dist import free_port

SHORT = Patience(name=1.0, ranks=3.0, answer=1.0, first_word=0.4, next_word=0.4)


def variables(rank: int, size: int, port: int, host: str = "127.0.0.1", **more: str) -> dict[str, str]:
    named = {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": host, "MASTER_PORT": str(port)}
    return named | more


class Ranks:
    """Ranks in threads, each with a stop signal, and all that they say."""

    def __init__(self, size: int, patience: Patience = SHORT, **more: str):
        self.size, self.patience, self.more = size, patience, more
        self.port, self.said = free_port(), []
        self.stops = [StopSignal() for _ in range(size)]
        self.pool = ThreadPoolExecutor(size)

    def start(self, rank: int, **more: str):
        environ = variables(rank, self.size, self.port, **self.more) | more
        return self.pool.submit(
            meet, self.stops[rank], timeout_seconds=5, environ=environ, patience=self.patience, say=self.said.append
        )


@contextmanager
def listening(handler):
    """The port at which something else than a store listens."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def test_ranks_that_come_one_after_the_other_meet():
    ranks = Ranks(3, replace(SHORT, next_word=1.5))
    first = ranks.start(2, LOCAL_RANK="2")  # rank 0 hosts the store and is not there yet
    time.sleep(0.8)
    others = [ranks.start(0)]
    time.sleep(0.8)
    others.append(ranks.start(1))
    stores = [future.result(timeout=10) for future in [first, *others]]
    stores[0].set("word", "heard")
    assert [store.get("word") for store in stores] == [b"heard"] * 3
    where = f"127.0.0.1:{ranks.port}"
    assert f"waiting for rank 1 at {where}; 2 of 3 have come" in ranks.said
    assert not any("rank 2: waiting" in text for text in ranks.said)  # a node is told once, by its first rank


def test_the_first_rank_of_a_node_waits_for_rank_0_aloud():
    ranks = Ranks(2)
    with pytest.raises(TrainingError, match=r"^rank 0 of 2 did not come to 127.0.0.1:\d+ within 3 s; look at "):
        ranks.start(1, LOCAL_RANK="0").result(timeout=10)
    assert len(ranks.said) >= 2 and set(ranks.said) == {f"rank 1: waiting for rank 0 at 127.0.0.1:{ranks.port}"}


def test_the_other_ranks_of_a_node_say_it_once_and_later():
    ranks = Ranks(2, replace(SHORT, next_word=1.0))
    with pytest.raises(TrainingError):
        ranks.start(1, LOCAL_RANK="1").result(timeout=10)
    assert ranks.said == [f"rank 1: waiting for rank 0 at 127.0.0.1:{ranks.port}"]


def test_ranks_that_never_come():
    ranks = Ranks(4)
    waiting = [ranks.start(rank) for rank in (0, 2)]
    with pytest.raises(TrainingError, match=r"^ranks 1, 3 of 4 did not come to 127.0.0.1:\d+ within 3 s"):
        waiting[0].result(timeout=10)
    with pytest.raises(TrainingError):
        waiting[1].result(timeout=10)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_rank_ends_the_wait_of_all_that_have_come(rank, number):
    ranks = Ranks(3, Patience())
    waiting = [ranks.start(0), ranks.start(1)]
    time.sleep(1)
    ranks.stops[rank]._handle(number, None)
    began = time.monotonic()
    for future in waiting:
        with pytest.raises(StopRequested):
            future.result(timeout=10)
    assert time.monotonic() - began < 5


def test_a_signal_before_a_rank_has_come_ends_the_others(monkeypatch):
    ranks = Ranks(3, Patience())
    waiting = [ranks.start(0), ranks.start(1)]
    time.sleep(1)
    ranks.stops[2]._handle(signal.SIGTERM, None)  # during its imports
    for future in [ranks.start(2), *waiting]:
        with pytest.raises(StopRequested):
            future.result(timeout=10)


def test_a_name_that_does_not_resolve(monkeypatch):
    asked = []

    def unknown(host, *arguments, **options):
        asked.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(rendezvous.socket, "getaddrinfo", unknown)
    ranks = Ranks(2, replace(SHORT, name=1.8), host="no.such.host")
    with pytest.raises(ConfigError, match=r"^MASTER_ADDR=no.such.host does not resolve \(Name or .*tried for 1.8 s; "):
        ranks.start(0).result(timeout=10)
    assert len(asked) > 1
    assert ranks.said[0].startswith("MASTER_ADDR=no.such.host does not resolve (Name or service not known); trying for")


def test_a_slow_resolver_does_not_keep_a_signal_waiting(monkeypatch):
    monkeypatch.setattr(rendezvous.socket, "getaddrinfo", lambda *arguments, **options: time.sleep(8))
    ranks = Ranks(2, Patience(), host="slow.host")
    waiting = ranks.start(1)
    time.sleep(0.3)
    ranks.stops[1]._handle(signal.SIGTERM, None)
    with pytest.raises(StopRequested):
        waiting.result(timeout=3)


class Silent(socketserver.BaseRequestHandler):
    def handle(self):
        time.sleep(5)


@pytest.mark.parametrize("handler", [http.server.BaseHTTPRequestHandler, Silent])
def test_something_else_listens_at_the_port(handler):
    with listening(handler) as port:
        ranks = Ranks(2)
        ranks.port = port
        with pytest.raises(ConfigError, match=f"^what listens at 127.0.0.1:{port} is not rank 0 of this run; set MAST"):
            ranks.start(1).result(timeout=10)
        with pytest.raises(ConfigError, match=rf"^MASTER_PORT={port} is in use \(EADDRINUSE\) on this host, where r"):
            ranks.start(0).result(timeout=10)


def test_the_address_of_another_host_on_rank_0(monkeypatch):
    ranks = Ranks(2, host="192.0.2.1")  # of documentation: nobody has it
    monkeypatch.setattr(
        rendezvous.socket, "create_connection", lambda *arguments, **options: (_ for _ in ()).throw(OSError)
    )
    with pytest.raises(ConfigError, match=r"^MASTER_ADDR=192.0.2.1 is not this host \(.*\), where rank 0 runs; set "):
        ranks.start(0).result(timeout=10)


def test_an_address_that_leads_to_rank_0_though_it_is_of_another_host(monkeypatch):
    monkeypatch.setattr(rendezvous, "_is_local", lambda family, address: False)  # a service in front of it
    ranks = Ranks(2)
    for future in [ranks.start(0), ranks.start(1)]:
        future.result(timeout=10).set("word", "heard")


def test_rank_0_ends_before_all_have_come():
    ranks = Ranks(3, Patience())
    port = ranks.port
    hosted = dist.TCPStore("127.0.0.1", port, 3, True, timedelta(seconds=5), wait_for_workers=False)
    waiting = ranks.start(1)
    hosted.wait(["policysplit/meeting/0/came/1"])
    del hosted
    with pytest.raises(TrainingError, match=f"^rank 0 at 127.0.0.1:{port} ended before all 3 ranks had come; its own"):
        waiting.result(timeout=10)


def test_the_store_of_torchrun_is_used():
    ranks = Ranks(2, TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="1")
    agent = dist.TCPStore("127.0.0.1", ranks.port, None, True, timedelta(seconds=5), wait_for_workers=False)
    for future in [ranks.start(0), ranks.start(1)]:
        future.result(timeout=10)
    assert agent.check(["policysplit/meeting/1/go"])
