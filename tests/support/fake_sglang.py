"""An engine that takes weights as SGLang does, in a process of its own, and remembers every call.

It reads shared memory, joins process groups and reads directories for real; it generates nothing. Like SGLang it does
one thing at a time: a question to its scheduler waits while the scheduler waits for a broadcast.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import multiprocessing
import os
import pickle
import signal
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from tests.support.dist import Surroundings, forking_context

ALLOWED = {  # as far as SGLang's own list is needed
    ("collections", "OrderedDict"),
    ("types", "SimpleNamespace"),
    ("torch", "Size"),
    ("torch", "Tensor"),
    ("torch", "float32"),
    ("torch", "bfloat16"),
    ("torch", "uint8"),
    ("torch.storage", "TypedStorage"),
    ("torch.storage", "UntypedStorage"),
    ("torch.multiprocessing.reductions", "rebuild_tensor"),
    ("torch.multiprocessing.reductions", "rebuild_typed_storage"),
    ("torch.multiprocessing.reductions", "rebuild_storage_filename"),
}


class Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise RuntimeError(f"blocked {module}.{name}")
        return super().find_class(module, name)


@dataclass(frozen=True)
class Fault:
    """What happens at the `call`-th call (from 1) of a path: `refuse`, `die` (SIGKILL), `stop` (SIGSTOP), or `late`,
    which answers after the call's work was done but only `seconds` later."""

    path: str
    do: str
    call: int = 1
    seconds: float = 0.0


@dataclass
class FakeEngine:
    """The test's side of it."""

    address: str
    process: multiprocessing.Process
    directory: Path

    def state(self) -> dict[str, Any]:
        """calls: paths in order; paused, session, version."""
        return self._get("/test/state")

    def tensors(self) -> dict[str, Any]:
        """The weights it has taken, by name (one dict for every tensor-parallel rank's copy)."""
        from safetensors.torch import load_file

        self._get("/test/save")
        return load_file(self.directory / "taken.safetensors")

    def forget(self) -> None:
        """Drop the list of calls and the weights."""
        self._get("/test/forget")

    def _get(self, path: str) -> Any:
        with urllib.request.urlopen(self.address + path, timeout=20) as answer:
            return json.loads(answer.read())


@contextmanager
def fake_engine(directory: Path, *, tensor: int = 1, faults: tuple[Fault, ...] = (), open_session: bool = False):
    """A running engine. open_session: as a trainer that died leaves it."""
    directory.mkdir(parents=True, exist_ok=True)
    context, surroundings = forking_context(), Surroundings.of()
    mine, theirs = context.Pipe()
    engine = partial(_Engine, str(directory), tensor, faults, open_session)
    process = context.Process(target=_serve, args=(surroundings, theirs, engine), daemon=True)
    process.start()
    try:
        if not mine.poll(60):
            raise RuntimeError("the fake engine did not start")
        yield FakeEngine(f"http://127.0.0.1:{mine.recv()}", process, directory)
    finally:
        process.kill()
        process.join()


def _serve(surroundings: Surroundings, pipe, make_engine: Callable[[], _Engine]) -> None:
    surroundings.take_over()
    from aiohttp import web

    engine = make_engine()

    async def main() -> None:
        app = web.Application(middlewares=[engine.middleware], client_max_size=2**28)
        for method, path, handler in engine.routes():
            app.router.add_route(method, path, handler)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        pipe.send(runner.addresses[0][1])
        await asyncio.Event().wait()

    asyncio.run(main())


