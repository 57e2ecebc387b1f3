"""Weights for engines in the trainer's own processes (`local`, `replay`), one in every leader's."""

from __future__ import annotations

import asyncio

from megatron_policysplit.actor.actor import Actor
from megatron_policysplit.actor.weights import consume_weights
from megatron_policysplit.rollout.engine import InProcessEngine


def load_in_process(actor: Actor, engine: InProcessEngine | None, version: int) -> None:
    """Stream the weights into the leader's engine (None on other ranks), as `version`.

    Collective over all ranks, in the main thread (`consume_weights`). If the engine fails on one
    rank, all ranks raise.
    """

    def take(stream) -> None:
        # Each step of the stream is a collective, which only the main thread may call. So `load`
        # gets an event loop of its own here, not the control loop, on which the engine generates.
        if engine is not None:
            asyncio.run(engine.load(stream, version))

    consume_weights(actor.model, actor.hf_config, "leader", take)
