"""A proxy in front of one HTTP server that breaks chosen calls on the way: the network as it is on a bad day.

It speaks bytes, not an HTTP library, because half a body or two answers on one connection are what a library prevents.
"""

from __future__ import annotations

import asyncio
import enum
import json
import re
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

_CLOSE = re.compile(rb"^connection: close\r\n", re.IGNORECASE | re.MULTILINE)  # said to the proxy, not to its client


class Fault(enum.Enum):
    """What happens to one call. Those named after the request keep it from the server, DUPLICATE_REQUEST apart;
    those named after the answer let the server do its work."""

    REFUSE = "refuse"  # an answer of the rule's status
    DROP_REQUEST = "drop_request"  # the connection closes without an answer
    DROP_ANSWER = "drop_answer"
    STALL_REQUEST = "stall_request"  # held until `release`; dropped if the client has left by then
    STALL_ANSWER = "stall_answer"
    HALF_REQUEST = "half_request"  # the rule's share of the body arrives, then both connections close
    HALF_ANSWER = "half_answer"
    DUPLICATE_REQUEST = "duplicate_request"  # the server gets it twice; the client gets the second answer
    DUPLICATE_ANSWER = "duplicate_answer"  # the client gets one answer twice
    LATE_REQUEST = "late_request"  # the connection closes without an answer; the server gets it after `release`


@dataclass(frozen=True)
class Rule:
    """The `call`-th call (from 1; None is every call) of a path since the rules were set. share: of a half body.
    delay: seconds before a second answer. before: run, in the proxy's thread, when the call has arrived; fault None
    is only that."""

    path: str
    fault: Fault | None
    call: int | None = 1
    status: int = 503
    share: float = 0.5
    delay: float = 0.0
    before: Callable[[], None] | None = None


@dataclass
class Call:
    """One call as it arrived. number: among those of its path since the rules were set. status: the server's answer
    (the last one), None where it gave none or was not asked."""

    path: str
    number: int
    payload: Any
    fault: Fault | None
    status: int | None = None


@dataclass
class _Request:
    method: str
    path: str
    headers: list[tuple[str, str]]
    body: bytes

    def encode(self, host: str) -> bytes:
        kept = [(k, v) for k, v in self.headers if k.lower() not in ("host", "connection")]
        lines = [f"{self.method} {self.path} HTTP/1.1", f"Host: {host}", "Connection: close"]
        return "\r\n".join(lines + [f"{k}: {v}" for k, v in kept]).encode() + b"\r\n\r\n" + self.body


@dataclass
class FaultProxy:
    """Listens on a loopback port of its own while it is entered as a context. target: the server's port."""

    target: int
    calls: list[Call] = field(default_factory=list)
    _rules: tuple[Rule, ...] = ()
    _counts: Counter = field(default_factory=Counter)
    _tasks: set = field(default_factory=set)

    def __enter__(self) -> FaultProxy:
        self._loop = asyncio.new_event_loop()
        self._released = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)
        self._thread.start()
        self._server = self._run(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def script(self, *rules: Rule) -> None:
        """Forget the log and the counts; from now on these rules hold. Calls that are held go on waiting."""

        async def set_rules() -> None:
            self._rules, self._counts, self._released = rules, Counter(), asyncio.Event()
            self.calls.clear()

        self._run(set_rules())

    def release(self) -> None:
        """Let stalled and late calls go on."""
        self._loop.call_soon_threadsafe(self._released.set)

    def paths(self) -> list[str]:
        """Paths of all calls, in the order of their arrival."""
        return [call.path for call in self.calls]

    def struck(self) -> list[Call]:
        """The calls that a fault hit."""
        return [call for call in self.calls if call.fault is not None]

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    async def _stop(self) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.add(asyncio.current_task())
        try:
            while (request := await _read_request(reader)) is not None:
                if not await self._answer(request, reader, writer):
                    break
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            return  # the client left, or the proxy is closing
        finally:
            self._tasks.discard(asyncio.current_task())
            writer.close()

    async def _answer(self, request: _Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection may serve another request."""
        self._counts[request.path] += 1
        number = self._counts[request.path]
        rule = self._rule(request.path, number)
        fault = rule.fault if rule else None
        call = Call(request.path, number, _decoded(request.body), fault)
        self.calls.append(call)
        released = self._released
        if rule and rule.before:
            rule.before()
        if fault is Fault.REFUSE:
            writer.write(_refusal(rule.status))
            await writer.drain()
            return True
        if fault is Fault.DROP_REQUEST:
            return False
        if fault is Fault.LATE_REQUEST:
            task = asyncio.ensure_future(self._deliver_late(request, call, released))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            return False
        if fault is Fault.STALL_REQUEST and not await _still_there(released, reader):
            return False
        if fault is Fault.HALF_REQUEST:
            await self._send_half(request, rule.share)
            return False
        for _ in range(2 if fault is Fault.DUPLICATE_REQUEST else 1):
            answer = await self._forward(request)
        call.status = _status(answer)
        if fault is Fault.STALL_ANSWER and not await _still_there(released, reader):
            return False
        if fault is Fault.DROP_ANSWER or not answer:
            return False
        if fault is Fault.HALF_ANSWER:
            start = answer.index(b"\r\n\r\n") + 4
            writer.write(answer[: start + int((len(answer) - start) * rule.share)])
            await writer.drain()
            return False
        writer.write(answer)
        await writer.drain()
        if fault is Fault.DUPLICATE_ANSWER:
            await asyncio.sleep(rule.delay)
            writer.write(answer)
            await writer.drain()
        return True

    def _rule(self, path: str, number: int) -> Rule | None:
        return next((r for r in self._rules if r.path == path and r.call in (None, number)), None)

    async def _deliver_late(self, request: _Request, call: Call, released: asyncio.Event) -> None:
        await released.wait()
        call.status = _status(await self._forward(request))

    async def _forward(self, request: _Request) -> bytes:
        """The server's whole answer, connection header apart; b"" if it gave none."""
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            return b""
        try:
            writer.write(request.encode(f"127.0.0.1:{self.target}"))
            await writer.drain()
            return _CLOSE.sub(b"", await reader.read(), count=1)
        except ConnectionError:
            return b""
        finally:
            writer.close()

    async def _send_half(self, request: _Request, share: float) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.target)
        whole = request.encode(f"127.0.0.1:{self.target}")
        writer.write(whole[: len(whole) - len(request.body) + int(len(request.body) * share)])
        await writer.drain()
        writer.close()


async def _read_request(reader: asyncio.StreamReader) -> _Request | None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.strip().split("\r\n")
    method, path, _ = first.split(" ")
    headers = [tuple(line.split(": ", 1)) for line in lines]
    length = next((int(v) for k, v in headers if k.lower() == "content-length"), 0)
    return _Request(method, path, headers, await reader.readexactly(length))


async def _still_there(released: asyncio.Event, reader: asyncio.StreamReader) -> bool:
    """Wait for the release or the client's departure; whether the client is still there."""
    waits = [asyncio.ensure_future(released.wait()), asyncio.ensure_future(reader.read(1))]
    try:
        done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
    return waits[1] not in done


def _status(answer: bytes) -> int | None:
    return int(answer.split(b" ", 2)[1]) if answer else None


def _refusal(status: int) -> bytes:
    body = json.dumps({"success": False, "message": "refused by the fault proxy"}).encode()
    head = f"HTTP/1.1 {status} Refused\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def _decoded(body: bytes) -> Any:
    return json.loads(body) if body else None
