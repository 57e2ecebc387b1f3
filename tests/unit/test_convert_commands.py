"""`policysplit convert` and `python -m checkpoints_conv`, as users run them."""

import os
import subprocess
import sys

import pytest
import typer

from checkpoints_conv.progress import bar, token_bar
from megatron_policysplit.cli.convert_options import parse_size
from tests.support.commands import run_module
from tests.support.conversion import assert_same_model, make_tree, tensors_of
from tests.support.fp8 import WHOLE_BLOCKS
from tests.support.hf_models import make_model

POLICYSPLIT = ("-m", "megatron_policysplit.cli", "convert")
MODULE = ("-m", "checkpoints_conv")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return make_tree(make_model(root / "hf", "qwen3_moe", tied=False, num_hidden_layers=2))


def start(*arguments, program=MODULE, code=0, **environment):
    """Run a command as a user starts it, which must end with `code`; its stdout, or its stderr if `code` is not 0."""
    command = [sys.executable, "-W", "ignore", *program, *map(str, arguments)]
    return printed(subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}), code)


def run(*arguments, program=MODULE, code=0, **environment):
    """The same, sooner."""
    _, module, *first = program
    return printed(run_module(module, [*first, *map(str, arguments)], {**os.environ, **environment}), code)


def printed(done, code):
    """Without the progress bar, which a terminal alone is shown."""
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def test_the_whole_way(original, tmp_path):
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    to_megatron = start("hf-to-megatron", "--hf", original, "--out", megatron, program=POLICYSPLIT)
    assert to_megatron == f"wrote {megatron}\n"
    equal = start("verify", "--hf", original, "--megatron", megatron)
    assert equal == f"{len(tensors_of(original))} tensors are equal\n"
    assert "Megatron-Core torch_dist, 1 file" in run("inspect", megatron)
    size = ("--max-shard-size", "60KB")
    assert run("megatron-to-hf", "--megatron", megatron, "--out", back, *size) == f"wrote {back}\n"
    assert_same_model(original, back)
    assert len(list(back.glob("*.safetensors"))) > 3
    again = run("megatron-to-hf", "--megatron", megatron, "--out", back, code=2)
    assert again == f"error: --out {back} exists and is not an empty directory; choose another path or remove it\n"
    rounded = run("hf-to-megatron", "--hf", original, "--out", tmp_path / "x", "--dtype", "bfloat16", code=2)
    assert rounded.startswith("error: --dtype bfloat16 would round tensor") and rounded.count("\n") == 1
    refused = run("inspect", tmp_path, code=2)
    assert refused.startswith("error: ") and refused.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"megatron", "back"}


def test_verify_with_logits(original, tmp_path):
    from checkpoints_conv.hf_to_megatron import hf_to_megatron

    megatron = tmp_path / "megatron"
    hf_to_megatron(original, megatron)
    lines = run("verify", "--hf", original, "--megatron", megatron, "--logits").splitlines()
    assert lines[1].startswith("logits differ by ")
    assert float(lines[1].split()[3]) < 1e-4


def test_quantize(original, tmp_path):
    out = tmp_path / "out"
    refused = run("quantize", "--hf", original, "--out", out, "--format", "fp8-block", program=POLICYSPLIT, code=2)
    assert refused.startswith("error: --format fp8-block cuts matrices") and refused.count("\n") == 1
    refused = run("quantize", "--hf", original, "--out", out, "--format", "fp8", code=2)
    assert refused.startswith("error: --format fp8 needs --calibration FILE") and refused.count("\n") == 1
    assert "'fp8', 'fp8-block'" in run("quantize", "--hf", original, "--out", out, "--format", "int8", code=2)
    fitting = make_model(tmp_path / "fitting", "llama", tied=True, num_hidden_layers=1, **WHOLE_BLOCKS)
    written = run("quantize", "--hf", fitting, "--out", out, "--format", "fp8-block", "--max-shard-size", "60KB")
    assert written.splitlines()[-1] == "SGLang can serve it with --tp-size 1"
    assert "fp8-block (FP8, a scale for each" in run("inspect", out)
    assert len(list(out.glob("*.safetensors"))) > 3


def test_bars_name_their_unit(capfd):
    for shown, unit in ((bar, "2.0/3.0 kB"), (token_bar, "2,000/3,000 tokens")):
        with shown(3000) as advance:
            advance(2000)
        assert unit in capfd.readouterr().err


