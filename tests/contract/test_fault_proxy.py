"""A trainer and a live server with a bad network between them: every fault on every call of a weight sync.

Whatever is struck, every rollout that was asked for arrives once, sampled by exactly the weights whose version it
carries; the server never answers anybody with mixed weights; and the next full sync heals it.
"""

import asyncio
import os
import random
import socket

import pytest

from megatron_policysplit.rollout.sglang_http import EngineUnreachable, SglangClient
from megatron_policysplit.rows import MODES
from megatron_policysplit.serving.members import State
from tests.support.fault_proxy import Fault, FaultProxy, Rule
from tests.support.one_rank import layout_of_one, one_rank
from tests.support.sglang import SHORT, ask, keys

pytestmark = [pytest.mark.contract, pytest.mark.timeout(90, func_only=True)]

PATIENCE = 1 / 24  # 2.5 s for a request or a call of a sync
FRAME = ("/pause_generation", "/flush_cache", "/update_weight_version", "/continue_generation", "/model_info")
SESSION = ("/begin_weight_update", "/end_weight_update")
BUCKETS = {
    "tensor": "/update_weights_from_tensor",
    "disk": "/update_weights_from_disk",
    "distributed": "/update_weights_from_distributed",
}
CALLS = {
    "tensor": (*FRAME, *SESSION, BUCKETS["tensor"]),
    "disk": (*FRAME, BUCKETS["disk"]),
    "distributed": (*FRAME, *SESSION, BUCKETS["distributed"]),
}
assert sum(map(len, CALLS.values())) >= 20  # each fault strikes in so many rounds
KEPT_FROM_THE_SERVER = (Fault.REFUSE, Fault.DROP_REQUEST, Fault.STALL_REQUEST, Fault.HALF_REQUEST)


@pytest.fixture(scope="module")
def proxy(live):
    live.reset()
    with FaultProxy(live.port) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def layout():
    with layout_of_one() as layout:
        yield layout


@pytest.fixture(scope="module")
def trainer(request, layout, reference, live, proxy, tmp_path_factory):
    """With the first sync behind it; one for each transport, one after the other."""
    live.reset()
    proxy.script()
    directory = tmp_path_factory.mktemp(request.param)
    with one_rank(layout, reference, proxy.address, directory, request.param, patience=PATIENCE) as trainer:
        trainer.train()
        yield trainer
        proxy.script()


def answer_of_the_server(live, reference, requests, seconds):
    """The version with which it answers somebody who knows of no quarantine, in truth; None if it does not answer."""

    async def run():
        client = SglangClient(live.address, timeout_seconds=seconds)
        sampling = {"max_new_tokens": 6, "temperature": 1.0, "ignore_eos": True}
        try:
            return await client.generate(
                {"input_ids": requests[0].prompt, "sampling_params": sampling, "return_logprob": True}
            )
        except EngineUnreachable:
            return None
        finally:
            await client.close()

    answer = asyncio.run(run())
    if answer is None:
        return None
    (span,) = answer["meta_info"]["weight_versions"]
    logprobs, tokens, _ = zip(*answer["meta_info"]["output_token_logprobs"], strict=True)
    expected = reference.logprobs(int(span["version"]), requests[0].prompt, tokens)
    assert logprobs == pytest.approx(expected, abs=1e-4), f"mixed weights under version {span['version']}"
    return int(span["version"])


def generate_all(trainer, reference, requests):
    rollouts = trainer.generate(requests)
    assert [rollout.key for rollout in rollouts] == keys(requests)
    assert {tuple(rollout.weight_versions) for rollout in rollouts} == {((0, trainer.version),)}
    reference.assert_agrees(rollouts, requests)


def matrix(transport):
    """Every fault on every call of a transport."""

    def decorate(test):
        test = pytest.mark.parametrize("path", CALLS[transport], ids=lambda path: path.strip("/"))(test)
        test = pytest.mark.parametrize("fault", Fault, ids=lambda fault: fault.value)(test)
        return pytest.mark.parametrize("trainer", [transport], indirect=True)(test)

    return decorate


