"""SGLang's HTTP interface: one typed method an endpoint, one exception a kind of failure.

Verified against SGLang 0.5.23. Every method is a coroutine on the loop that the client was first
used on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import aiohttp

from megatron_policysplit.errors import EngineError

CONNECT_SECONDS = 30.0


class EngineUnreachable(EngineError):
    """No answer: connection refused or dropped, time limit, or 502/503/504.

    The request may or may not have run.
    """


class EngineTimedOut(EngineUnreachable):
    """The time limit ran out before the answer was there."""


class EngineRefused(EngineError):
    """An answer that says no."""

    def __init__(self, message: str, status: int):
        """status: the HTTP status; 200 where the body says success=false."""
        super().__init__(message)
        self.status = status

    def __reduce__(self):
        """Pickle both arguments: ranks tell each other their errors."""
        return type(self), (str(self), self.status)


class SglangClient:
    """One server or router at an address such as http://127.0.0.1:30000. The key is never shown.

    Every call has a connection of its own: on one that is kept, an answer that comes twice would
    pass for the answer to the next call, and in a weight sync for its success.
    """

    def __init__(self, address: str, api_key: str | None = None, *, timeout_seconds: float = 300.0):
        self.address = address.rstrip("/")
        self.timeout_seconds = timeout_seconds
        self._key = api_key
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Close what `call` has opened; a later call opens it again."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def generate(
        self,
        payload: Mapping[str, Any],
        *,
        timeout_seconds: float | None = None,
        routing_key: str | None = None,
    ) -> Any:
        """POST /generate as it is: a dict, or a list of dicts for a batch of input_ids.

        A router with the policy `manual` sends all requests with one routing_key to one server.
        """
        headers = {"X-SMG-Routing-Key": routing_key} if routing_key else None
        return await self.call(
            "POST", "/generate", payload, timeout_seconds=timeout_seconds, headers=headers
        )

    async def healthy(self, timeout_seconds: float) -> None:
        """Have a token generated; raises EngineError if none is within the time limit.

        A paused server generates none.
        """
        await self.call("GET", "/health_generate", timeout_seconds=timeout_seconds)

    async def version(self) -> str:
        """Return the weight version the server says it serves ("default" before the first sync)."""
        info = await self.model_info()
        if "weight_version" not in info:
            raise EngineUnreachable(
                f"{self.address}/model_info answered without a weight version: {info}"
            )
        return info["weight_version"]

    async def model_info(self) -> dict[str, Any]:
        return await self.call("GET", "/model_info")

    async def server_info(self) -> dict[str, Any]:
        return await self.call("GET", "/server_info")

    async def tokenize(self, text: str) -> list[int]:
        """Return the ids of a text under the server's own tokenizer, without special tokens."""
        answer = await self.call("POST", "/tokenize", {"prompt": text, "add_special_tokens": False})
        return answer["tokens"]

    async def pause(self) -> None:
        """Abort what is being generated and generate nothing until `proceed`."""
        await self.call("POST", "/pause_generation", {"mode": "abort"})

    async def proceed(self) -> None:
        """Generate again after `pause`."""
        await self.call("POST", "/continue_generation", {})

    async def abort_all(self) -> None:
        await self.call("POST", "/abort_request", {"rid": "", "abort_all": True})

    async def begin_update(self) -> None:
        """Open a weight-update session; raises EngineRefused when one is open already."""
        await self._command("/begin_weight_update", {})

    async def end_update(self) -> None:
        await self._command("/end_weight_update", {})

    async def flush(self) -> None:
        """Empty the prefix cache; raises EngineRefused while requests are running."""
        await self.call("GET", "/flush_cache")

    async def set_version(self, version: str) -> None:
        """Name the weights that the server holds; every answer names them from then on."""
        await self._command(
            "/update_weight_version", {"new_version": version, "abort_all_requests": False}
        )

    async def update_from_disk(self, path: str, *, timeout_seconds: float | None = None) -> None:
        """Load a Hugging Face directory that the server can read. Must stand outside a session."""
        payload = {"model_path": path, "flush_cache": False}
        await self._command("/update_weights_from_disk", payload, timeout_seconds)

    async def update_from_tensor(
        self, payloads: Sequence[str], *, timeout_seconds: float | None = None
    ) -> None:
        """Send one flattened bucket, inside a session.

        payloads: one base64 text for every tensor-parallel rank of the server.
        """
        payload = {
            "serialized_named_tensors": list(payloads),
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        await self._command("/update_weights_from_tensor", payload, timeout_seconds)

    async def init_group(
        self, address: str, port: int, rank_offset: int, world_size: int, name: str, backend: str
    ) -> None:
        """Have the server join a process group; it answers when all members have joined."""
        payload = {
            "master_address": address,
            "master_port": port,
            "rank_offset": rank_offset,
            "world_size": world_size,
            "group_name": name,
            "backend": backend,
        }
        await self._command("/init_weights_update_group", payload)

    async def destroy_group(self, name: str) -> None:
        await self._command("/destroy_weights_update_group", {"group_name": name})

    async def update_from_distributed(
        self,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        group: str,
        *,
        flattened: bool = False,
        timeout_seconds: float | None = None,
    ) -> None:
        """Have the server load tensors that rank 0 of `group` broadcasts, inside a session.

        It answers when they are loaded.
        """
        payload = {
            "names": list(names),
            "dtypes": list(dtypes),
            "shapes": [list(shape) for shape in shapes],
            "group_name": group,
            "flush_cache": False,
        }
        if flattened:
            payload["load_format"] = "flattened_bucket"
        await self._command("/update_weights_from_distributed", payload, timeout_seconds)

    async def release_memory(
        self, tags: Sequence[Literal["weights", "kv_cache", "cuda_graph"]]
    ) -> None:
        """Have the server give GPU memory back; it dies of this while requests run."""
        await self.call("POST", "/release_memory_occupation", {"tags": list(tags)})

    async def resume_memory(
        self, tags: Sequence[Literal["weights", "kv_cache", "cuda_graph"]]
    ) -> None:
        """Have the server take released memory again; it dies of a tag that it holds."""
        await self.call("POST", "/resume_memory_occupation", {"tags": list(tags)})

    async def call(
        self,
        method: str,
        path: str,
        payload: Mapping[str, Any] | None = None,
        *,
        timeout_seconds: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """Send one request and return its answer: decoded JSON where it is JSON, else text.

        Raises EngineTimedOut, EngineUnreachable or EngineRefused. When the call is cancelled, the
        server learns it from the connection, which is closed.
        """
        url = self.address + path
        limit = aiohttp.ClientTimeout(
            total=timeout_seconds or self.timeout_seconds, sock_connect=CONNECT_SECONDS
        )
        try:
            async with self._open().request(
                method, url, json=payload, timeout=limit, headers=headers
            ) as response:
                body = await response.read()
                text = None if response.status < 400 else self._text(body)
                if response.status in (502, 503, 504):
                    raise EngineUnreachable(f"{url} answered {response.status}: {text}")
                if text is not None:
                    raise EngineRefused(
                        f"{url} answered {response.status}: {text}", response.status
                    )
                return json.loads(body) if "json" in response.content_type else body.decode()
        # A TimeoutError itself, so before it: no connection at all is the server's doing, and says
        # nothing of how long the request takes.
        except aiohttp.ConnectionTimeoutError:
            raise EngineUnreachable(
                f"{url} took no connection in {min(CONNECT_SECONDS, limit.total):g} s"
            ) from None
        except TimeoutError:
            raise EngineTimedOut(f"{url} did not answer in {limit.total:g} s") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            # A ValueError is half an answer, which is no JSON.
            what = error or type(error).__name__
            raise EngineUnreachable(f"{url} did not answer: {what}") from error

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                headers=self._headers,
                connector=aiohttp.TCPConnector(limit=0, force_close=True),
                cookie_jar=aiohttp.DummyCookieJar(),
                json_serialize=partial(json.dumps, separators=(",", ":")),
            )
        return self._session

    def _text(self, body: bytes) -> str:
        """The text of a refusal, without the key that the server may repeat."""
        text = body.decode(errors="replace").strip()[:2000]
        return text.replace(self._key, "***") if self._key else text

    async def _command(
        self, path: str, payload: Mapping[str, Any], timeout_seconds: float | None = None
    ) -> None:
        """Like `call`; an answer with success=false is a refusal, though its status is 200."""
        answer = await self.call("POST", path, payload, timeout_seconds=timeout_seconds)
        if isinstance(answer, Mapping) and not answer.get("success", True):
            raise EngineRefused(
                f"{self.address}{path} refused: {answer.get('message', 'no reason given')}", 200
            )
