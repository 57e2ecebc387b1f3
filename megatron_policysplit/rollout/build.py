"""Builds the engine that a leader generates with."""

from __future__ import annotations

from typing import Any

from checkpoints_conv import read_hf_config
from megatron_policysplit.config import ModelConfig, RolloutConfig
from megatron_policysplit.config.secrets import api_key
from megatron_policysplit.data.stop_tokens import stop_token_ids
from megatron_policysplit.distributed.device import training_device
from megatron_policysplit.rollout.engine import InProcessEngine
from megatron_policysplit.rollout.sglang import SglangEngine


def engine_in_process(
    model: ModelConfig, rollout: RolloutConfig, tokenizer: Any
) -> InProcessEngine:
    """The `local` or `replay` engine of a leader."""
    if rollout.engine == "replay":
        from megatron_policysplit.rollout.replay import ReplayEngine

        return ReplayEngine(rollout.replay_dir)
    from megatron_policysplit.rollout.local import LocalEngine

    return LocalEngine(
        model.path,
        stop_token_ids(model.path, tokenizer),
        dtype=model.dtype,
        max_batch_samples=rollout.max_batch_samples,
        device=training_device(),
    )


def sglang_engine(
    model: ModelConfig, rollout: RolloutConfig, url: str, tokenizer: Any
) -> SglangEngine:
    """The engine of a leader; `url` is a server or a router in front of several."""
    return SglangEngine(
        url,
        api_key=api_key(rollout),
        stop_token_ids=stop_token_ids(model.path, tokenizer),
        vocab_size=read_hf_config(model.path)["vocab_size"],
        concurrency=rollout.concurrency,
        request_seconds=rollout.request_seconds,
        retries=rollout.retries,
        unavailable_seconds=rollout.unavailable_seconds,
        max_staleness=rollout.max_staleness if rollout.overlap else 0,
    )
