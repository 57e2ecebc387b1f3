"""Checks of the device itself: products, copies, shared memory, FP8."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.runner import Options, Skip


def _seconds(work: Callable[[], Any], repeats: int) -> float:
    """Median seconds of a call, the device's work included; the first one does not count."""
    from megatron_policysplit.distributed.device import wait_for_device

    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        wait_for_device()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]


def bandwidth(options: Options) -> dict[str, Any]:
    import torch

    from megatron_policysplit.distributed.device import gpu_count, set_device, training_device

    set_device(0)
    device, on_gpu = training_device(), gpu_count() > 0
    size, nbytes = (8192, 2**30) if on_gpu else (512, 2**24)
    a = torch.randn(size, size, device=device).bfloat16()
    product = _seconds(lambda: a @ a, 10)
    source = torch.empty(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = _seconds(lambda: target.copy_(source), 10)
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    return {
        "device": name,
        f"bf16 product of {size}, TFLOP/s": round(2 * size**3 / product / 1e12, 3),
        "copy (read and write), GB/s": round(2 * nbytes / copy / 1e9, 1),
    }


_READER = """
import pickle, sys, torch
from torch.multiprocessing import reductions
while line := sys.stdin.readline():
    rebuild, arguments = pickle.loads(bytes.fromhex(line))
    tensor = rebuild(*arguments)
    total = int(tensor.sum())
    del tensor
    torch.cuda.synchronize()
    print(total, flush=True)
"""


def cuda_ipc(options: Options) -> dict[str, Any]:
    """Eight buckets of 256 MiB to another process; what this process then holds."""
    import pickle

    import torch
    from torch.multiprocessing import reductions

    from megatron_policysplit.distributed.device import return_freed_memory
    from megatron_policysplit.weight_sync.shared_memory import Buffer

    reader = subprocess.Popen(
        [sys.executable, "-c", _READER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    nbytes, device = 256 << 20, torch.device("cuda", 0)
    before, most = torch.cuda.memory_reserved(), 0
    for number in range(8):
        buffer = Buffer(nbytes, device)
        buffer.flat.fill_(number)
        handle = pickle.dumps(reductions.reduce_tensor(buffer.flat))
        reader.stdin.write(handle.hex() + "\n")
        reader.stdin.flush()
        assert int(reader.stdout.readline()) == number * nbytes
        most = max(most, torch.cuda.memory_reserved())
        buffer.release()
    return_freed_memory()
    held = torch.cuda.memory_reserved() - before
    reader.stdin.close()
    reader.wait()
    assert held < nbytes, f"{held >> 20} MiB are still held after all buffers were given back"
    assert most - before <= 2 * nbytes, f"{(most - before) >> 20} MiB were held at once"
    return {"most held at once, MiB": (most - before) >> 20, "held afterwards, MiB": held >> 20}


def fp8(options: Options) -> dict[str, Any]:
    import torch

    from megatron_policysplit.distributed.device import transformer_engine_problem

    if (problem := transformer_engine_problem()) is not None:
        raise Skip(problem)
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe

    layer = te.Linear(1024, 1024, bias=False, params_dtype=torch.bfloat16)
    values = {}
    for name in ("Float8BlockScaling", "Float8CurrentScaling"):
        rows = torch.randn(256, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        with te.fp8_autocast(enabled=True, fp8_recipe=getattr(recipe, name)()):
            out = layer(rows)
            with torch.no_grad():
                again = layer(rows)
        out.float().square().mean().backward()
        assert torch.equal(out, again), f"{name}: other bits under no_grad"
        assert rows.grad.isfinite().all() and layer.weight.grad.isfinite().all(), name
        exact = rows.float() @ layer.weight.float().t()
        values[f"{name}, relative error"] = f"{float((out - exact).norm() / exact.norm()):.2g}"
    return values


def throughput(options: Options) -> dict[str, Any]:
    output = Path(options.directory) / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--shapes", "1.7b", "--repeats", "2"]
    subprocess.run([*command, "--output", str(output)], check=True)
    return {"benchmarks.gpu": json.loads(output.read_text())}
