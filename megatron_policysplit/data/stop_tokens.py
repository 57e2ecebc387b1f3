"""The tokens that end a response.

A model directory names them in up to three places, and none of these is complete in all models: a
fine-tuned model may end its turns with a token that only its tokenizer names. So all count, as they
do for SGLang and vLLM.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_policysplit.data.tokenizer import is_made_up, named_token, read_json, token_id
from megatron_policysplit.errors import ModelError

_FILES = ("generation_config.json", "config.json")
# What ends a message of Llama 3 that calls a tool. SGLang stops at it wherever a tokenizer has it.
_END_OF_MESSAGE = "<|eom_id|>"


def stop_token_ids(model_path: str | Path, tokenizer) -> list[int]:
    """Every id that ends a response, ascending; all of them are ids that the model can generate.

    They are the eos_token_id of generation_config.json and of config.json, and the tokenizer's eos
    token. Raises ModelError if none of them has one, and as `check_stop_tokens` does.
    """
    named, vocab_size = _named_ids(model_path), _vocab_size(model_path)
    ids, token, id = set(named), tokenizer.eos_token, tokenizer.eos_token_id
    if id is not None and is_made_up(model_path, token):
        # transformers makes one up for a class that has a default: no model has learnt it.
        if not named:
            raise _unknown_token(model_path, token)
        ids.update([id] if vocab_size is None or id < vocab_size else [])
    elif id is not None:
        _check_id(model_path, id, _of_tokenizer(token))
        ids.add(id)
    if not ids:
        raise _no_stop_token(model_path)
    of_message = tokenizer.get_added_vocab().get(_END_OF_MESSAGE)
    if of_message is not None and (vocab_size is None or of_message < vocab_size):
        ids.add(of_message)
    return sorted(ids)


def check_stop_tokens(model_path: str | Path) -> None:
    """Check what `stop_token_ids` reads, from files alone.

    Raises ModelError naming the file and the value for an eos_token_id that is neither an id nor a
    list of ids, or is outside the model's vocabulary, for an eos_token that is no token, and where
    no file names one that the model can have learnt.
    """
    ids, token = _named_ids(model_path), named_token(model_path, "eos_token")
    if token is not None and (id := token_id(model_path, token)) is not None:
        _check_id(model_path, id, _of_tokenizer(token))
    elif token is not None and not ids and is_made_up(model_path, token):
        raise _unknown_token(model_path, token)
    if not ids and token is None:
        raise _no_stop_token(model_path)


def _named_ids(model_path: str | Path) -> list[int]:
    """The ids of generation_config.json and config.json; null and an empty list name none."""
    ids: list[int] = []
    for file in _FILES:
        path = Path(model_path) / file
        value = read_json(path).get("eos_token_id")
        for id in value if isinstance(value, list) else [] if value is None else [value]:
            if type(id) is not int:  # JSON's true is an int to isinstance
                raise ModelError(
                    f"{path}: eos_token_id={_show(value)} is neither a token id nor a list of "
                    "token ids; write whole numbers, such as 2 or [2, 5]"
                )
            _check_id(model_path, id, f"{path}: eos_token_id={_show(value)}")
            ids.append(id)
    return ids


def _check_id(model_path: str | Path, id: int, source: str) -> None:
    """Raise ModelError for an id that the model cannot generate."""
    size = _vocab_size(model_path)
    if id < 0 or (size is not None and id >= size):
        span = "negative" if size is None else f"outside the model's vocabulary of 0 to {size - 1}"
        raise ModelError(
            f"{source} has the token id {id}, which is {span}; name the token that ends a turn"
        )


def _vocab_size(model_path: str | Path) -> int | None:
    """Rows of the model's embedding; None where config.json does not say."""
    size = read_json(Path(model_path) / "config.json").get("vocab_size")
    return size if type(size) is int else None


def _of_tokenizer(token: str) -> str:
    return f"the tokenizer's eos_token {token!r}"


def _unknown_token(model_path: str | Path, token: str) -> ModelError:
    return ModelError(
        f"{_of_tokenizer(token)} is in no file of {model_path} that holds tokens, so no response "
        "would end; set eos_token_id in its generation_config.json, or copy the tokenizer's files "
        "from the model that this one was made of"
    )


def _no_stop_token(model_path: str | Path) -> ModelError:
    return ModelError(
        f"{model_path} names no end-of-sequence token, so no response would end; set eos_token_id "
        "in its generation_config.json"
    )


def _show(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