def test_sizes():
    assert [parse_size(text) for text in ("5GB", "1.5MB", "2GiB", "100", "7 kb")] == [5e9, 1.5e6, 2**31, 100, 7e3]
    for text in ("", "5TB", "-1GB", "0", "GB"):
        with pytest.raises(typer.BadParameter, match="write 5GB, 500MB or 2GiB"):
            parse_size(text)


PEAK = """
import sys, threading
import torch, torch.distributed.checkpoint, safetensors.torch
from checkpoints_conv.hf_to_megatron import hf_to_megatron
from checkpoints_conv.megatron_to_hf import megatron_to_hf
import checkpoints_conv.torch_dist

def anonymous():
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("RssAnon")).split()[1]) * 1024

torch.empty(2**20).fill_(1)
before, peak, done = anonymous(), [0], threading.Event()

def watch():
    while not done.wait(0.001):
        peak[0] = max(peak[0], anonymous())

thread = threading.Thread(target=watch)
thread.start()
{"there": hf_to_megatron, "back": megatron_to_hf}[sys.argv[1]](sys.argv[2], sys.argv[3])
done.set()
thread.join()
print(peak[0] - before)
"""


LARGE = {
    "qwen3": {"vocab": 3072, "hidden_size": 512, "intermediate_size": 3072, "num_hidden_layers": 10, "head_dim": 64},
    "qwen3_moe": {
        "vocab": 512,
        "hidden_size": 512,
        "moe_intermediate_size": 256,
        "num_hidden_layers": 2,
        "head_dim": 64,
        "num_experts": 32,
    },
}


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
@pytest.mark.parametrize(("family", "sizes"), LARGE.items(), ids=list(LARGE))
def test_memory_is_that_of_a_few_tensors(tmp_path, family, sizes):
    """A model of 30 times its largest tensor, in one file; what is sampled is anonymous memory above the imports.

    The experts of one layer alone are more than what may be held.
    """
    original = make_model(tmp_path / "hf", family, tied=False, **sizes)
    tensors = tensors_of(original)
    largest = max(tensor.nbytes for tensor in tensors.values())
    assert sum(tensor.nbytes for tensor in tensors.values()) > 30 * largest
    places = {"there": (original, tmp_path / "megatron"), "back": (tmp_path / "megatron", tmp_path / "back")}
    for direction, (source, target) in places.items():
        command = [sys.executable, "-c", PEAK, direction, str(source), str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert int(done.stdout) < 2 * largest + 30 * 10**6, direction
    assert_same_model(original, tmp_path / "back")


TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--no-python", sys.executable, *MODULE)


def test_torchrun_shares_the_work(original, tmp_path):
    out = start("hf-to-megatron", "--hf", original, "--out", tmp_path / "megatron", program=TORCHRUN)
    assert out == f"wrote {tmp_path / 'megatron'}\n"
    assert len(list((tmp_path / "megatron").glob("*.distcp"))) == 2
    assert "2 files" in run("inspect", tmp_path / "megatron")


ABORTS = """
import atexit, os
if "RANK" in os.environ:
    atexit.register(os.abort)
"""


def test_ranks_end_without_finalization(original, tmp_path):
    """gloo's threads still run when a command is over; where Python finalizes beside them, they may end the process."""
    (tmp_path / "sitecustomize.py").write_text(ABORTS)
    out = start(
        "hf-to-megatron", "--hf", original, "--out", tmp_path / "there", program=TORCHRUN, PYTHONPATH=str(tmp_path)
    )
    assert out == f"wrote {tmp_path / 'there'}\n"
    again = ("hf-to-megatron", "--hf", original, "--out", tmp_path / "there")
    refused = start(*again, program=TORCHRUN, code=1, PYTHONPATH=str(tmp_path))  # 1: torchrun's own
    assert refused.count("error: --out ") == 1 and "exitcode  : 2" in refused


def test_commands_of_one_process_are_refused_under_torchrun(original, tmp_path):
    started = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    refused = run("verify", "--hf", original, "--megatron", tmp_path, code=2, **started)
    assert refused == (
        "error: verify runs as one process, but this is rank 0 of 2 (RANK and WORLD_SIZE, or SLURM_PROCID and "
        "SLURM_NTASKS); start it without torchrun or srun, or unset them if they are left over\n"
    )
