"""`policysplit serve`: SGLang servers in the foreground, for runs that name them by address."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import sys
import zlib
from collections.abc import Sequence

from checkpoints_conv import read_hf_config
from megatron_policysplit.config import Config
from megatron_policysplit.config.engine_checks import is_loopback
from megatron_policysplit.errors import DONE, ConfigError, EngineError
from megatron_policysplit.rollout.sglang_http import SglangClient
from megatron_policysplit.serving.servers import Server, server_spec

WATCH_SECONDS = 1.0


def serve(config: Config) -> int:
    """Run rollout.server.count servers until SIGTERM or SIGINT; returns the exit code.

    Prints the address of each on a line of its own once it has generated a token, as
    rollout.addresses of the run wants it. A server that ends is started again, at most
    rollout.server.restarts times; it then has the weights of model.path until the run gives it
    others. Raises ConfigError or ModelError before anything starts, EngineError if a server does
    not come up. Call it in the main thread.
    """
    if config.rollout.colocated:
        raise ConfigError(
            "rollout.colocated=true: the run starts its servers itself; serve is for nodes without "
            "ranks"
        )
    read_hf_config(config.model.path)
    # Several nodes may share run.dir and the seed, and need logs and samples of their own.
    node = re.sub(r"[^\w.-]", "_", socket.gethostname())
    seed = (config.run.seed + zlib.crc32(node.encode())) % 2**31
    server_config = config.rollout.server
    servers = [
        Server(server_spec(config, index, name=f"sglang_{node}_{index}", seed=seed))
        for index in range(server_config.count or 1)
    ]
    host = server_config.host
    if is_loopback(host):
        _print_message(f"rollout.server.host={host}: only this machine will reach the servers")
    return asyncio.run(_serve(servers, server_config.restarts))


async def _serve(servers: Sequence[Server], restarts: int) -> int:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    signal_task = asyncio.ensure_future(stop.wait())
    tasks = [asyncio.ensure_future(_keep_running(server, restarts)) for server in servers]
    try:
        await asyncio.wait([signal_task, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()  # raises: one that keeps a server running only ends by an error
        _print_message("stopping the servers")
        return DONE
    finally:
        # First, or a server that is stopped would be started again.
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*[server.stop() for server in servers])


async def _keep_running(server: Server, restarts: int) -> None:
    """Keep a server running; raises EngineError when it cannot be."""
    client = None
    try:
        while True:
            server.start()
            if client is None:
                client = SglangClient(server.address, server.spec.api_key)
            try:
                await server.ready(client)
                if server.starts == 1:
                    print(server.address, flush=True)
                else:
                    _print_message(f"{server.what} is back at {server.address}")
                while server.alive():
                    await asyncio.sleep(WATCH_SECONDS)
                raise server.death()
            except EngineError as error:
                # One that lives and fails at its first start is set up wrongly, not unlucky.
                if server.starts == 1 and server.alive() or server.starts > restarts:
                    raise
                _print_message(f"{error}\nstarting it again ({server.starts} of {restarts})")
    finally:
        if client is not None:
            await client.close()


def _print_message(message: str) -> None:
    print(f"policysplit: {message}", file=sys.stderr, flush=True)
