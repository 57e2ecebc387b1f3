"""An engine that misbehaves by script: what collecting rollouts has to survive, without a model."""

from __future__ import annotations

import asyncio
import random

from megatron_policysplit.rollout.engine import EnginePaused, Request
from megatron_policysplit.rows import Rollout


class ScriptedEngine:
    """Finishes samples in a random order; a response is a function of its seed.

    script: rollout key -> what happens at the first, second, ... request for it: "drop", "stall" (until
    `pause` or the consumer gives up), "duplicate", "stray" (a response to another question comes with it)
    or "deliver", which is also what happens after the script's end.
    """

    def __init__(self, script: dict[tuple, list[str]] | None = None, order_seed: int = 0):
        self._script = {key: list(actions) for key, actions in (script or {}).items()}
        self._random = random.Random(order_seed)
        self._version = 0
        self._paused = self._released = False
        self.loaded: list[str] = []
        self.running = self.most_running = 0  # submits at the same time
        self.requested: list[tuple] = []

    async def submit(self, requests):
        samples = [
            (request, i, seed) for request in requests for i, seed in zip(request.samples, request.seeds, strict=True)
        ]
        self._random.shuffle(samples)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            for request, sample, seed in samples:
                await asyncio.sleep(0)
                rollout = self._rollout(request, sample, seed)
                self.requested.append(rollout.key)
                actions = self._script.get(rollout.key, [])
                action = actions.pop(0) if actions else "deliver"
                self._check()
                if action == "stall":
                    while True:
                        await asyncio.sleep(0.002)
                        self._check()
                if action == "stray":
                    yield self._rollout(request, sample + 10**6, seed)
                if action != "drop":
                    yield rollout
                if action == "duplicate":
                    yield self._rollout(request, sample, seed)
        finally:
            self.running -= 1

    def _rollout(self, request: Request, sample: int, seed: int) -> Rollout:
        draw = random.Random(seed)
        length = draw.randint(1, request.sampling.max_tokens)
        return Rollout(
            batch=request.batch,
            question=request.question,
            mode=request.mode,
            sample=sample,
            tokens=[draw.randrange(100) for _ in range(length)],
            engine_logprobs=[-draw.random() for _ in range(length)],
            finish_reason="length" if length == request.sampling.max_tokens else "stop",
            weight_versions=[(0, self._version)],
        )

    def _check(self):
        if self._paused:
            raise EnginePaused("the scripted engine is paused")
        if self._released:
            raise RuntimeError("the scripted engine has been released")

    def metrics(self) -> dict[str, float]:
        """It counts nothing of its own."""
        return {}

    async def load(self, tensors, version):
        self.loaded = [name for name, _ in tensors]
        self._version, self._released = version, False

    async def pause(self):
        self._paused = True

    async def resume(self):
        self._paused = False

    async def release(self):
        self._released = True

    async def restore(self):
        self._released = False

    async def health(self):
        if self._released:
            raise RuntimeError("the scripted engine has been released")
        return self._version
