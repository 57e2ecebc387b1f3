"""Weights for engines that live in the trainer's own processes (`local`, `replay`): one beside
every leader.
"""

from __future__ import annotations

import asyncio

from megatron_policysplit.actor.actor import Actor
from megatron_policysplit.actor.weights import consume_weights
from megatron_policysplit.rollout.engine import InProcessEngine


def load_in_process(actor: Actor, engine: InProcessEngine | None, version: int) -> None:
    """Stream the weights into the leader's engine (None on other ranks). Collective over all ranks.

    In the main thread, as every collective: `Engine.load` reads the stream in the thread that it
    runs in, so it gets an event loop of its own here, not the one on which it generates.
    """

    def take(stream) -> None:
        if engine is not None:
            asyncio.run(engine.load(stream, version))

    consume_weights(actor.model, actor.hf_config, "leader", take)
