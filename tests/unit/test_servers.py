"""SGLang's processes: what they are started with, how they end, and what is said when they do not come up."""

import asyncio
import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_policysplit.actor import cpu
from megatron_policysplit.config import Config
from megatron_policysplit.errors import ConfigError, EngineError
from megatron_policysplit.rollout import processes, router, servers
from megatron_policysplit.rollout.processes import flags, inherited_environment, read_api_key
from megatron_policysplit.rollout.router import Router
from megatron_policysplit.rollout.servers import Server, ServerSpec, server_command, server_environment, server_spec
from megatron_policysplit.rollout.sglang_http import SglangClient

ROOT = Path(__file__).resolve().parents[2]
FAKE = ROOT / "tests" / "support" / "fake_sglang"
KEY = "sk-'quoted'-0123"


def spec(tmp_path, mode="", **changes):
    """A server of the stand-in package, in our own interpreter."""
    made = ServerSpec(
        index=0,
        python=sys.executable,
        model="/models/none",
        dtype="float32",
        tensor=1,
        host="127.0.0.1",
        port=0,
        seed=3,
        log=tmp_path / "logs" / "sglang_0.log",
        start_seconds=20.0,
        environment={"PYTHONPATH": str(FAKE), "FAKE": mode},
    )
    return dataclasses.replace(made, **changes)


