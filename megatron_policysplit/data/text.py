"""Text that can be written down: Python's strings may hold halves of characters, UTF-8 may not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_policysplit.errors import DataError, UserError


def check_text(value: Any, source: str, error: type[UserError] = DataError) -> None:
    r"""Raise `error` naming `source` if a text in `value` cannot be written as UTF-8.

    Such a text comes from JSON that names half of a character, such as "\ud83d" without its other
    half, or from a command line that is not UTF-8. A tokenizer, a file and a terminal refuse it.

    value: a text, or lists and mappings of texts; anything else is passed over.
    """
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as problem:
            half = f"U+{ord(value[problem.start]):04X}"
            raise error(
                f"{source} has half of a character ({half} at position {problem.start + 1}), "
                "which no UTF-8 text can hold; repair the text"
            ) from problem
    elif isinstance(value, Mapping):
        for key, item in value.items():
            check_text(key, source, error)
            check_text(item, source, error)
    elif isinstance(value, (list, tuple)):
        for item in value:
            check_text(item, source, error)