@matrix("tensor")
def test_weights_through_shared_memory(trainer, path, fault, live, proxy, reference):
    strike(trainer, path, fault, live, proxy, reference)


@matrix("disk")
def test_weights_through_files(trainer, path, fault, live, proxy, reference):
    strike(trainer, path, fault, live, proxy, reference)


@matrix("distributed")
def test_weights_through_a_broadcast(trainer, path, fault, live, proxy, reference):
    strike(trainer, path, fault, live, proxy, reference)


def strike(trainer, path, fault, live, proxy, reference):
    draw = random.Random(f"{trainer.config.weight_sync.transport} {path} {fault.value}")
    bucket = BUCKETS[trainer.config.weight_sync.transport]
    requests = ask(range(4), samples=2, modes=MODES, batch=trainer.version, sampling=SHORT)
    call = draw.randint(1, 3) if path == bucket != BUCKETS["disk"] else 1
    proxy.script(
        Rule(path, fault, call, share=draw.random(), delay=0.01 * draw.random()),
        Rule("/generate", fault, draw.randint(1, 12), share=draw.random(), delay=0.01 * draw.random()),
    )
    trainer.train()
    assert [c.path for c in proxy.struck()] == [path]
    after = trainer.member.state
    if path == bucket and fault in KEPT_FROM_THE_SERVER and bucket != BUCKETS["distributed"]:
        assert after is not State.SERVING  # a broadcast that broke is sent again within the same sync
    if after is not State.SERVING:
        assert trainer.member.why
        answer_of_the_server(live, reference, requests, seconds=0.3)
    proxy.release()
    generate_all(trainer, reference, requests)
    assert {c.path for c in proxy.struck()} == {path, "/generate"}
    # After a lost answer to the last call the server generates with whole new weights, before it is trusted again.
    assert trainer.member.state is State.SERVING or path == "/continue_generation"

    proxy.script()
    trainer.train()
    generate_all(trainer, reference, requests[:1])
    assert (trainer.member.state, trainer.member.version) == (State.SERVING, trainer.version)
    assert answer_of_the_server(live, reference, requests, seconds=30.0) == trainer.version


def cut_connections(live):
    """End every TCP connection between this process and the server's, HTTP apart: the broadcast's and its store's."""
    import psutil

    first = psutil.Process(live.server.pid)
    theirs = {
        connection.laddr
        for process in (first, *first.children(recursive=True))
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_ESTABLISHED and connection.laddr.port != live.port
    }
    ended = 0
    for connection in psutil.Process().net_connections("tcp"):
        if connection.raddr in theirs:
            with socket.socket(fileno=os.dup(connection.fd)) as mine:
                mine.shutdown(socket.SHUT_RDWR)
            ended += 1
    assert ended, "no connection to end"
    return ended


@pytest.mark.parametrize("trainer", ["distributed"], indirect=True)
@pytest.mark.parametrize("round_number", range(20))
def test_the_broadcasts_connections_are_cut(trainer, round_number, live, proxy, reference):
    """At another bucket in every round."""
    requests = ask(range(2), samples=2, modes=MODES, batch=trainer.version, sampling=SHORT)
    cuts = []
    path = BUCKETS["distributed"]
    proxy.script(Rule(path, None, 1 + round_number % 4, before=lambda: cuts.append(cut_connections(live))))
    trainer.train()
    assert len(cuts) == 1 and cuts[0] > 0
    if trainer.member.state is not State.SERVING:
        answer_of_the_server(live, reference, requests, seconds=0.3)
    generate_all(trainer, reference, requests)
    assert (trainer.member.state, trainer.member.version) == (State.SERVING, trainer.version)
    assert answer_of_the_server(live, reference, requests, seconds=30.0) == trainer.version
