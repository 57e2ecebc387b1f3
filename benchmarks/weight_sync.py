"""Times a weight sync by each transport, beside a read of the same bytes from memory and from disk.

    python -m benchmarks.weight_sync MODEL --python .venv-sglang/bin/python [--repeats 5]
                                     [--output FILE.json]

One trainer rank and one SGLang server on this machine, started here unless --address names one that
serves MODEL. A push is timed as a whole, from pause to the version read back; the first push of
each transport, which also sets up groups or shared memory, is reported apart. Everything is
measured in turns, so that a busy machine slows all alike. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from megatron_policysplit.config import Config

TRANSPORTS = ("tensor", "distributed", "disk")
BLOCK_BYTES = 2**24


def main() -> None:
    arguments = _arguments()
    with ExitStack() as resources:
        run_dir = Path(resources.enter_context(tempfile.TemporaryDirectory()))
        config = _config(arguments, run_dir)
        address = arguments.address or resources.enter_context(_server(config, arguments.python))
        result = _measure(config, address, arguments.transports, arguments.repeats, resources)
    for name, timing in result["timings"].items():
        median, low, high = (timing["seconds"][key] for key in ("median", "lowest", "highest"))
        rate = timing["bytes_per_second"] / 1e6
        first = f", the first {timing['first_seconds']:.3f} s" if "first_seconds" in timing else ""
        print(f"{name:12s} {median:.3f} s ({low:.3f} to {high:.3f}), {rate:.0f} MB/s{first}")
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a Hugging Face directory")
    parser.add_argument(
        "--address", help="of a server that runs already, such as http://127.0.0.1:30000"
    )
    parser.add_argument(
        "--python", default=sys.executable, help="interpreter of the environment that has SGLang"
    )
    parser.add_argument(
        "--port", type=int, default=0, help="of the server that is started; 0 takes a free one"
    )
    parser.add_argument("--transports", nargs="+", choices=TRANSPORTS, default=TRANSPORTS)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--bucket-mib", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def _config(arguments: argparse.Namespace, run_dir: Path) -> Config:
    config = Config()
    config.run.dir = str(run_dir)
    config.model.path, config.model.dtype = str(arguments.model), arguments.dtype
    config.rollout.engine = "sglang"
    config.rollout.server.port = arguments.port
    config.weight_sync.bucket_mib = arguments.bucket_mib
    return config


@contextmanager
def _server(config: Config, python: str) -> Iterator[str]:
    """The address of an SGLang server that runs inside the context."""
    from megatron_policysplit.rollout.sglang_http import SglangClient
    from megatron_policysplit.serving.servers import Server, server_spec

    config.rollout.server.python = python
    config.rollout.server.arguments = {"max-total-tokens": 8192}
    server = Server(server_spec(config, 0))

    async def ready() -> None:
        client = SglangClient(server.address)
        try:
            await server.ready(client)
        finally:
            await client.close()

    server.hold_ports(1)
    server.start()
    try:
        asyncio.run(ready())
        yield server.address
    finally:
        server.close()


def _measure(
    config: Config, address: str, transports: list[str], repeats: int, resources: ExitStack
) -> dict:
    """Time all reads and pushes in turns; the result is what is printed as JSON."""
    import torch

    from checkpoints_conv import read_hf_config, write_hf
    from megatron_policysplit.actor import parallel
    from megatron_policysplit.actor.actor import DTYPES, Actor
    from megatron_policysplit.actor.weights import export_weights
    from megatron_policysplit.distributed.control import Control
    from megatron_policysplit.distributed.stop_signal import StopSignal

    layout = parallel.initialize(config.parallel, seed=0)
    resources.callback(parallel.shutdown)
    control = Control(layout.control, StopSignal())
    resources.callback(control.close)
    actor = Actor(config, read_hf_config(config.model.path), layout)
    weights = dict(export_weights(actor.model, actor.hf_config, "leader"))
    nbytes = sum(tensor.nbytes for tensor in weights.values())
    target = torch.empty(nbytes, dtype=torch.uint8)
    directory = Path(config.run.dir) / "read"
    write_hf(directory, config.model.path, weights.items(), DTYPES[config.model.dtype])
    files = sorted(directory.glob("*.safetensors"))

    def from_memory() -> None:
        start = 0
        for tensor in weights.values():
            target[start : start + tensor.nbytes].copy_(tensor.reshape(-1).view(torch.uint8))
            start += tensor.nbytes

    first: dict[str, float] = {}
    tasks: dict[str, Callable[[], None]] = {
        "read memory": from_memory,
        "read disk": lambda: _read(files),
    }
    for transport in transports:
        push = _pusher(config, transport, address, layout, control, actor, resources)
        first[transport] = _seconds(push)
        tasks[transport] = push
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(repeats):
        for name, work in tasks.items():
            if name == "read disk":
                _forget(files)
            seconds[name].append(_seconds(work))
    return {
        "model": config.model.path,
        "dtype": config.model.dtype,
        "bytes": nbytes,
        "bucket_mib": config.weight_sync.bucket_mib,
        "repeats": repeats,
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "timings": {
            name: {
                "seconds": {"median": statistics.median(s), "lowest": min(s), "highest": max(s)},
                "bytes_per_second": nbytes / statistics.median(s),
            }
            | ({"first_seconds": first[name]} if name in first else {})
            for name, s in seconds.items()
        },
    }


def _pusher(
    config, transport, address, layout, control, actor, resources: ExitStack
) -> Callable[[], None]:
    """Make a function that pushes all weights by `transport`, each time as a new version."""
    import copy

    from megatron_policysplit.rollout.sglang_http import SglangClient
    from megatron_policysplit.serving.members import Member, Placement, State
    from megatron_policysplit.weight_sync import WeightSync, sync_settings

    config = copy.deepcopy(config)
    config.weight_sync.transport = transport
    client = SglangClient(address, timeout_seconds=config.weight_sync.timeout_seconds)
    resources.callback(lambda: control.run(client.close()))
    member = Member(Placement(0, 0, (0,)), client, 1, state=State.WAITING)
    sync = WeightSync(sync_settings(config), layout, control, actor, [member.placement], [member])
    resources.callback(sync.close)
    version = 0

    def push() -> None:
        nonlocal version
        version += 1
        failures = sync.push(version)
        if failures:
            raise SystemExit(f"transport {transport}: {failures[0]}")

    return push


def _seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _read(files: list[Path]) -> None:
    """Read files block by block and drop what was read."""
    block = bytearray(BLOCK_BYTES)
    for file in files:
        with open(file, "rb", buffering=0) as opened:
            while opened.readinto(block):
                pass


def _forget(files: list[Path]) -> None:
    """Ask the system to drop the files from its cache, so that they are read from the disk."""
    for file in files:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
