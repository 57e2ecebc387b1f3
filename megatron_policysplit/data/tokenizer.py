"""The tokenizer of a model directory, its stop tokens, and whether it has a chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_policysplit.errors import ModelError


def has_chat_template(model_path: str | Path) -> bool:
    """Whether the tokenizer in a model directory has a chat template.

    Reads files only; unlike `load_tokenizer` it imports nothing heavy.
    """
    directory = Path(model_path)
    file = directory / "chat_template.jinja"
    if file.is_file() and file.read_text(encoding="utf-8").strip():
        return True
    return bool(_read_json(directory / "tokenizer_config.json").get("chat_template"))


def stop_token_ids(model_path: str | Path, tokenizer) -> list[int]:
    """Every end-of-sequence id of a model.

    They come from generation_config.json, else from config.json, else from the tokenizer. Raises
    ModelError if none of them has one.
    """
    for name in ("generation_config.json", "config.json"):
        ids = _read_json(Path(model_path) / name).get("eos_token_id")
        if ids is not None:
            return [ids] if isinstance(ids, int) else list(ids)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{model_path} names no end-of-sequence token; set eos_token_id in its "
            "generation_config.json"
        )
    return [tokenizer.eos_token_id]


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty if the file does not exist; ModelError if it is damaged."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON ({error}); restore the file") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} does not hold a JSON object; restore the file")
    return content


def load_tokenizer(path: str):
    """Load the tokenizer of a model directory, without running its code. Raises ModelError."""
    from checkpoints_conv import read_hf_config

    read_hf_config(path)  # a wrong directory is told before the slow import
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise many kinds for a damaged one
        raise ModelError(f"cannot load the tokenizer in {path}: {error}") from error
