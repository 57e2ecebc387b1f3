"""Checks that an SGLang server fits this run, before any weight moves.

It must have the architecture and tokenizer of model.path, and a context that is long enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoints_conv import model_keys, read_hf_config
from megatron_policysplit.errors import EngineError
from megatron_policysplit.serving.members import Member

# Digits, punctuation, words, bytes outside ASCII: tokenizers that agree on it share a vocabulary.
PROBE = "What is 12 + 345, step by step?\n\tAnswer: \\boxed{357} é 猫 🙂 def f(x): return x**2"

SPARE_TOKENS = 7  # without them SGLang 0.5.23 cuts responses (2), or refuses to score them (7)


@dataclass(frozen=True)
class Identity:
    """What an engine must match to serve this run."""

    model_type: str
    probe_ids: list[int]  # of `PROBE`, special tokens left out
    tokens: int  # of the longest row, prompt and response
    # Of config.json; compared where the server's own model directory can be read from here.
    sizes: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, hf_config: Mapping[str, Any], tokenizer, tokens: int) -> Identity:
        """Build it from config.json, the tokenizer and the longest row of a run."""
        probe_ids = tokenizer.encode(PROBE, add_special_tokens=False)
        return cls(hf_config["model_type"], probe_ids, tokens, model_keys(hf_config))


async def check_identity(member: Member, identity: Identity) -> None:
    """Check an engine, and note its tensor-parallel size and precision in `member`.

    Raises EngineError naming what differs.
    """
    try:
        await _check(member, identity)
    # What something other than SGLang answers may have any form.
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise EngineError(
            f"{member.address} does not answer as an SGLang server does ({type(error).__name__}: "
            f"{error}); is it one, and of a version that this run supports?"
        ) from error


async def _check(member: Member, identity: Identity) -> None:
    client = member.client
    info = await client.model_info()
    if info.get("model_type") != identity.model_type:
        raise EngineError(
            f"the server at {client.address} serves {info.get('model_path')} of type "
            f"{info.get('model_type')}, but model.path is of type {identity.model_type}; start it "
            "with the directory of model.path"
        )
    _check_sizes(client.address, Path(str(info.get("model_path"))), identity)
    ids = await client.tokenize(PROBE)
    if ids != identity.probe_ids:
        raise EngineError(
            f"the server at {client.address} has another tokenizer than model.path: {len(ids)} ids "
            f"against {len(identity.probe_ids)} for the same text, or other ones; start it with "
            "the directory of model.path"
        )
    models = await client.call("GET", "/v1/models")
    context = models["data"][0].get("max_model_len")
    if context is not None and context < identity.tokens + SPARE_TOKENS:
        raise EngineError(
            f"the server at {client.address} has a context of {context} tokens, but "
            f"data.max_prompt_tokens + rollout.max_response_tokens = {identity.tokens}, and SGLang "
            f"needs {SPARE_TOKENS} more; lower those or raise context-length "
            "(rollout.server.arguments)"
        )
    server = await client.server_info()
    member.tensor, member.dtype = server["tp_size"], str(server["dtype"])


def _check_sizes(address: str, directory: Path, identity: Identity) -> None:
    """Compare config.json: SGLang takes weights of other layers, or fewer, without a word."""
    # A server on another machine may have its model where this one has nothing.
    if not (directory / "config.json").is_file():
        return
    for key, server_size in model_keys(read_hf_config(directory)).items():
        size = identity.sizes.get(key)
        if size is not None and server_size is not None and size != server_size:
            raise EngineError(
                f"the server at {address} serves {directory} with {key}={server_size}, but "
                f"model.path has {size}; start it with the directory of model.path"
            )
