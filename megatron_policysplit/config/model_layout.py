"""Checks of a parallel layout and of lengths against the dimensions of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import gcd
from typing import Any

from checkpoints_conv.architectures import ARCHITECTURES, find_architecture
from checkpoints_conv.rope import position_limit
from megatron_policysplit.errors import ConfigError


def check_layout(
    hf_config: Mapping[str, Any],
    tensor: int,
    pipeline: int,
    expert: int = 1,
    *,
    sequence: bool = False,
) -> None:
    """Raise ConfigError if the model cannot be cut into equal parts.

    hf_config: config.json of the model.
    tensor, pipeline, expert: the parallel sizes.
    sequence: whether tensor-parallel ranks split the tokens; a mixture of experts requires it.
    """
    architecture = find_architecture(hf_config)
    sizes = architecture.sizes(hf_config)
    inner = (
        {"moe_intermediate_size": sizes.expert_ffn}
        if architecture.moe
        else {"intermediate_size": sizes.ffn}
    )
    parts = {
        "parallel.tensor": (
            tensor,
            {"num_attention_heads": sizes.heads, "num_key_value_heads": sizes.kv_heads, **inner},
        ),
        "parallel.pipeline": (pipeline, {"num_hidden_layers": sizes.layers}),
    }
    if architecture.moe:
        parts["parallel.expert"] = (expert, {"num_experts": sizes.experts})
        if tensor > 1 and not sequence:
            raise ConfigError(
                f"parallel.tensor={tensor} with parallel.sequence=false: {architecture.name} has "
                "experts, and Megatron-Core trains them under tensor parallelism only with "
                "parallel.sequence=true"
            )
    elif expert > 1:
        raise ConfigError(
            f"parallel.expert={expert}, but {architecture.name} has no experts; use 1"
        )
    for key, (size, dimensions) in parts.items():
        for dimension, total in dimensions.items():
            if total % size:
                # Not the divisors of this dimension alone: the others must be divided, too.
                possible = _common_divisors(dimensions.values())
                raise ConfigError(
                    f"{key}={size} does not divide {dimension}={total} of the model; use {possible}"
                )


def model_positions(hf_config: Mapping[str, Any]) -> int | None:
    """The most positions a model is made for; None where neither it nor its architecture says.

    hf_config: config.json. Where it has no max_position_embeddings, transformers' default for the
    architecture counts. Raises ModelError for a value that is not a positive number.
    """
    names, model_type = hf_config.get("architectures") or [], hf_config.get("model_type")
    defaults = next(
        (
            architecture.defaults
            for architecture in ARCHITECTURES
            if architecture.name in names or architecture.model_type == model_type
        ),
        {},
    )
    given = {key: value for key, value in hf_config.items() if value is not None}
    return position_limit({**defaults, **given})


def check_positions(
    hf_config: Mapping[str, Any], max_prompt_tokens: int, max_response_tokens: int
) -> None:
    """Raise ConfigError if a prompt and its response may need more positions than the model has.

    max_prompt_tokens, max_response_tokens: of `data` and `rollout`.
    """
    limit, needed = model_positions(hf_config), max_prompt_tokens + max_response_tokens
    if limit is None or needed <= limit:
        return
    if max_response_tokens < limit:
        remedy = (
            f"use at most data.max_prompt_tokens={limit - max_response_tokens} (longer prompts are "
            "dropped), or lower rollout.max_response_tokens"
        )
    else:
        remedy = f"use rollout.max_response_tokens below {limit}, and both together at most {limit}"
    raise ConfigError(
        f"data.max_prompt_tokens={max_prompt_tokens} + rollout.max_response_tokens="
        f"{max_response_tokens} = {needed} positions are more than the {limit} of the model "
        f"(max_position_embeddings in config.json); {remedy}"
    )


def _common_divisors(totals: Iterable[int]) -> str:
    """The common divisors in words: `1, 2 or 4`."""
    greatest = gcd(*totals)
    *smaller, last = (str(n) for n in range(1, greatest + 1) if greatest % n == 0)
    return f"{', '.join(smaller)} or {last}" if smaller else last