def until(condition, seconds=20.0):
    """Whether a condition comes true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.fixture
def run():
    """Runs a coroutine about servers, which are ended afterwards."""
    ours = []

    def run(make, *arguments):
        async def whole():
            clients = []

            async def started(which, api_key=None):
                ours.append(which)
                which.start()
                clients.append(SglangClient(which.address, api_key, timeout_seconds=5.0))
                return clients[-1]

            try:
                return await make(started, *arguments)
            finally:
                for client in clients:
                    await client.close()
                for process in ours:
                    process.kill()
                    await process.stop()

        return asyncio.run(whole())

    return run


# The command and the environment


def after(words, flag):
    return words[words.index(flag) + 1]


def test_command_of_a_machine_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "active", lambda: True)
    words = server_command(spec(tmp_path, tensor=2, colocated=True), 30001, 30002, "start-1", 7)
    assert after(words, "--model-path") == "/models/none" and after(words, "--dtype") == "float32"
    assert after(words, "--port") == "30001" and after(words, "--nccl-port") == "30002"
    assert after(words, "--tp-size") == "2" and after(words, "--random-seed") == "7"
    assert after(words, "--weight-version") == "start-1"
    assert after(words, "--device") == "cpu" and after(words, "--attention-backend") == "torch_native"
    assert "--skip-server-warmup" in words and "--sleep-on-idle" in words
    assert "--enable-memory-saver" not in words, "its package needs CUDA"
    assert "--trust-remote-code" not in words


def test_command_of_a_machine_with_gpus(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "active", lambda: False)
    apart = server_command(spec(tmp_path), 1, 2, "v", 0)
    assert "--device" not in apart and "--enable-memory-saver" not in apart
    assert "--enable-memory-saver" in server_command(spec(tmp_path, colocated=True), 1, 2, "v", 0)
    asked = server_command(spec(tmp_path, arguments={"device": "cpu"}), 1, 2, "v", 0)
    assert after(asked, "--device") == "cpu" and "--sleep-on-idle" in asked


def test_what_the_user_gives_wins(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "active", lambda: True)
    given = {"max-total-tokens": 99, "skip-server-warmup": False, "sleep-on-idle": None, "device": "cuda"}
    words = server_command(spec(tmp_path, arguments=given), 1, 2, "v", 0)
    assert after(words, "--max-total-tokens") == "99" and words.count("--max-total-tokens") == 1
    assert after(words, "--device") == "cuda" and "--attention-backend" not in words
    assert "--skip-server-warmup" not in words and "--sleep-on-idle" not in words


def test_flags():
    given = {"a": True, "b": False, "c": None, "d": [1, "two"], "e": {"k": [1]}, "f": 0, "g": [], "h": 0.5}
    assert flags(given) == ["--a", "--d", "1", "two", "--e", '{"k": [1]}', "--f", "0", "--h", "0.5"]


def test_environment_without_what_is_the_actors(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "active", lambda: True)
    ours = {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "ROLE_NAME": "default",
        "MASTER_ADDR": "x",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "PYTHONPATH": "/ours",
        "PATH": "/bin",
        "HOME": "/root",
        "NAME": "kept",
        "HF_HUB_OFFLINE": "0",
    }
    wanted = {"PYTHONPATH": None, "OMP_WAIT_POLICY": "ACTIVE", "FLAG": True, "NUMBER": 3, "HOME": None}
    made = server_environment(spec(tmp_path, environment=wanted, devices=("4", "5")), ours)
    assert made == {
        "PATH": f"{Path(sys.executable).parent}:/bin",
        "NAME": "kept",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "4,5",
        "SGLANG_USE_CPU_ENGINE": "1",
        "OMP_WAIT_POLICY": "ACTIVE",
        "FLAG": "1",
        "NUMBER": "3",
    }
    assert inherited_environment({"PYTHONPATH": "/ours"}, sys.executable)["PYTHONPATH"] == "/ours"
    assert "PYTHONPATH" not in inherited_environment({"PYTHONPATH": "/ours"}, "/other/bin/python")


# From the configuration


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "active", lambda: True)
    config = Config()
    config.model.path, config.run.dir, config.run.seed = "/models/m", str(tmp_path / "run"), 5
    config.rollout.engine = "sglang"
    return config


def test_spec_of_the_configuration(config, monkeypatch):
    server = config.rollout.server
    server.python, server.port, server.arguments = "/sg/bin/python", 30000, {"--mem_fraction_static": 0.5}
    monkeypatch.setenv("ENGINE_KEY", KEY)
    config.rollout.api_key_variable = "ENGINE_KEY"
    made = server_spec(config, 2)
    assert (made.python, made.port, made.model, made.dtype, made.seed) == (
        "/sg/bin/python",
        30002,
        "/models/m",
        "bfloat16",
        7,
    )
    assert made.log == Path(config.run.dir) / "logs" / "sglang_2.log"
    assert made.arguments == {"mem-fraction-static": 0.5} and made.devices is None
    assert made.api_key == KEY and KEY not in repr(made)
    server.python, server.port, server.dtype = None, 0, "float32"
    made = server_spec(config, 1, name="other", seed=100)
    assert (made.python, made.port, made.dtype, made.seed) == (sys.executable, 0, "float32", 101)
    assert made.log.name == "other.log"


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"port": 1}, "rollout.server.port"),
        ({"tp_size": 2}, "rollout.server.tensor"),
        ({"--api-key": "x"}, "rollout.api_key_variable"),
        ({"weight-version": "1"}, "leave it out"),
        ({"a-b": 1, "a_b": 2}, "twice"),
    ],
)
def test_arguments_that_are_refused(config, arguments, said):
    config.rollout.server.arguments = arguments
    with pytest.raises(ConfigError, match=re.escape(said)):
        server_spec(config, 0)


def test_a_host_that_others_reach_needs_a_key(config, monkeypatch):
    config.rollout.server.host = "0.0.0.0"
    with pytest.raises(ConfigError, match="rollout.server.host=0.0.0.0 .*rollout.api_key_variable"):
        server_spec(config, 0)
    config.rollout.api_key_variable = "ENGINE_KEY"
    monkeypatch.setenv("ENGINE_KEY", KEY)
    assert server_spec(config, 0).host == "0.0.0.0"


@pytest.mark.parametrize("value, said", [(None, "not set"), ("", "empty"), ("two words", "blank"), ("é", "ASCII")])
def test_keys_that_cannot_be_sent(value, said):
    environ = {} if value is None else {"ENGINE_KEY": value}
    with pytest.raises(ConfigError, match=f"ENGINE_KEY.*{said}") as raised:
        read_api_key("ENGINE_KEY", environ)
    assert not value or value not in str(raised.value)


def test_devices(config, monkeypatch):
    monkeypatch.setattr(cpu, "gpu_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    server = config.rollout.server
    server.tensor, server.count = 2, 2
    assert [server_spec(config, index).devices for index in (0, 1)] == [("0", "1"), ("2", "3")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5, 6,GPU-7")
    assert server_spec(config, 1).devices == ("6", "GPU-7")
    server.devices = [3, 0, 1, 2]
    assert server_spec(config, 0).devices == ("GPU-7", "4")
    server.devices, server.count = [], 3
    with pytest.raises(ConfigError, match="rollout.server.count=3 .*GPU 5, but this machine shows 4"):
        server_spec(config, 2)
    config.rollout.colocated, server.count = True, None
    assert server_spec(config, 7, local_gpus=[2, 3]).devices == ("6", "GPU-7")


def test_devices_without_a_gpu(config):
    assert server_spec(config, 0).devices is None
    config.rollout.server.devices = [0]
    with pytest.raises(ConfigError, match="shows no GPU"):
        server_spec(config, 0)


# Start and end


def test_start_until_the_first_token(tmp_path, run):
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


def test_what_our_own_package_holds_is_not_taken_for_sglang(tmp_path, run):
    """The launcher's directory holds a sglang.py, which must not hide the real package."""
    assert (processes.LAUNCHER.parent / "sglang.py").exists()
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
def test_a_server_that_does_not_come_up(tmp_path, run, mode, said):
    async def main(started):
        server = Server(spec(tmp_path, mode, api_key=KEY))
        with pytest.raises(EngineError, match=said) as raised:
            await server.ready(await started(server, KEY))
        assert KEY not in str(raised.value)
        return str(raised.value)

    message = run(main)
    assert mode == "stranger" or f"the end of {tmp_path}/logs/sglang_0.log:\n" in message


