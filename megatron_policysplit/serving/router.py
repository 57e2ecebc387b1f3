"""sglang-router in front of several servers: one address for all leaders.

It keeps the samples of a prompt on one server. Verified against sglang-router 0.3.2. It is told
about its workers and judges nothing itself:

- No health checks: they ask for a token, so a server that is paused for a weight sync would be
  taken out of service.
- No retries: a request that kills a server would be sent to the next one. Clients send again, and
  count.
- No circuit breaker: it counts refused requests as faults and then keeps a sound server idle for a
  minute.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from urllib.parse import quote

from megatron_policysplit.errors import EngineError
from megatron_policysplit.rollout.sglang_http import EngineRefused, EngineUnreachable, SglangClient
from megatron_policysplit.serving.processes import (
    POLL_SECONDS,
    Process,
    flags,
    inherited_environment,
)

MODULE = "sglang_router.launch_router"
START_SECONDS = 120.0
CHANGE_SECONDS = 60.0
KEY_SECONDS = 600  # a routing key is used once, so it need not be remembered for long


class Router(Process):
    """One router. Generation goes through its `address`, by clients of its users' own."""

    def __init__(
        self,
        python: str,
        host: str,
        port: int,
        api_key: str | None,
        log: Path,
        *,
        request_seconds: float,
    ):
        """request_seconds: what clients allow one request; the router itself waits longer."""
        super().__init__("sglang-router", python, host, port, api_key, log)
        self.request_seconds = request_seconds
        self._client: SglangClient | None = None  # for /workers
        self._started_at = 0.0

    def start(self) -> None:
        """Start it, or start it again, without workers, on the same port.

        Call it from a thread that lives as long as the run: the process dies with the thread.
        Raises EngineError if its port is taken.
        """
        self.kill()
        (metrics_port,) = self.hold_ports(1)
        self._client = self._client or SglangClient(self.address, self._api_key)
        self.launch(
            MODULE, self.command(metrics_port), inherited_environment(os.environ, self.python)
        )
        self._started_at = time.monotonic()

    def command(self, metrics_port: int) -> list[str]:
        """Return the arguments of sglang_router.launch_router, without the API key.

        With the policy `manual` all requests with one routing key, the samples of a prompt, go to
        one server, which computes the prompt once; a new key goes to the server with the fewest.
        (`cache_aware` was seen to split the samples of most questions over two servers: it balances
        single requests.)
        """
        return flags(
            {
                "host": self.host,
                "port": self.port,
                "policy": "manual",
                "assignment-mode": "min_load",
                "max-idle-secs": KEY_SECONDS,
                "request-timeout-secs": int(self.request_seconds) + 60,
                "worker-startup-timeout-secs": int(CHANGE_SECONDS),
                "worker-startup-check-interval": 1,
                "shutdown-grace-period-secs": 1,
                "disable-retries": True,
                "disable-circuit-breaker": True,
                "disable-health-check": True,
                "prometheus-host": "127.0.0.1",
                "prometheus-port": metrics_port,
                "log-level": "warn",
            }
        )

    async def ready(self) -> None:
        """Wait until it answers; it has no workers yet.

        Raises EngineError, with the end of its log, if it does not.
        """
        while True:
            if not self.alive():
                raise self.death()
            try:
                await self.workers()
                return
            except EngineUnreachable as error:
                if time.monotonic() - self._started_at > START_SECONDS:
                    raise self.error(
                        f"at {self.address} did not answer within {START_SECONDS:g} s"
                    ) from error
            await asyncio.sleep(POLL_SECONDS)

    async def workers(self) -> dict[str, bool]:
        """Return the address of every server it knows, and whether requests are sent there."""
        return {worker["url"]: worker["is_healthy"] for worker in await self._list()}

    async def add(self, address: str) -> None:
        """Have it send requests to a server, which must answer already.

        Returns once it does so; raises EngineError after CHANGE_SECONDS. Does nothing if it does so
        now.
        """
        if (await self.workers()).get(address):
            return
        payload = {"url": address} | ({"api_key": self._api_key} if self._api_key else {})
        await self._client.call("POST", "/workers", payload)
        await self._until(address, True, "did not take up")

    async def remove(self, address: str) -> None:
        """Have it send no further request to a server, dead or alive.

        Returns once it has none there; raises EngineError after CHANGE_SECONDS.
        """
        for worker in await self._list():
            if worker["url"] == address:
                try:
                    await self._client.call("DELETE", f"/workers/{quote(worker['id'], safe='')}")
                except EngineRefused as error:
                    # 404: it has dropped the worker since it was listed.
                    if error.status != 404:
                        raise
        await self._until(address, None, "did not drop")

    async def stop(self) -> None:
        """Stop it as any `Process`, and close the connection to it."""
        try:
            if self._client is not None:
                await self._client.close()
        finally:
            await super().stop()

    async def _until(self, address: str, state: bool | None, failed: str) -> None:
        """Wait until a worker is as asked for: the router answers before it has acted."""
        deadline = time.monotonic() + CHANGE_SECONDS
        while (await self.workers()).get(address) != state:
            if time.monotonic() > deadline:
                raise EngineError(
                    f"sglang-router {failed} {address} within {CHANGE_SECONDS:g} s; see {self.log}"
                )
            await asyncio.sleep(POLL_SECONDS)

    async def _list(self) -> list[dict]:
        return (await self._client.call("GET", "/workers", timeout_seconds=10.0))["workers"]


async def match_workers(router: Router, known: set[str], members: set[str]) -> None:
    """Add and remove workers until the router knows these members and no others.

    known: addresses that the router may know. They are changed with every call that succeeds, so
        that a later attempt goes on where one has failed.
    members: addresses that it should know. They may change meanwhile, from other coroutines.

    Raises EngineError as `Router.add` and `Router.remove` do.
    """
    # One change at a time, each from both sets as they are then; removals first, so that no request
    # goes to a lost engine for longer than needed.
    while known != members:
        if extra := known - members:
            await router.remove(address := extra.pop())
            known.discard(address)
        else:
            await router.add(address := (members - known).pop())
            known.add(address)
