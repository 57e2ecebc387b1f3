"""The tokenizer of a model directory: its files, its chat template, and tokens without embedding.

All but `load_tokenizer` read files only, so that a directory is checked before a slow import.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron_policysplit.errors import ModelError

# Each of these sets of files holds a vocabulary that transformers can load.
_VOCABULARIES = (
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("vocab.json", "merges.txt"),
    ("spiece.model",),
    ("sentencepiece.bpe.model",),
    ("tiktoken.model",),
    ("tekken.json",),
    ("vocab.txt",),
)
_JSON_VOCABULARIES = ("tokenizer.json", "vocab.json")  # the first of them counts
_PROBE = "What is 1 + 2? Say it in words, abc."


def check_tokenizer_files(model_path: str | Path) -> None:
    """Raise ModelError naming what is missing if a model directory has no tokenizer's vocabulary.

    transformers makes an empty tokenizer for such a directory.
    """
    directory = Path(model_path)
    for files in _VOCABULARIES:
        if all((directory / file).is_file() for file in files):
            return
    for files in _VOCABULARIES:
        if present := [file for file in files if (directory / file).is_file()]:
            missing = next(file for file in files if file not in present)
            raise ModelError(
                f"{directory} has {present[0]} of a tokenizer but not {missing}; copy it from the "
                "model that this one was made of, or copy that model's tokenizer.json"
            )
    raise ModelError(
        f"{directory} has no tokenizer: tokenizer.json is missing (tokenizer.model, or vocab.json "
        "with merges.txt, would do); copy the tokenizer's files from the model that this one was "
        "made of"
    )


def has_chat_template(model_path: str | Path) -> bool:
    """Whether the tokenizer in a model directory has a chat template."""
    directory = Path(model_path)
    file = directory / "chat_template.jinja"
    try:
        if file.is_file() and file.read_text(encoding="utf-8").strip():
            return True
    except UnicodeDecodeError as error:
        raise ModelError(f"{file} is not UTF-8 text; save it as UTF-8") from error
    return bool(read_json(directory / "tokenizer_config.json").get("chat_template"))


def tokens_beyond(model_path: str | Path, vocab_size: int) -> list[tuple[str, int]]:
    """The tokens for which the model has no embedding, by id, as far as JSON files name them.

    vocab_size: of config.json; ids are below it. The ids of a sentencepiece model are looked at
    when prompts are built.
    """
    return [(token, id) for id, token in _vocabulary(model_path) if id >= vocab_size]


def token_id(model_path: str | Path, token: str) -> int | None:
    """The id of a token that the tokenizer's JSON files name; None for one that they do not."""
    return next((id for id, text in _vocabulary(model_path) if text == token), None)


def is_made_up(model_path: str | Path, token: str) -> bool:
    """Whether no file of the tokenizer holds a token, so that transformers adds it behind all ids.

    False for a vocabulary that is not in a JSON file, which cannot be told from here.
    """
    is_known = any((Path(model_path) / file).is_file() for file in _JSON_VOCABULARIES)
    return is_known and token_id(model_path, token) is None


def named_token(model_path: str | Path, name: str) -> str | None:
    """A special token of tokenizer_config.json, such as eos_token; None where it has none.

    Raises ModelError for a value that is no token, which transformers would not load.
    """
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        path = Path(model_path) / file
        value = read_json(path).get(name)
        token = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(token, str):
            return token
        if value is not None:
            raise ModelError(
                f"{path}: {name}={json.dumps(value, ensure_ascii=False)} is not the text of a "
                "token; write the token as the vocabulary has it"
            )
    return None


def _vocabulary(model_path: str | Path) -> tuple[tuple[int, str], ...]:
    """(id, token) of the tokenizer's JSON files in the order of ids; () without them."""
    directory = Path(model_path)
    files = (
        *[file for file in _JSON_VOCABULARIES if (directory / file).is_file()][:1],
        "added_tokens.json",
        "tokenizer_config.json",
    )
    pairs: dict[int, str] = {}
    for path in (directory / file for file in files):
        if path.is_file():
            status = path.stat()
            pairs.update(_read_vocabulary(path, status.st_mtime_ns, status.st_size))
    return tuple(sorted(pairs.items()))


@lru_cache(maxsize=4)  # a file of 10 MB takes a second, and several checks ask for it
def _read_vocabulary(file: Path, changed_ns: int, size: int) -> tuple[tuple[int, str], ...]:
    """(id, token) of one JSON file: of a fast tokenizer, a vocabulary, added tokens or settings."""
    content = read_json(file)
    pairs: dict[int, str] = {}
    if file.name == "tokenizer_config.json":
        decoder = content.get("added_tokens_decoder")
        for id, entry in decoder.items() if isinstance(decoder, Mapping) else ():
            if isinstance(entry, Mapping) and id.isdecimal():
                pairs[int(id)] = str(entry.get("content"))
        return tuple(pairs.items())
    vocabulary, added = content, None
    if file.name == "tokenizer.json":
        model, added = content.get("model"), content.get("added_tokens")
        vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocabulary, Mapping):
        pairs.update({id: token for token, id in vocabulary.items() if type(id) is int})
    elif isinstance(vocabulary, list):  # of [token, score], whose place is the id
        entries = enumerate(vocabulary)
        pairs.update({id: str(e[0]) for id, e in entries if isinstance(e, list) and e})
    for entry in added if isinstance(added, list) else []:
        if isinstance(entry, Mapping) and type(entry.get("id")) is int:
            pairs[entry["id"]] = str(entry.get("content"))
    return tuple(pairs.items())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty if the file does not exist; ModelError if it is damaged."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON ({error}); restore the file") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} does not hold a JSON object; restore the file")
    return content


def load_tokenizer(path: str):
    """Load the tokenizer of a model directory, without running its code.

    Raises ModelError, also for one that makes no ids of plain text.
    """
    from checkpoints_conv import read_hf_config

    read_hf_config(path)  # a wrong directory is told before the slow import
    check_tokenizer_files(path)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # transformers and tokenizers raise many kinds for a damaged one
        raise ModelError(f"cannot load the tokenizer in {path}: {error}") from error
    if not tokenizer(_PROBE, add_special_tokens=False)["input_ids"]:
        raise ModelError(
            f"the tokenizer in {path} makes no tokens of plain text, as its vocabulary is empty or "
            "damaged; copy the tokenizer's files from the model that this one was made of"
        )
    return tokenizer
