"""Real servers and a real router as processes: one key for everything, workers that come and go, nothing left over."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from megatron_policysplit.errors import EngineError
from megatron_policysplit.rollout.sglang_http import EngineRefused, EngineUnreachable, SglangClient
from megatron_policysplit.serving.router import Router
from megatron_policysplit.serving.servers import Server, ServerSpec
from tests.support.sglang import CACHE_TOKENS, START_SECONDS, interpreter, make_model, require_server_environment

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.contract
KEY = "sk-'quoted'-0123456789"
OWNER = """
import asyncio, sys
from pathlib import Path
from megatron_policysplit.serving.router import Router
from megatron_policysplit.rollout.sglang_http import SglangClient
from tests.contract.test_server_processes import Server, a_router, a_spec

async def main():
    server, router = Server(a_spec(Path(sys.argv[1]), Path(sys.argv[2]))), a_router(Path(sys.argv[2]))
    server.start()
    router.start()
    await asyncio.gather(server.ready(SglangClient(server.address)), router.ready())
    await router.add(server.address)
    print("ready", flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def a_spec(model, directory, index=0, **changes):
    return ServerSpec(
        **{
            "index": index,
            "python": str(interpreter()),
            "model": str(model),
            "dtype": "float32",
            "tensor": 1,
            "host": "127.0.0.1",
            "port": 0,
            "seed": index,
            "log": directory / f"sglang_{index}.log",
            "start_seconds": START_SECONDS,
            "arguments": {"max-total-tokens": CACHE_TOKENS},
            "environment": {"OMP_NUM_THREADS": "1"},
            **changes,
        }
    )


def a_router(directory, key=None):
    return Router(str(interpreter()), "127.0.0.1", 0, key, directory / "router.log", request_seconds=60.0)


def processes_of(*ours):
    """What we started and all that it started."""
    found = [psutil.Process(process.pid) for process in ours]
    return found + [child for process in found for child in process.children(recursive=True)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    require_server_environment()
    return make_model(tmp_path_factory.mktemp("served"))


async def answered(client, count):
    """How often each status came back for that many different prompts, sent together."""

    async def status(first):
        prompt = [first % 30, *range(1, 12)]
        try:
            answer = await client.generate({"input_ids": prompt, "sampling_params": {"max_new_tokens": 4}})
        except EngineRefused as error:
            return error.status
        except EngineUnreachable:
            return "unreachable"
        assert answer["meta_info"]["completion_tokens"] >= 1
        return 200

    statuses = await asyncio.gather(*(status(number) for number in range(count)))
    return {status: statuses.count(status) for status in statuses}


@pytest.mark.timeout(600)
def test_two_servers_behind_the_router(model, tmp_path):
    servers = [Server(a_spec(model, tmp_path, index, api_key=KEY)) for index in range(2)]
    router = a_router(tmp_path, KEY)

    async def main():
        clients = []
        try:
            for process in (*servers, router):
                process.start()
                clients.append(SglangClient(process.address, KEY, timeout_seconds=60.0))
            first, second, through = clients
            await asyncio.gather(servers[0].ready(first), servers[1].ready(second), router.ready())
            assert await answered(through, 1) == {"unreachable": 1}, "it has no server yet"
            await asyncio.gather(*(router.add(server.address) for server in servers))
            assert await router.workers() == {server.address: True for server in servers}
            assert await answered(through, 8) == {200: 8}
            everything = processes_of(*servers, router)
            assert len(everything) >= 7
            assert not any(KEY in word for process in everything for word in process.cmdline())
            await one_key_opens_everything(first)
            await nothing_opens_without_it(servers[0].address, router.address)

            os.kill(servers[0].pid, signal.SIGKILL)
            assert not psutil.wait_procs(processes_of(servers[0])[1:], timeout=30)[1]
            statuses = await answered(through, 8)
            assert set(statuses) <= {200, 500} and (await router.workers())[servers[0].address]
            await router.remove(servers[0].address)
            assert await router.workers() == {servers[1].address: True}
            assert await answered(through, 8) == {200: 8}
            old, address = servers[0].initial_version, servers[0].address
            servers[0].start()
            await servers[0].ready(first)
            assert servers[0].address == address and await first.version() == servers[0].initial_version != old
            await router.add(servers[0].address)
            assert await answered(through, 8) == {200: 8}

            everything = processes_of(*servers, router)
            await asyncio.gather(*(process.stop() for process in (*servers, router)))
            assert not psutil.wait_procs(everything, timeout=10)[1]
        finally:
            for process in (*servers, router):
                process.kill()
                await process.stop()
            for client in clients:
                await client.close()

    asyncio.run(main())
    for log in tmp_path.glob("*.log"):
        text = log.read_text()
        assert text and KEY not in text and repr(KEY)[1:-1] not in text, log.name
    assert "'api_key': \"***\"" in (tmp_path / "sglang_0.log").read_text()


async def one_key_opens_everything(client):
    """The control calls of a weight sync and of colocation."""
    await client.pause()
    await client.begin_update()
    await client.end_update()
    await client.flush()
    await client.set_version("7")
    await client.proceed()
    assert await client.version() == "7"
    await client.abort_all()
    await client.release_memory(["kv_cache"])
    await client.resume_memory(["kv_cache"])
    await client.healthy(30.0)


async def nothing_opens_without_it(server, router):
    """What asks for no key, as the router's /get_server_info, does not tell it either."""
    token = {"input_ids": [1], "sampling_params": {"max_new_tokens": 1}}
    tried = [(server, "POST", "/generate", token), (server, "GET", "/server_info", None)]
    tried += [(router, "POST", "/generate", token), (router, "POST", "/workers", {"url": server})]
    for address, method, path, payload in tried:
        stranger = SglangClient(address, timeout_seconds=30.0)
        with pytest.raises(EngineRefused) as raised:
            await stranger.call(method, path, payload)
        assert raised.value.status == 401, path
        await stranger.close()
    stranger = SglangClient(router, timeout_seconds=30.0)
    assert KEY not in str(await stranger.call("GET", "/get_server_info"))
    await stranger.close()


@pytest.mark.timeout(600)
def test_nothing_is_left_when_the_trainer_is_killed(model, tmp_path):
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(model), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert owner.stdout.readline() == "ready\n"
        theirs = psutil.Process(owner.pid).children(recursive=True)
        assert len(theirs) >= 4, "server, scheduler, detokenizer, router"
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        assert not psutil.wait_procs(theirs, timeout=30)[1]
    finally:
        owner.kill()
        owner.wait()
        owner.stdout.close()


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"python": sys.executable}, "its interpreter has no sglang: install it there, or set rollout.server.python"),
        ({"arguments": {"no-such-flag": 1}}, "rollout.server.arguments: unrecognized arguments: --no-such-flag"),
        ({}, "SGLang server 0 (ended|was killed).*(Error|Exception).*empty"),
    ],
)
def test_what_is_said_when_a_server_cannot_start(model, tmp_path, changes, said):
    (tmp_path / "empty").mkdir()
    served = tmp_path / "empty" if "empty" in said else model
    server = Server(a_spec(served, tmp_path, **changes))

    async def main():
        server.start()
        client = SglangClient(server.address)
        try:
            with pytest.raises(EngineError, match=said) as raised:
                await server.ready(client)
            assert f"the end of {server.log}:\n" in str(raised.value)
        finally:
            await client.close()
            server.close()

    asyncio.run(main())
