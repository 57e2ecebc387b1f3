"""Builds the engine that a leader generates with."""

from __future__ import annotations

from checkpoints_conv import read_hf_config
from megatron_policysplit.config import Config
from megatron_policysplit.config.secrets import api_key
from megatron_policysplit.data.tokenizer import stop_token_ids
from megatron_policysplit.distributed.device import training_device
from megatron_policysplit.rollout.engine import InProcessEngine
from megatron_policysplit.rollout.sglang import SglangEngine


def engine_in_process(config: Config, tokenizer) -> InProcessEngine:
    """The `local` or `replay` engine of a leader."""
    if config.rollout.engine == "replay":
        from megatron_policysplit.rollout.replay import ReplayEngine

        return ReplayEngine(config.rollout.replay_dir)
    from megatron_policysplit.rollout.local import LocalEngine

    return LocalEngine(
        config.model.path,
        stop_token_ids(config.model.path, tokenizer),
        dtype=config.model.dtype,
        max_batch_samples=config.rollout.max_batch_samples,
        device=training_device(),
    )


def sglang_engine(config: Config, url: str, tokenizer) -> SglangEngine:
    """The engine of a leader; `url` is a server or a router in front of several."""
    rollout = config.rollout
    return SglangEngine(
        url,
        api_key=api_key(config),
        stop_token_ids=stop_token_ids(config.model.path, tokenizer),
        vocab_size=read_hf_config(config.model.path)["vocab_size"],
        concurrency=rollout.concurrency,
        request_seconds=rollout.request_seconds,
        retries=rollout.retries,
        unavailable_seconds=rollout.unavailable_seconds,
        max_staleness=rollout.max_staleness if rollout.overlap else 0,
    )
