"""Is an SGLang server the one this run needs? Architecture, tokenizer and context length, before
any weight moves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoints_conv import model_keys, read_hf_config
from megatron_policysplit.errors import EngineError
from megatron_policysplit.serving.members import Member

# Digits, punctuation, words and bytes outside ASCII: tokenizers that agree on all of it share their
# vocabulary.
PROBE = "What is 12 + 345, step by step?\n\tAnswer: \\boxed{357} é 猫 🙂 def f(x): return x**2"

SPARE_TOKENS = 7  # without them SGLang 0.5.23 cuts responses (2), or refuses to score them (7)


@dataclass(frozen=True)
class Identity:
    """What an engine must match. probe_ids: ids of `PROBE`, special tokens left out. tokens: the
    longest row.
    sizes: of config.json; compared where the server's own model directory can be read from here.
    """

    model_type: str
    probe_ids: list[int]
    tokens: int
    sizes: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, hf_config: Mapping[str, Any], tokenizer, tokens: int) -> Identity:
        probe_ids = tokenizer.encode(PROBE, add_special_tokens=False)
        return cls(hf_config["model_type"], probe_ids, tokens, model_keys(hf_config))


async def check_identity(member: Member, wanted: Identity) -> None:
    """Notes the engine's tensor-parallel size and precision; raises EngineError naming what
    differs.
    """
    try:
        await _check(member, wanted)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise EngineError(
            f"{member.address} does not answer as an SGLang server does ({type(error).__name__}: "
            f"{error}); is it one, "
            "and of a version that this run supports?"
        ) from error


async def _check(member: Member, wanted: Identity) -> None:
    client = member.client
    info = await client.model_info()
    if info.get("model_type") != wanted.model_type:
        raise EngineError(
            f"the server at {client.address} serves {info.get('model_path')} of type "
            f"{info.get('model_type')}, but "
            f"model.path is of type {wanted.model_type}; start it with the directory of model.path"
        )
    _check_sizes(client.address, Path(str(info.get("model_path"))), wanted)
    ids = await client.tokenize(PROBE)
    if ids != wanted.probe_ids:
        raise EngineError(
            f"the server at {client.address} has another tokenizer than model.path: {len(ids)} ids "
            "against "
            f"{len(wanted.probe_ids)} for the same text, or other ones; start it with the "
            "directory of model.path"
        )
    models = await client.call("GET", "/v1/models")
    longest = models["data"][0].get("max_model_len")
    if longest is not None and longest < wanted.tokens + SPARE_TOKENS:
        raise EngineError(
            f"the server at {client.address} has a context of {longest} tokens, but "
            "data.max_prompt_tokens + "
            f"rollout.max_response_tokens = {wanted.tokens}, and SGLang needs {SPARE_TOKENS} more; "
            "lower those "
            "or raise context-length (rollout.server.arguments)"
        )
    server = await client.server_info()
    member.tensor, member.dtype = server["tp_size"], str(server["dtype"])


def _check_sizes(address: str, directory: Path, wanted: Identity) -> None:
    """SGLang takes weights of another number of layers, or of other layers, without a word."""
    if not (directory / "config.json").is_file():
        return
    for key, theirs in model_keys(read_hf_config(directory)).items():
        ours = wanted.sizes.get(key)
        if ours is not None and theirs is not None and ours != theirs:
            raise EngineError(
                f"the server at {address} serves {directory} with {key}={theirs}, but model.path "
                f"has {ours}; start it "
                "with the directory of model.path"
            )
