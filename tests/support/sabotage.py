"""Local engines with one fault each: what the agreement gate has to tell apart."""

from __future__ import annotations

from dataclasses import replace

from megatron_policysplit.rollout.local import LocalEngine
from megatron_policysplit.rows import Mode
from tests.support.advantage_batches import other

NEW_SYSTEM = [5, 6, 7]  # what another version of a chat template puts before the prompt


class OtherTemperature(LocalEngine):
    """Samples the normal mode at 0.8 times the temperature asked for."""

    async def submit(self, requests):
        changed = [
            replace(request, sampling=replace(request.sampling, temperature=0.8 * request.sampling.temperature))
            if request.mode == Mode.NORMAL
            else request
            for request in requests
        ]
        async for rollout in super().submit(changed):
            yield rollout


class SwappedTemperatures(LocalEngine):
    """Samples each mode with the other mode's settings."""

    async def submit(self, requests):
        plans = {request.mode: request.sampling for request in requests}
        changed = [replace(request, sampling=plans[other(request.mode)]) for request in requests]
        async for rollout in super().submit(changed):
            yield rollout


class Untempered(LocalEngine):
    """Samples at the temperature asked for, and gives the log-probs of temperature 1."""

    async def submit(self, requests):
        prompts = {(request.question, request.mode): request.prompt for request in requests}
        async for rollout in super().submit(requests):
            (scores,) = await self.log_probs([(prompts[rollout.question, rollout.mode], rollout.tokens)])
            yield replace(rollout, engine_logprobs=scores)


class SwappedPrompts(LocalEngine):
    """Samples each mode behind the other mode's prompt."""

    async def submit(self, requests):
        prompts = {(request.question, request.mode): request.prompt for request in requests}
        changed = [replace(request, prompt=prompts[request.question, other(request.mode)]) for request in requests]
        async for rollout in super().submit(changed):
            yield rollout


class NewTemplate(LocalEngine):
    """Samples behind prompts that another version of the chat template makes."""

    async def submit(self, requests):
        changed = [replace(request, prompt=[*NEW_SYSTEM, *request.prompt]) for request in requests]
        async for rollout in super().submit(changed):
            yield rollout


class AddsBos(LocalEngine):
    """Puts the beginning-of-sequence token (the model's id 1) before every prompt, also when it scores."""

    async def submit(self, requests):
        async for rollout in super().submit([replace(r, prompt=[1, *r.prompt]) for r in requests]):
            yield rollout

    async def log_probs(self, sequences):
        return await super().log_probs([([1, *prompt], response) for prompt, response in sequences])


class DamagedOnce(LocalEngine):
    """The first time it is given weights, one tensor arrives damaged."""

    damaged = False

    async def load(self, tensors, version):
        if self.damaged:
            return await super().load(tensors, version)
        self.damaged = True
        changed = (
            (name, tensor.flip(0) if name.endswith("0.mlp.up_proj.weight") else tensor) for name, tensor in tensors
        )
        return await super().load(changed, version)


class WrongMapping(LocalEngine):
    """Takes each layer's key projection rotated by one head dimension, every time."""

    async def load(self, tensors, version):
        changed = ((name, tensor.roll(1, 0) if name.endswith("k_proj.weight") else tensor) for name, tensor in tensors)
        return await super().load(changed, version)


class StaleOnce(LocalEngine):
    """The first time it is given weights, it counts them and keeps the old ones."""

    given = False

    async def load(self, tensors, version):
        if self.given:
            return await super().load(tensors, version)
        for _ in tensors:
            pass
        self.given, self._version = True, version


class Bfloat16(LocalEngine):
    """Serves in bfloat16 whatever was configured."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options | {"dtype": "bfloat16"})


class TwoServers(LocalEngine):
    """As two servers behind one address: the one that takes odd questions never gets new weights. It never scores."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.stale = LocalEngine(*args, **options)

    async def submit(self, requests):
        async for rollout in super().submit([request for request in requests if request.question % 2 == 0]):
            yield rollout
        async for rollout in self.stale.submit([request for request in requests if request.question % 2]):
            yield replace(rollout, weight_versions=[(0, self._version)])
