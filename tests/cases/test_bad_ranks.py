"""Variables that another launcher left, ranks that never come, and directories that are nearly the right ones."""

import http.server
import json
import shutil
import signal
import socketserver
import threading
import time

import pytest

from tests.support.dist import free_port

GROUP = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}


def edit(file, **changes):
    """Change keys of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_rank_alone_is_refused(work):
    """A run would train without config.yaml, and go on later under another learning rate."""
    error = work.refused("train", "base.yaml", RANK="3")
    assert error.startswith(
        "error: RANK=3 is set but WORLD_SIZE is not; set it if this process is one of several ranks"
    )
    assert "`unset RANK LOCAL_RANK WORLD_SIZE " in error and not (work / "runs").exists()
    assert work.refused("report", "nodir", RANK="1", LOCAL_RANK="1").startswith("error: ")
    left_over = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    assert work.refused("report", "nodir", **left_over).startswith("error: ")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"RANK": "5", "WORLD_SIZE": "1", "MASTER_PORT": "1"},
            "RANK=5 is not a whole number from 0 to 0 (of WORLD_SIZE=1)",
        ),
        ({"RANK": "", "WORLD_SIZE": ""}, "RANK= and WORLD_SIZE= are set but MASTER_PORT is not"),
        ({"RANK": "0", "WORLD_SIZE": "abc", "MASTER_PORT": "1"}, "WORLD_SIZE=abc is not a whole number of at least 1"),
        ({"RANK": "x", "WORLD_SIZE": "2", "MASTER_PORT": "1"}, "RANK=x is not a whole number from 0 to 1"),
    ],
)
def test_variables_that_are_no_numbers(work, variables, message):
    variables = {"MASTER_ADDR": "127.0.0.1"} | variables
    for command in (
        ("train", "base.yaml"),
        ("convert", "hf-to-megatron", "--hf", "model", "--out", "out"),
        ("convert", "verify", "--hf", "model", "--megatron", "out"),
    ):
        assert work.refused(*command, **variables).startswith(f"error: {message}")
    assert not (work / "runs").exists() and not (work / "out").exists()


def test_the_size_of_a_world_alone_is_nobodys(work):
    work.accepted("convert", "hf-to-megatron", "--hf", "model", "--out", "out", WORLD_SIZE="2")
    left_over = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    work.accepted("convert", "verify", "--hf", "model", "--megatron", "out", "--logits", **left_over)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    "command",
    [
        ("train", "base.yaml", "parallel.tensor=2"),
        ("convert", "hf-to-megatron", "--hf", "model", "--out", "out"),
    ],
)
def test_a_rank_whose_peer_never_comes_ends_at_a_signal(work, command, number):
    port = free_port()
    process = work.start(*command, **GROUP, MASTER_PORT=str(port))
    said = process.stderr.readline()
    while "waiting for" not in said and process.poll() is None:
        said = process.stderr.readline()
    assert said == f"waiting for rank 1 at 127.0.0.1:{port}; 1 of 2 has come\n"
    began = time.monotonic()
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (75, "")
    assert time.monotonic() - began < 10
    assert not (work / "out").exists()


def test_a_rank_whose_host_does_not_resolve_ends_at_a_signal(work):
    process = work.start(
        "train", "base.yaml", "parallel.tensor=2", **GROUP | {"MASTER_ADDR": "no.such.host"}, MASTER_PORT="1"
    )
    while "run " not in process.stdout.readline():
        pass
    time.sleep(4)  # inside the resolver, or after it
    process.terminate()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75 and "Traceback" not in stderr


def test_a_web_server_at_the_port(work):
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = str(server.server_address[1])
        ranks = [
            work.start(
                "convert", "hf-to-megatron", "--hf", "model", "--out", "out", **GROUP | {"RANK": rank}, MASTER_PORT=port
            )
            for rank in ("0", "1")
        ]
        errors = [rank.communicate(timeout=60)[1] for rank in ranks]
        server.shutdown()
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert errors[0].startswith(f"error: MASTER_PORT={port} is in use (EADDRINUSE) on this host, where ")
    assert errors[1].startswith(f"rank 1: error: what listens at 127.0.0.1:{port} is not rank 0 of this run; ")


def test_ranks_that_come_five_seconds_apart(work):
    port = str(free_port())
    command = ("convert", "hf-to-megatron", "--hf", "model", "--out", "out")
    late = work.start(*command, **GROUP | {"RANK": "1"}, MASTER_PORT=port)
    time.sleep(5)
    first = work.start(*command, **GROUP, MASTER_PORT=port)
    for process in (first, late):
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == 0, stderr
    work.accepted("convert", "verify", "--hf", "model", "--megatron", "out")


def test_directories_that_are_nearly_the_right_ones(work):
    work.accepted("train", "base.yaml", "run.dir=runs/mine")
    convert = ("convert", "megatron-to-hf", "--out", "out", "--megatron")
    meant = "give one of its checkpoints, such as runs/mine/checkpoints/step_000002"
    assert work.refused(*convert, "runs/mine") == f"error: runs/mine is a run; {meant}"
    assert work.refused(*convert, "runs/mine/checkpoints") == f"error: runs/mine/checkpoints holds checkpoints; {meant}"
    for override in ("model.megatron=runs/mine", "model.megatron=runs/mine/checkpoints"):
        assert work.refused("train", "base.yaml", "run.dir=runs/new", override).endswith(meant)
    model = "is missing; give runs/mine/hf, which is a Hugging Face model directory"
    for command in (
        ("generate", "--model", "runs/mine", "1+2"),
        ("eval", "--model", "runs/mine", "--data", "q.jsonl"),
        ("convert", "inspect", "runs/mine"),
        ("train", "base.yaml", "run.dir=runs/new", "model.path=runs/mine"),
    ):
        assert work.refused(*command) == f"error: runs/mine/config.json {model}"


def test_a_config_that_transformers_cannot_load(work):
    nested = {"full_attention": {"rope_type": "default", "rope_theta": 1000000.0}}
    convert = ("convert", "hf-to-megatron", "--hf", "m", "--out", "out")
    for key, value, message in (
        ("tie_word_embeddings", None, "config.json: tie_word_embeddings=null is neither true nor false; write which"),
        ("text_config", {"hidden_size": 64}, "config.json has a `text_config` beside the keys of Qwen3ForCausalLM"),
        ("rope_parameters", nested, "config.json: rope_parameters.full_attention holds rotary embeddings of a kind of"),
    ):
        shutil.rmtree(work / "m", ignore_errors=True)
        edit(work.copy_model("m") / "config.json", **{key: value})
        assert work.refused(*convert).startswith(f"error: {message}")
        assert work.refused("train", "base.yaml", "model.path=m").startswith(f"error: {message}")
    assert work.refused("generate", "--model", "m", "1+2").startswith(f"error: cannot load the model in m: {message}")
    # What the conversion takes and transformers does not: null where older versions had a default.
    shutil.rmtree(work / "m")
    edit(work.copy_model("m") / "config.json", attention_bias=None)
    work.accepted(*convert)
    refused = work.refused("convert", "verify", "--hf", "m", "--megatron", "out", "--logits")
    assert refused.startswith("error: cannot load the model in m: ") and "'attention_bias' expected bool" in refused


def test_a_buffer_of_old_exports_in_double_precision(work):
    import torch
    from safetensors.torch import load_file, save_file

    file = work.copy_model("m") / "model.safetensors"
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8, dtype=torch.float64)}
    save_file(load_file(file) | buffer, file, metadata={"format": "pt"})
    work.accepted("convert", "hf-to-megatron", "--hf", "m", "--out", "out")
    work.accepted("convert", "verify", "--hf", "m", "--megatron", "out")
