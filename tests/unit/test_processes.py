"""SGLang's processes: how they start, how they end, and what is said when they do not come up."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from megatron_policysplit.errors import ConfigError, EngineError
from megatron_policysplit.serving import processes, router, servers
from megatron_policysplit.serving.router import Router
from megatron_policysplit.serving.servers import Server
from tests.support.servers import FAKE, KEY, ROOT, after, gone, run, spec, until


def test_start_until_the_first_token(tmp_path):
    async def main(started):
        server = Server(spec(tmp_path, "spawns", api_key=KEY))
        client = await started(server, KEY)
        await server.ready(client)
        assert server.alive() and await client.version() == server.initial_version
        command = Path(f"/proc/{server.pid}/cmdline").read_text()
        assert "--model-path" in command and "api-key" not in command and KEY not in command
        first, address = server.initial_version, server.address
        os.kill(server.pid, signal.SIGKILL)
        assert until(lambda: not server.alive())
        server.start()
        await server.ready(client)
        assert server.address == address and server.initial_version != first and server.starts == 2
        await server.stop()
        assert not server.alive()

    run(main)
    log = (tmp_path / "logs" / "sglang_0.log").read_text()
    assert KEY not in log and repr(KEY)[1:-1] not in log
    assert "server_args=" in log and "--api-key=***" in log and "of a child: " in log
    assert re.findall(r"started( again \(2\))?: ", log) == ["", " again (2)"]
    seeds = re.findall(r"started.*--random-seed (\d+)", log)
    assert len(seeds) == 2 and seeds[0] == "3" != seeds[1]


def test_what_stands_beside_the_launcher_is_not_taken_for_sglang(tmp_path, monkeypatch):
    """The launcher runs by its path, and what lies in its directory must not hide the real package."""
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang" / "__init__.py").write_text("")
    beside = tmp_path / "launcher.py"
    beside.write_text(processes.LAUNCHER.read_text())
    monkeypatch.setattr(processes, "LAUNCHER", beside)
    (tmp_path / "elsewhere").mkdir()

    async def main(started):
        server = Server(spec(tmp_path, environment={"PYTHONPATH": str(tmp_path / "elsewhere")}))
        with pytest.raises(EngineError, match="SGLang server 0 ended with exit code 1: its interpreter has no sglang"):
            await server.ready(await started(server))

    run(main)


@pytest.mark.parametrize(
    "mode, said",
    [
        ("cuda", "ended with exit code 1: its GPUs have too little memory: lower mem-fraction-static"),
        ("model", "ended with exit code 1: OSError: /models/none has no config.json"),
        ("flag", "rollout.server.arguments: unrecognized arguments: --no-such-flag"),
        ("port", "a port it needs is taken"),
        ("dies generating", "ended with exit code 3: its GPUs have too little memory"),
        ("stranger", "something other than the server that this run started .*'another'"),
    ],
)
def test_a_server_that_does_not_come_up(tmp_path, mode, said):
    async def main(started):
        server = Server(spec(tmp_path, mode, api_key=KEY))
        with pytest.raises(EngineError, match=said) as raised:
            await server.ready(await started(server, KEY))
        assert KEY not in str(raised.value)
        return str(raised.value)

    message = run(main)
    assert mode == "stranger" or f"the end of {tmp_path}/logs/sglang_0.log:\n" in message


@pytest.mark.parametrize("mode", ["slow", "never generates"])
def test_a_server_that_takes_too_long(tmp_path, mode):
    async def main(started):
        server = Server(spec(tmp_path, mode, start_seconds=1.5))
        with pytest.raises(EngineError, match=r"did not answer its first request within .*start_seconds=1.5"):
            await server.ready(await started(server))
        assert server.alive()

    run(main)


def test_a_server_with_another_key_is_a_stranger(tmp_path):
    async def main(started):
        server = Server(spec(tmp_path, api_key=KEY))
        with pytest.raises(EngineError, match="something other than .* 401"):
            await server.ready(await started(server, "wrong"))

    run(main)


def test_a_taken_port_is_told_at_once(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EngineError, match=f"SGLang server 0 cannot listen on 127.0.0.1, port {port} .*in use"):
            Server(spec(tmp_path, port=port)).start()
    with pytest.raises(ConfigError, match="rollout.server.port: 70000"):
        Server(spec(tmp_path, port=70000)).start()


def test_ports_are_held_for_one_server_alone(tmp_path):
    several = [Server(spec(tmp_path)) for _ in range(4)]
    try:
        taken = [port for server in several for port in (*server.hold_ports(1), server.port)]
        assert len(set(taken)) == 8
        with socket.socket() as other, pytest.raises(OSError):
            other.bind(("127.0.0.1", several[0].port))
    finally:
        for server in several:
            server.close()
    with socket.socket() as other:
        other.bind(("127.0.0.1", taken[-1]))


def test_an_interpreter_that_cannot_be_run(tmp_path):
    server = Server(spec(tmp_path, python="/no/such/python"))
    with pytest.raises(ConfigError, match="rollout.server.python=/no/such/python cannot be run"):
        server.start()
    server.close()


def test_addresses(tmp_path):
    for host, shown in (("127.0.0.1", "127.0.0.1"), ("0.0.0.0", processes.own_address())):
        server = Server(spec(tmp_path, host=host))
        server.hold_ports(0)
        assert server.address == f"http://{shown}:{server.port}"
        server.close()


@pytest.mark.parametrize("how", ["stop", "kill", "leader dies"])
def test_the_whole_process_group_ends(tmp_path, monkeypatch, how):
    """The stand-in and its child both ignore SIGTERM."""
    monkeypatch.setattr(processes, "TERMINATE_SECONDS", 0.5)

    async def main(started):
        server = Server(spec(tmp_path, "stubborn"))
        await server.ready(await started(server))
        child = int(re.search(r"child=(\d+)", server.end_of_log())[1])
        pid = server.pid
        assert not gone(child)
        if how == "stop":
            await server.stop()
        elif how == "kill":
            server.kill()
        else:
            os.kill(pid, signal.SIGKILL)
            assert until(lambda: not server.alive())
            assert "was killed by SIGKILL" in str(server.death())
        assert not server.alive() and until(lambda: gone(pid)) and until(lambda: gone(child))

    run(main)


def test_a_server_dies_with_the_process_that_started_it(tmp_path):
    owner = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from pathlib import Path; from megatron_policysplit.serving.servers import Server\n"
            "from tests.support.servers import spec\n"
            "server = Server(spec(Path(sys.argv[1]))); server.start(); print(server.pid, flush=True); time.sleep(600)",
            str(tmp_path),
        ],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    pid = int(owner.stdout.readline())
    assert not gone(pid)
    owner.kill()
    owner.wait()
    assert until(lambda: gone(pid))


def test_a_launcher_whose_parent_is_gone_ends_at_once(tmp_path):
    made = subprocess.run(
        [sys.executable, str(processes.LAUNCHER), "sglang.launch_server", "--weight-version", "x"],
        env={**os.environ, "PYTHONPATH": str(FAKE), "POLICYSPLIT_PARENT": str(os.getpid() + 100000)},
        capture_output=True,
        timeout=60,
    )
    assert made.returncode == 1 and made.stdout == made.stderr == b""


# The router


def a_router(tmp_path, monkeypatch, key=None):
    monkeypatch.setenv("PYTHONPATH", str(FAKE))
    return Router(sys.executable, "127.0.0.1", 0, key, tmp_path / "router.log", request_seconds=90.5)


def test_router_takes_and_drops_servers(tmp_path, monkeypatch):
    async def main(started):
        ours = a_router(tmp_path, monkeypatch, KEY)
        await started(ours, KEY)
        await ours.ready()
        assert await ours.workers() == {}
        assert KEY not in Path(f"/proc/{ours.pid}/cmdline").read_text()
        await asyncio.gather(ours.add("http://127.0.0.1:1"), ours.add("http://127.0.0.1:2"))
        assert await ours.workers() == {"http://127.0.0.1:1": True, "http://127.0.0.1:2": True}
        await ours.add("http://127.0.0.1:1")
        await ours.remove("http://127.0.0.1:1")
        await ours.remove("http://127.0.0.1:3")
        assert await ours.workers() == {"http://127.0.0.1:2": True}
        address = ours.address
        ours.kill()
        ours.start()
        await ours.ready()
        assert ours.address == address and await ours.workers() == {}
        await ours.stop()
        assert not ours.alive()

    run(main)


def test_router_judges_nothing_itself(tmp_path, monkeypatch):
    ours = a_router(tmp_path, monkeypatch)
    (metrics,) = ours.hold_ports(1)
    words = ours.command(metrics)
    ours.close()
    assert {"--disable-retries", "--disable-circuit-breaker", "--disable-health-check"} <= set(words)
    assert int(after(words, "--request-timeout-secs")) > 90 and after(words, "--policy") == "manual"
    assert after(words, "--prometheus-port") == str(metrics) != after(words, "--port")


def test_router_that_does_not_come_up(tmp_path, monkeypatch):
    async def main(started):
        ours = a_router(tmp_path, monkeypatch)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        await started(ours)
        with pytest.raises(EngineError, match="sglang-router ended with exit code 1: .* has no sglang_router"):
            await ours.ready()

    run(main)


def test_router_that_does_not_take_a_server_up(tmp_path, monkeypatch):
    monkeypatch.setattr(router, "CHANGE_SECONDS", 0.1)

    async def main(started):
        ours = a_router(tmp_path, monkeypatch)
        await started(ours)
        await ours.ready()
        with pytest.raises(EngineError, match="did not take up http://127.0.0.1:1 within 0.1 s"):
            await ours.add("http://127.0.0.1:1")

    run(main)


# policysplit serve


def a_config(tmp_path, mode=""):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "qwen3"}')
    path = tmp_path / "config.yaml"
    path.write_text(
        f"model: {{path: {tmp_path}/model}}\n"
        "data: {path: none.jsonl}\nreward: {function: exact}\n"
        f"run: {{dir: {tmp_path}/run}}\n"
        "rollout:\n  engine: sglang\n  server:\n    count: 2\n    restarts: 1\n"
        f"    environment: {{PYTHONPATH: {FAKE}, FAKE: {mode}}}\n"
    )
    return path


def serving(path):
    code = (
        "import sys; from megatron_policysplit.serving.serve import serve; "
        "from megatron_policysplit.config.load import load_config; "
        "from megatron_policysplit.errors import UserError\n"
        "try: sys.exit(serve(load_config(sys.argv[1], [])))\nexcept UserError as error: sys.exit(str(error))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def test_serve_until_told_to_stop(tmp_path):
    process = serving(a_config(tmp_path))
    try:
        addresses = {process.stdout.readline().strip() for _ in range(2)}
        assert len(addresses) == 2 and all(re.fullmatch(r"http://127\.0\.0\.1:\d+", a) for a in addresses)
        before = psutil.Process(process.pid).children()
        before[0].kill()
        assert until(lambda: len(set(psutil.Process(process.pid).children()) - set(before)) == 1)
        for line in process.stderr:
            if "is back at" in line:
                break
        ours = psutil.Process(process.pid).children()
        process.terminate()
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0 and output == "" and "stopping" in errors
        assert all(until(lambda pid=child.pid: gone(pid)) for child in ours)
        logs = sorted(path.name for path in (tmp_path / "run" / "logs").iterdir())
        assert [name[-6:] for name in logs] == ["_0.log", "_1.log"]
    finally:
        process.kill()
        process.communicate()


def test_serve_ends_when_a_server_does_not_come_up(tmp_path):
    process = serving(a_config(tmp_path, "cuda"))
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and output == ""
    assert "its GPUs have too little memory" in errors and "starting it again" in errors


def test_import_is_light():
    code = "import sys, megatron_policysplit.serving.router, megatron_policysplit.serving.servers; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout.split()
    assert servers.__name__ in loaded and not {"torch", "transformers", "megatron"} & set(loaded)