@pytest.mark.parametrize("mode", ["slow", "never generates"])
def test_a_server_that_takes_too_long(tmp_path, run, mode):
    async def main(started):
        server = Server(spec(tmp_path, mode, start_seconds=1.5))
        with pytest.raises(EngineError, match=r"did not answer its first request within .*start_seconds=1.5"):
            await server.ready(await started(server))
        assert server.alive()

    run(main)


def test_a_server_with_another_key_is_a_stranger(tmp_path, run):
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
def test_the_whole_process_group_ends(tmp_path, run, monkeypatch, how):
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
            "import sys, time; from pathlib import Path; sys.path.insert(0, 'tests/unit')\n"
            "from test_servers import Server, spec\n"
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


def test_router_takes_and_drops_servers(tmp_path, run, monkeypatch):
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
    assert int(after(words, "--request-timeout-secs")) > 90 and after(words, "--policy") == "cache_aware"
    assert after(words, "--prometheus-port") == str(metrics) != after(words, "--port")


def test_router_that_does_not_come_up(tmp_path, run, monkeypatch):
    async def main(started):
        ours = a_router(tmp_path, monkeypatch)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        await started(ours)
        with pytest.raises(EngineError, match="sglang-router ended with exit code 1: .* has no sglang_router"):
            await ours.ready()

    run(main)


def test_router_that_does_not_take_a_server_up(tmp_path, run, monkeypatch):
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
        "import sys; from megatron_policysplit.serve import serve; "
        "from megatron_policysplit.config_load import load_config; "
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
    code = "import sys, megatron_policysplit.rollout.router, megatron_policysplit.rollout.servers; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout.split()
    assert servers.__name__ in loaded and not {"torch", "transformers", "megatron"} & set(loaded)
