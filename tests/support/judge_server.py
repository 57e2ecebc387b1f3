"""A judge behind /v1/chat/completions, in a thread of this process: it checks every request and fails by script."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from aiohttp import web

KEY, MODEL = "a-secret-key", "judge-7b"


class JudgeServer:
    """script: answers to the next requests, then `reply` of each.

    An entry of the script is a status, (status, headers), a text to reply with, or a dict to answer with as it is.
    reply: prompt -> text. seen: payloads. wrong: what was wrong with requests. most: requests held at once.
    hold_seconds: how long each is held. paused: while it is cleared, requests are held.
    """

    def __init__(self):
        self.script: list = []
        self.seen: list[dict] = []
        self.arrived: list[float] = []
        self.wrong: list[str] = []
        self.holding = self.most = 0
        self.hold_seconds = 0.0
        self.paused = threading.Event()
        self.key: str | None = KEY
        self.extra = {"max_tokens": 1024, "temperature": 0.0}
        self.url = ""

    def reply(self, prompt: str) -> str:
        return "It has something of its own.\nScore: 7"

    @property
    def prompts(self) -> list[str]:
        """What was asked, without the trial of the start."""
        asked = [payload["messages"][0]["content"] for payload in self.seen]
        return [prompt for prompt in asked if "Rain practises the piano" not in prompt]

    async def answer(self, http: web.Request) -> web.Response:
        self.holding += 1
        self.most = max(self.most, self.holding)
        try:
            payload = await http.json()
            self.seen.append(payload)
            self.arrived.append(time.monotonic())
            self._check(http, payload)
            await asyncio.sleep(self.hold_seconds)
            while self.paused.is_set():
                await asyncio.sleep(0.005)
            step = self.script.pop(0) if self.script else None
            return self._answer(step, payload)
        finally:
            self.holding -= 1

    def _check(self, http: web.Request, payload: dict) -> None:
        sent = http.headers.get("Authorization")
        if sent != (None if self.key is None else f"Bearer {self.key}"):
            self.wrong.append(f"Authorization: {sent}")
        if http.content_type != "application/json":
            self.wrong.append(f"Content-Type: {http.content_type}")
        (message,) = payload["messages"]
        others = {name: value for name, value in payload.items() if name not in ("model", "messages")}
        if payload["model"] != MODEL or message.keys() != {"role", "content"} or message["role"] != "user":
            self.wrong.append(f"payload: {payload}")
        if others != self.extra:
            self.wrong.append(f"further keys: {others}")

    def _answer(self, step, payload: dict) -> web.Response:
        if isinstance(step, int):
            step = (step, {})
        if isinstance(step, tuple):
            status, headers = step
            text = f"status {status}; you sent {self.key}"
            return web.json_response({"error": {"message": text}}, status=status, headers=headers)
        if isinstance(step, dict):
            return web.json_response(step)
        return web.json_response(completion(step or self.reply(payload["messages"][0]["content"])))


def completion(text: str | None, finish_reason: str = "stop") -> dict:
    message = {"role": "assistant", "content": text}
    return {"id": "1", "object": "chat.completion", "choices": [{"message": message, "finish_reason": finish_reason}]}


@contextmanager
def serving() -> Iterator[JudgeServer]:
    """A server on a free port of this machine; `url` is its base."""
    server, loop, ready = JudgeServer(), asyncio.new_event_loop(), threading.Event()
    app = web.Application(client_max_size=2**24)
    app.router.add_post("/v1/chat/completions", server.answer)
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)

    async def start() -> None:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        ready.set()

    def run() -> None:
        loop.run_until_complete(start())
        loop.run_forever()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(30)
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
