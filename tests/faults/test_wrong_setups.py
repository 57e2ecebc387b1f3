"""Servers that cannot serve the run: one clear error with the remedy, a plain exit code and nothing left running."""

import json
import shutil
import socket

import pytest

from tests.support import e2e, hf_models
from tests.support.sglang import live_server, make_model
from tests.support.sglang_runs import TRANSPORTS, Tree

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600, func_only=True)]


def fails(config, directory, *overrides):
    """The one error of a run that cannot work."""
    running = e2e.start(config, directory, *overrides)
    tree = Tree.below(running.process.pid)
    assert running.finish(300) == 2, running.text()
    tree.assert_ended()
    errors = [line for line in running.errors if line.startswith("error: ")]  # the launcher may say which rank left
    assert len(errors) == 1 and "Traceback" not in running.text(), running.text()
    return errors[0]


def test_a_port_is_taken(config, tmp_path, round_number):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = fails(config, tmp_path / "run", f"rollout.server.port={port}", "rollout.server.count=1")
    assert f"port {port}" in error and "rollout.server.port" in error


def test_too_little_cache(config, tmp_path, round_number):
    """Found out by the first response that does not fit."""
    settings = ("rollout.server.count=1", "rollout.server.arguments.max-total-tokens=64")
    error = fails(config, tmp_path / "run", *settings)
    assert "max-total-tokens" in error and "rollout.max_response_tokens" in error


@pytest.fixture(scope="module")
def live(config, tmp_path_factory):
    with live_server(config.parent / "model", tmp_path_factory.mktemp("server") / "server.log") as live:
        yield live


def test_another_architecture(config, tmp_path, live, round_number):
    model = shutil.copytree(config.parent / "model", tmp_path / "model")
    hf_models.make_model(model, "llama", tied=True, vocab=32, eos_token_id=5, pad_token_id=0)
    error = fails(config, tmp_path / "run", f"model.path={model}", f"rollout.addresses=[{live.address}]")
    assert live.address in error and "of type qwen3" in error and "of type llama" in error


def test_another_tokenizer(config, tmp_path, live, round_number):
    """Of the same size: two digits have changed places."""
    model = shutil.copytree(config.parent / "model", tmp_path / "model")
    file = model / "tokenizer.json"
    written = json.loads(file.read_text())
    ids = written["model"]["vocab"]
    ids["1"], ids["2"] = ids["2"], ids["1"]
    file.write_text(json.dumps(written))
    error = fails(config, tmp_path / "run", f"model.path={model}", f"rollout.addresses=[{live.address}]")
    assert live.address in error and "tokenizer" in error


@pytest.fixture
def unreadable(live):
    """The server's model directory cannot be read from here, as on another machine."""
    live.start_again()
    hidden = live.model.rename(live.model.with_name("elsewhere"))
    yield
    hidden.rename(live.model)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_weights_of_another_shape(config, tmp_path, live, unreadable, transport, round_number):
    """SGLang dies of them, some seconds later."""
    model = make_model(tmp_path / "model", hidden_size=64)
    error = fails(
        config,
        tmp_path / "run",
        f"model.path={model}",
        f"rollout.addresses=[{live.address}]",
        f"weight_sync.transport={transport}",
    )
    assert live.address in error and "weights" in error
