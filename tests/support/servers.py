"""Stand-ins for SGLang's processes, started as the real ones are."""

import asyncio
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil

from megatron_policysplit.rollout.sglang_http import SglangClient
from megatron_policysplit.serving.servers import ServerSpec

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
    return replace(made, **changes)


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


def after(words, flag):
    return words[words.index(flag) + 1]


def run(make):
    """Run a coroutine function that is given `started(process, api_key)`; what it has started is ended afterwards."""
    ours, clients = [], []

    async def started(process, api_key=None):
        ours.append(process)
        process.start()
        clients.append(SglangClient(process.address, api_key, timeout_seconds=5.0))
        return clients[-1]

    async def whole():
        try:
            return await make(started)
        finally:
            for client in clients:
                await client.close()
            for process in ours:
                process.kill()
                await process.stop()

    return asyncio.run(whole())
