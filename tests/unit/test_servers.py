"""SGLang servers: what they are started with, from the configuration to the command and the environment."""

import os
import re
import sys
from pathlib import Path

import pytest

from megatron_policysplit.config import Config
from megatron_policysplit.config.secrets import read_api_key
from megatron_policysplit.distributed import device
from megatron_policysplit.errors import ConfigError
from megatron_policysplit.serving.processes import flags, inherited_environment
from megatron_policysplit.serving.servers import server_command, server_environment, server_spec
from tests.support.servers import KEY, after, spec


def test_command_of_a_machine_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "gpu_count", lambda: 0)
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
    monkeypatch.setattr(device, "gpu_count", lambda: 1)
    apart = server_command(spec(tmp_path), 1, 2, "v", 0)
    assert "--device" not in apart and "--enable-memory-saver" not in apart
    assert "--enable-memory-saver" in server_command(spec(tmp_path, colocated=True), 1, 2, "v", 0)
    asked = server_command(spec(tmp_path, arguments={"device": "cpu"}), 1, 2, "v", 0)
    assert after(asked, "--device") == "cpu" and "--sleep-on-idle" in asked


def test_what_the_user_gives_wins(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "gpu_count", lambda: 0)
    given = {"max-total-tokens": 99, "skip-server-warmup": False, "sleep-on-idle": None, "device": "cuda"}
    words = server_command(spec(tmp_path, arguments=given), 1, 2, "v", 0)
    assert after(words, "--max-total-tokens") == "99" and words.count("--max-total-tokens") == 1
    assert after(words, "--device") == "cuda" and "--attention-backend" not in words
    assert "--skip-server-warmup" not in words and "--sleep-on-idle" not in words


def test_flags():
    given = {"a": True, "b": False, "c": None, "d": [1, "two"], "e": {"k": [1]}, "f": 0, "g": [], "h": 0.5}
    assert flags(given) == ["--a", "--d", "1", "two", "--e", '{"k": [1]}', "--f", "0", "--h", "0.5"]


def test_cores_of_the_ranks_of_a_server_on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "gpu_count", lambda: 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 2, 3})
    name = "SGLANG_CPU_OMP_THREADS_BIND"
    made = [server_environment(spec(tmp_path, tensor=tensor), {}).get(name) for tensor in (1, 2, 4)]
    assert made == [None, "0,3|2", "0|2|3|0"]


def test_environment_without_what_is_the_actors(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "gpu_count", lambda: 0)
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


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "gpu_count", lambda: 0)
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
    monkeypatch.setattr(device, "gpu_count", lambda: 4)
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