@dataclass
class _Engine:
    directory: str
    tensor: int
    faults: tuple[Fault, ...]
    session: bool
    paused: bool = False
    version: str = "default"
    calls: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    taken: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.time)
    scheduler: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))

    def routes(self):
        from aiohttp import web

        def route(work, method="POST"):
            async def handle(request):
                payload = await request.json() if request.can_read_body else {}
                loop = asyncio.get_running_loop()
                try:
                    answer = await loop.run_in_executor(self.scheduler, work, payload)
                except Refusal as error:
                    return web.json_response({"success": False, "message": str(error)}, status=400)
                late = [f.seconds for f in self._struck(request.path) if f.do == "late"]
                await asyncio.sleep(sum(late))
                return web.json_response({"success": True, **(answer or {})})

            return method, "/" + work.__name__, handle

        return [
            route(self.pause_generation),
            route(self.continue_generation),
            route(self.begin_weight_update),
            route(self.end_weight_update),
            route(self.flush_cache, "GET"),
            route(self.update_weight_version),
            route(self.update_weights_from_tensor),
            route(self.update_weights_from_disk),
            route(self.init_weights_update_group),
            route(self.destroy_weights_update_group),
            route(self.update_weights_from_distributed),
            route(self.server_info, "GET"),
            route(self.model_info, "GET"),
            ("GET", "/test/state", self.state),
            ("GET", "/test/save", self.save),
            ("GET", "/test/forget", self.forget),
        ]

    @property
    def middleware(self):
        from aiohttp import web

        @web.middleware
        async def strike(request, handler):
            if request.path.startswith("/test"):
                return await handler(request)
            self.calls.append(request.path)
            self.counts[request.path] = self.counts.get(request.path, 0) + 1
            for fault in self._struck(request.path):
                if fault.do == "refuse":
                    return web.json_response({"success": False, "message": "as the test wants it"}, status=400)
                if fault.do in ("die", "stop"):
                    os.kill(os.getpid(), signal.SIGKILL if fault.do == "die" else signal.SIGSTOP)
            return await handler(request)

        return strike

    def _struck(self, path: str) -> list[Fault]:
        return [fault for fault in self.faults if fault.path == path and fault.call == self.counts[path]]

    def pause_generation(self, payload):
        assert payload["mode"] == "abort"
        self.paused = True

    def continue_generation(self, payload):
        self.paused = False

    def begin_weight_update(self, payload):
        if self.session:
            raise Refusal("a weight-update session is already open")
        self.session = True

    def end_weight_update(self, payload):
        if not self.session:
            raise Refusal("no weight-update session is open")
        self.session = False

    def flush_cache(self, payload):
        pass

    def update_weight_version(self, payload):
        self.version = payload["new_version"]

    def model_info(self, payload):
        return {"weight_version": self.version}

    def server_info(self, payload):
        return {"startup_time": self.started, "tp_size": self.tensor}

    def update_weights_from_tensor(self, payload):
        self._check_session(payload)
        assert payload["load_format"] == "flattened_bucket"
        assert len(payload["serialized_named_tensors"]) == self.tensor
        for rank, text in enumerate(payload["serialized_named_tensors"]):
            given = Unpickler(io.BytesIO(base64.b64decode(text))).load()
            for meta in given["metadata"]:
                flat = given["flattened_tensor"][meta.start_idx : meta.end_idx]
                assert meta.numel == flat.numel()
                self._take(rank, meta.name, flat.view(meta.dtype).reshape(meta.shape))

    def update_weights_from_disk(self, payload):
        from safetensors.torch import load_file

        if self.session:
            raise Refusal("a session is open")
        self._check_quiet(payload)
        for file in Path(payload["model_path"]).glob("*.safetensors"):
            for name, tensor in load_file(file).items():
                self._take(0, name, tensor)

    def init_weights_update_group(self, payload):
        import torch.distributed as dist
        import torch.distributed.distributed_c10d as c10d

        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        name, world = payload["group_name"], payload["world_size"]
        try:
            store = dist.TCPStore(payload["master_address"], payload["master_port"], world, False)
            group, _ = c10d._new_process_group_helper(
                world,
                payload["rank_offset"],
                [],
                c10d.Backend(payload["backend"]),
                dist.PrefixStore(name, store),
                group_name=name,
                timeout=timedelta(minutes=30),
            )
        except (RuntimeError, ValueError) as error:
            raise Refusal(str(error)) from error
        c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(world)}
        self.groups[name] = group

    def destroy_weights_update_group(self, payload):
        import torch.distributed as dist

        if payload["group_name"] not in self.groups:
            raise Refusal("The group to be destroyed does not exist.")
        dist.destroy_process_group(self.groups.pop(payload["group_name"]))

    def update_weights_from_distributed(self, payload):
        import torch
        import torch.distributed as dist

        self._check_session(payload)
        assert payload["load_format"] == "flattened_bucket"
        dtypes = [getattr(torch, dtype) for dtype in payload["dtypes"]]
        sizes = [torch.Size(s).numel() * d.itemsize for s, d in zip(payload["shapes"], dtypes, strict=True)]
        flat = torch.empty(sum(sizes), dtype=torch.uint8)
        try:
            dist.broadcast(flat, src=0, group=self.groups[payload["group_name"]])
        except (RuntimeError, KeyError) as error:
            raise Refusal(f"Failed to receive weights: {error}") from error
        parts = zip(payload["names"], dtypes, payload["shapes"], flat.split(sizes), strict=True)
        for name, dtype, shape, part in parts:
            self._take(0, name, part.view(dtype).reshape(shape))

    def _check_session(self, payload) -> None:
        if not self.session:
            raise Refusal("must run between begin_weight_update() and end_weight_update()")
        self._check_quiet(payload)

    def _check_quiet(self, payload) -> None:
        assert self.paused and not payload["flush_cache"] and payload.get("weight_version") is None

    def _take(self, rank: int, name: str, tensor) -> None:
        key = f"{rank}/{name}"
        if key in self.taken and self.taken[key].shape != tensor.shape:
            raise Refusal(f"{name} has another shape")
        self.taken[key] = tensor.clone()

    async def state(self, request):
        from aiohttp import web

        return web.json_response(
            {"calls": self.calls, "paused": self.paused, "session": self.session, "version": self.version}
        )

    async def save(self, request):
        from aiohttp import web
        from safetensors.torch import save_file

        save_file(self.taken, Path(self.directory) / "taken.safetensors")
        return web.json_response({})

    async def forget(self, request):
        from aiohttp import web

        self.calls.clear()
        self.taken.clear()
        return web.json_response({})


class Refusal(Exception):
    pass
