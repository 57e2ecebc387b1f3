"""The text of a response, as rewards, judges, dumps and people read it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from megatron_policysplit.data.stop_tokens import stop_token_ids


def end_token_ids(model_path: str | Path, tokenizer: Any) -> frozenset[int]:
    """The ids that may stand behind a response and are no part of it: stop tokens and padding.

    Raises ModelError where `stop_token_ids` does.
    """
    padding = () if tokenizer.pad_token_id is None else (tokenizer.pad_token_id,)
    return frozenset((*stop_token_ids(model_path, tokenizer), *padding))


def response_text(tokenizer: Any, tokens: Sequence[int], ends: Collection[int]) -> str:
    """A response as text, without the tokens of `ends` (ids) at its end.

    Other special tokens stay as they are written: a model may have been taught `<answer>` or
    `<think>` as special tokens, which a reward looks for.
    """
    length = len(tokens)
    while length and tokens[length - 1] in ends:
        length -= 1
    return tokenizer.decode(tokens[:length], skip_special_tokens=False)
