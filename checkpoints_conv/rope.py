"""Rotary position embeddings in config.json, under the keys of transformers 5 and before it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from checkpoints_conv.errors import ModelError


@dataclass(frozen=True)
class Llama3Rope:
    """Constants of Llama 3's frequency scaling.

    GPTModel's own arguments carry only the factor and fix the others at 1, 4 and 8192, so the model
    scales its frequencies with these after it is built.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class Rope:
    """The rotary embedding of a model. Made by `parse_rope`."""

    base: float  # theta
    linear_factor: float | None  # of position interpolation; None for none
    llama3: Llama3Rope | None  # None for none


def positive(key: str, value: Any) -> float:
    """Return a number of config.json; ModelError naming `key` unless it is positive and finite."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ModelError(f"config.json: {key}={value!r} is not a positive number")
    return value


def parse_rope(hf_config: Mapping[str, Any]) -> Rope:
    """Read `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before it).

    Raises ModelError naming the key for a scaling other than default, linear and llama3, for rotary
    embeddings on a part of the head only or per kind of layers, and for a scaling constant that is
    missing.
    """
    # transformers lets a `rope_scaling` that is set win over `rope_parameters`, and so do we.
    key = "rope_scaling" if hf_config.get("rope_scaling") else "rope_parameters"
    parameters = hf_config.get(key) or {}
    if not isinstance(parameters, Mapping):
        raise ModelError(f"config.json: {key}={parameters!r} is not a JSON object")
    nested = [name for name, value in parameters.items() if isinstance(value, Mapping)]
    if nested:
        # transformers keeps these apart by layer type, and its classes of the supported
        # architectures read none of them.
        raise ModelError(
            f"config.json: {key}.{nested[0]} holds rotary embeddings of a kind of layers of their "
            f"own, which is not supported; write rope_type, rope_theta and the like into {key} "
            "itself"
        )
    base = positive(
        "rope_theta", parameters.get("rope_theta", hf_config.get("rope_theta", 10000.0))
    )
    partial = parameters.get("partial_rotary_factor", hf_config.get("partial_rotary_factor"))
    if partial is not None and partial != 1.0:
        raise ModelError(f"config.json: partial_rotary_factor={partial}; only 1.0 is supported")

    def constant(name: str) -> float:
        if parameters.get(name) is None:
            raise ModelError(f"config.json: {key} has no `{name}`, which rope_type {kind!r} needs")
        return positive(f"{key}.{name}", parameters[name])

    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return Rope(base, None, None)
    if kind == "linear":
        return Rope(base, constant("factor"), None)
    if kind == "llama3":
        original = parameters.get("original_max_position_embeddings") or hf_config.get(
            "max_position_embeddings"
        )
        if original is None:
            raise ModelError(
                f"config.json: {key} has no `original_max_position_embeddings`, which 'llama3' "
                "needs"
            )
        scaling = Llama3Rope(
            factor=constant("factor"),
            low_freq_factor=constant("low_freq_factor"),
            high_freq_factor=constant("high_freq_factor"),
            original_max_position_embeddings=positive(
                "original_max_position_embeddings",
                hf_config.get("original_max_position_embeddings", original),
            ),
        )
        return Rope(base, None, scaling)
    raise ModelError(
        f"config.json: {key}.rope_type={kind!r} is not supported; use default, linear or llama3"
    )


def position_limit(hf_config: Mapping[str, Any]) -> int | None:
    """The most positions, prompt and response together, that a model is made for; None: unknown.

    It is max_position_embeddings, which a scaling multiplies as in vLLM and SGLang: not for llama3
    and longrope, whose value holds the factor already; for yarn the original length is multiplied.
    """
    longest = hf_config.get("max_position_embeddings")
    if longest is None:
        return None
    longest = positive("max_position_embeddings", longest)
    scaling = hf_config.get("rope_scaling") or hf_config.get("rope_parameters") or {}
    if not isinstance(scaling, Mapping) or scaling.get("factor") is None:
        return int(longest)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    original = scaling.get("original_max_position_embeddings")
    factor = positive("rope_scaling.factor", scaling["factor"])
    if kind == "yarn" and original is not None:
        return int(max(longest, factor * positive("original_max_position_embeddings", original)))
    if kind in ("default", "llama3", "longrope", "su") or original is not None:
        return int(longest)
    return int(factor * longest)
