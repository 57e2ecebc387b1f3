"""Times checkpoint conversion beside `cp` of the same bytes and beside mbridge, with peak memory.

    python -m benchmarks.convert [--size-gb 3] [--repeats 3] [--directory DIR] [--output FILE.json]

A random bf16 model of Qwen3's shape (hidden size 2048, tied head; more layers for more bytes) is
converted to Megatron-Core and back, each time in a process of its own, in turns with `cp` and with
mbridge on the same files. Time counts from after the imports until what was written is on the disk
(fsync). Before they are read, files are dropped from the system's cache as far as it allows.
mbridge converts through a model: towards Megatron-Core it builds one, loads the weights, and saves
with dist_checkpointing; back it builds one, loads the checkpoint, and saves its weights. Memory is
the peak of the process's anonymous memory above what it had after the imports. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from math import prod
from pathlib import Path

SAMPLE_SECONDS = 0.002
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
VOCABULARY, FULL_SIZE_BYTES = 151936, 3 * 10**9


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        result = _measure(Path(directory), arguments.size_gb, arguments.repeats)
    for name, timing in result["timings"].items():
        seconds, memory = timing["seconds"], timing.get("peak_anonymous_bytes")
        peak = "" if memory is None else f", {memory / 1e6:.0f} MB of memory"
        span = f"({seconds['lowest']:.2f} to {seconds['highest']:.2f})"
        rate = timing["bytes_per_second"] / 1e6
        print(f"{name:24s} {seconds['median']:.2f} s {span}, {rate:.0f} MB/s{peak}")
    limit = 2 * result["largest_tensor_bytes"] + 200e6
    print(
        f"largest tensor {result['largest_tensor_bytes'] / 1e6:.0f} MB; twice that and 200 MB is "
        f"{limit / 1e6:.0f} MB"
    )
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size-gb", type=float, default=3.0, help="bytes of the model, in 10^9")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--directory",
        type=Path,
        help="on the disk to be measured; default: the system's for temporary",
    )
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def make_model(path: Path, size_gb: float) -> dict[str, int]:
    """Make a Hugging Face directory of random weights.

    Returns the bytes of all weights and those of the largest tensor.
    """
    import torch

    from checkpoints_conv.architectures import find_architecture
    from checkpoints_conv.writer import HfFiles, Planned, write_config

    target_bytes = size_gb * 1e9
    # A small model gets a small vocabulary, or the embedding would be all of it.
    vocabulary = max(256, int(VOCABULARY * min(1.0, target_bytes / FULL_SIZE_BYTES)))
    config = {**CONFIG, "vocab_size": vocabulary}
    smallest = sum(_nbytes({**config, "num_hidden_layers": 1}).values())
    layer = sum(_nbytes({**config, "num_hidden_layers": 2}).values()) - smallest
    config["num_hidden_layers"] = 1 + max(0, round((target_bytes - smallest) / layer))
    path.mkdir()
    shapes = find_architecture(config).hf_tensors(config)
    files = HfFiles(
        path, {name: Planned(shape, "bfloat16") for name, shape in shapes.items()}, 2 * 10**9
    )
    files.create()
    for name, shape in shapes.items():
        files.write(name, torch.randn(shape, dtype=torch.bfloat16))
    files.check_complete()
    files.close()
    write_config(path, config, None)
    sizes = _nbytes(config)
    return {"bytes": sum(sizes.values()), "largest_tensor_bytes": max(sizes.values())}


def _nbytes(config: dict) -> dict[str, int]:
    """Bytes of each tensor in bf16."""
    from checkpoints_conv.architectures import find_architecture

    return {
        name: 2 * prod(shape)
        for name, shape in find_architecture(config).hf_tensors(config).items()
    }


def _measure(directory: Path, size_gb: float, repeats: int) -> dict:
    """Run every way `repeats` times in turns, so that a busy machine slows all alike."""
    hf, megatron = directory / "hf", directory / "megatron"
    sizes = make_model(hf, size_gb)
    # What the conversions to Hugging Face read; not timed.
    _in_process(to_megatron, hf, megatron)
    ways: dict[str, tuple[Callable | None, Path]] = {
        "cp": (None, hf),
        "to Megatron-Core": (to_megatron, hf),
        "mbridge, to Megatron-Core": (mbridge_to_megatron, hf),
        "to Hugging Face": (to_hugging_face, megatron),
        "mbridge, to Hugging Face": (mbridge_to_hugging_face, megatron),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    memory: dict[str, list[int]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, (way, source) in ways.items():
            target = directory / "target"
            _forget(source)
            if way is None:
                seconds[name].append(_copy(source, target))
            else:
                took, peak = _in_process(way, source, target, hf)
                seconds[name].append(took)
                memory[name].append(peak)
            shutil.rmtree(target)
    return {
        **sizes,
        "repeats": repeats,
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "versions": {
            name: version(name) for name in ("torch", "megatron-core", "mbridge", "safetensors")
        },
        "timings": {
            name: {
                "seconds": {"median": statistics.median(s), "lowest": min(s), "highest": max(s)},
                "bytes_per_second": sizes["bytes"] / statistics.median(s),
            }
            | ({"peak_anonymous_bytes": max(memory[name])} if memory[name] else {})
            for name, s in seconds.items()
        },
    }


# The ways, each in a process of its own: `start` is called after the imports.


def to_megatron(start: Callable, source: Path, target: Path, hf: Path | None = None) -> None:
    import torch.distributed.checkpoint  # noqa: F401

    import checkpoints_conv.torch_dist  # noqa: F401
    from checkpoints_conv.hf_to_megatron import hf_to_megatron

    start()
    hf_to_megatron(source, target)


def to_hugging_face(start: Callable, source: Path, target: Path, hf: Path) -> None:
    import torch.distributed.checkpoint  # noqa: F401

    import checkpoints_conv.torch_dist  # noqa: F401
    from checkpoints_conv.megatron_to_hf import megatron_to_hf

    start()
    megatron_to_hf(source, target, max_shard_bytes=2 * 10**9)


def mbridge_to_megatron(start: Callable, source: Path, target: Path, hf: Path) -> None:
    bridge, build = _mbridge(hf)
    from megatron.core import dist_checkpointing

    start()
    model = build()
    bridge.load_weights([model], str(source))
    target.mkdir()
    dist_checkpointing.save({"model": model.sharded_state_dict()}, str(target))
    _sync(target)


def mbridge_to_hugging_face(start: Callable, source: Path, target: Path, hf: Path) -> None:
    bridge, build = _mbridge(hf)
    from megatron.core import dist_checkpointing

    start()
    model = build()
    model.load_state_dict(
        dist_checkpointing.load({"model": model.sharded_state_dict()}, str(source))["model"]
    )
    # It writes the same files, with the same tensors in each, as the model it would have read.
    bridge.safetensor_io = bridge._get_safetensor_io(str(hf))
    bridge.save_weights([model], str(target))
    _sync(target)


def _mbridge(hf: Path):
    """Make mbridge for the model in `hf`, and a function that builds the Megatron-Core model.

    Without a GPU the model has Megatron-Core's own layers. mbridge knows only the names of
    Transformer Engine's layers, so it is given a table that translates the names.
    """
    import torch
    from mbridge import AutoBridge

    from checkpoints_conv import read_hf_config
    from checkpoints_conv.architectures import find_architecture
    from megatron_policysplit.actor import parallel
    from megatron_policysplit.actor.model import build_model
    from megatron_policysplit.config import ParallelConfig
    from megatron_policysplit.distributed.device import training_device

    parallel.initialize(ParallelConfig(), seed=0)
    bridge = AutoBridge.from_pretrained(str(hf))
    config = read_hf_config(hf)
    table = find_architecture(config).by_megatron_name(config)
    bridge._weight_name_mapping_mcore_local_to_global = lambda model, consider_ep=True: {
        name: table[name].megatron[-1] if name in table else name for name in model.state_dict()
    }
    return bridge, lambda: build_model(config, dtype=torch.bfloat16).to(training_device())


def _in_process(way: Callable, *paths: Path) -> tuple[float, int]:
    """Run `way` in a fresh process; its seconds and peak anonymous bytes."""
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    process = context.Process(target=_child, args=(way, paths, answers))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise SystemExit(
            f"{way.__name__} ended with exit code {process.exitcode}; its messages are above"
        )
    return answers.get()


def _child(way: Callable, paths: tuple[Path, ...], answers) -> None:
    """Run `way` in this process and put its seconds and peak anonymous bytes into `answers`."""
    began, before, peak, done = 0.0, 0, 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(SAMPLE_SECONDS):
            peak = max(peak, _anonymous_bytes())

    thread = threading.Thread(target=watch, daemon=True)

    def start() -> None:
        nonlocal began, before, peak
        before = peak = _anonymous_bytes()
        thread.start()
        began = time.perf_counter()

    way(start, *paths)
    took = time.perf_counter() - began
    done.set()
    thread.join()
    answers.put((took, peak - before))


def _anonymous_bytes() -> int:
    """This process's memory that is no file's: tensors count, pages of mapped files do not."""
    with open("/proc/self/status", encoding="ascii") as status:
        return int(next(line for line in status if line.startswith("RssAnon")).split()[1]) * 1024


def _copy(source: Path, target: Path) -> float:
    began = time.perf_counter()
    subprocess.run(
        ["cp", "-r", "--reflink=never", "--sparse=never", str(source), str(target)], check=True
    )
    _sync(target)
    return time.perf_counter() - began


def _sync(directory: Path) -> None:
    for file in directory.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())


def _forget(directory: Path) -> None:
    """Ask the system to drop the files from its cache, so that they are read from the disk."""
    _sync(directory)  # pages that are not written yet cannot be dropped
    for file in directory.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
