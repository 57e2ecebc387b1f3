"""The messages of a row of data, as chat templates take them."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from typing import Any

from megatron_policysplit.data.text import check_text
from megatron_policysplit.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
# What a message may have besides its role and content; a chat template reads it from there.
TEMPLATE_KEYS = ("name", "reasoning_content", "tool_call_id", "tool_calls")
_TEXTS = ("name", "reasoning_content")
# Columns in which data sets keep what belongs to the prompt beside the messages.
_MEDIA = ("images", "videos", "audios")
_SYSTEM_COLUMNS = ("system", "system_prompt")


def read_messages(where: str, source: str, value: Any, *, columnar: bool) -> list[dict[str, Any]]:
    """The messages of a row: text is one of the user's. Raises DataError naming `where`.

    source: the row's column that they come from. columnar: whether they come from a Parquet file,
    in which a key that one row has is null in all others: there, a null is a key that is not given.
    """
    if isinstance(value, str):
        _refuse_json(where, source, value)
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        kind = "an empty list" if value == [] else _kind(value)
        raise DataError(f"{where}: `{source}` is neither text nor a list of messages but {kind}")
    messages = [_message(where, source, entry, columnar) for entry in value]
    if messages[-1]["role"] == "assistant":
        raise DataError(
            f"{where}: `{source}` ends with an assistant message; the last one must ask for a "
            "response"
        )
    if not any(message["role"] == "user" for message in messages):
        raise DataError(f"{where}: `{source}` has no message of the user; add the question")
    last = messages[-1]
    if last["role"] == "user" and not last["content"].strip():
        raise DataError(f"{where}: `{source}` is empty; write the question or remove the row")
    return messages


def read_tools(where: str, value: Any, *, columnar: bool) -> list[dict[str, Any]] | None:
    """The functions that a row offers to the model; None without any. Raises DataError."""
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        kind = "text" if isinstance(value, str) else f"a {type(value).__name__}"
        raise DataError(
            f"{where}: `tools` is {kind}; it must be a list of function schemas, which the chat "
            "template gets, or have another name"
        )
    tools = _without_nulls(value) if columnar else value
    check_text(tools, f"{where}: `tools`")
    return tools


def refuse_lost_columns(where: str, row: Mapping[str, Any], messages: list[dict[str, Any]]) -> None:
    """Raise DataError for a row whose prompt would lack what other columns hold for it.

    Those are lists of media, and a system prompt where the messages do not begin with one.
    """
    for name in _MEDIA:
        if isinstance(row.get(name), list) and row[name]:
            raise DataError(
                f"{where}: `{name}` is not empty, and only text is supported; remove the row, or "
                "rename the column if only the reward reads it"
            )
    for name in _SYSTEM_COLUMNS:
        text = row.get(name)
        if isinstance(text, str) and text.strip() and messages[0]["role"] != "system":
            raise DataError(
                f"{where}: `{name}` would not reach the model; put it first in `messages` with the "
                "role system, or rename the column if only the reward reads it"
            )


def _message(where: str, source: str, entry: Any, columnar: bool) -> dict[str, Any]:
    """One message, checked: role and content, then the keys that it has besides."""
    if not isinstance(entry, dict) or entry.get("role") not in ROLES:
        raise DataError(
            f"{where}: `{source}` has a message without a role of {', '.join(ROLES)}; "
            f"{_what_there_is(entry)}"
        )
    entry = _without_nulls(entry) if columnar else entry
    given = {key: value for key, value in entry.items() if value is not None and value != []}
    calls = given.get("tool_calls")
    content = given.get("content", "" if calls else None)
    if not isinstance(content, str):
        raise DataError(
            f"{where}: `{source}` has a message whose content is not text; only text is supported, "
            f"and it is {_kind(content)}"
        )
    message = {"role": given["role"], "content": content}
    for key, value in given.items():
        if key in TEMPLATE_KEYS:
            message[key] = value
        elif key not in message:
            raise DataError(
                f"{where}: `{source}` has a message with the key `{key}`, which would be lost; a "
                f"message may have role, content, {', '.join(TEMPLATE_KEYS)}"
            )
    if calls is not None and not (
        isinstance(calls, list) and all(isinstance(call, dict) for call in calls)
    ):
        raise DataError(f"{where}: `{source}` has a message whose `tool_calls` is not a list")
    for key in _TEXTS:
        if not isinstance(message.get(key, ""), str):
            raise DataError(
                f"{where}: `{source}` has a message whose `{key}` is {_kind(message[key])}; it "
                "must be text"
            )
    check_text(message, f"{where}: `{source}`")
    return message


def _what_there_is(entry: Any) -> str:
    """What a message without a role that is known has in its place."""
    if not isinstance(entry, dict):
        return f"it is {_kind(entry)}"
    if "role" in entry:
        return f"its role is {entry['role']!r}"
    if {"from", "value"} <= entry.keys():
        return "call its `from` role, with human as user and gpt as assistant, its `value` content"
    return f"its keys are {', '.join(map(str, entry)) or '(none)'}"


def _kind(value: Any) -> str:
    """What a value is, in the words of JSON."""
    words = {
        **{dict: "an object", list: "a list", bytes: "binary data", str: "text"},
        **{bool: "true or false", int: "a number", float: "a number", type(None): "null"},
    }
    return words.get(type(value), f"a {type(value).__name__}")


def _without_nulls(value: Any) -> Any:
    """The value without the keys that are null, at any depth."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _refuse_json(where: str, source: str, text: str) -> None:
    """Raise DataError for text that is one message or a list of them, as JSON or Python writes it.

    Nobody asks that of a model.
    """
    if "role" not in text or not text.lstrip("\ufeff \t\r\n").startswith(("[", "{")):
        return
    value = _parsed(text.strip("\ufeff \t\r\n"))
    entries = value if isinstance(value, list) else [value]
    if not entries or not all(isinstance(entry, dict) for entry in entries):
        return
    if any("role" in entry and entry.keys() & {"content", "tool_calls"} for entry in entries):
        raise DataError(
            f"{where}: `{source}` is a list of messages written as text; store the list itself"
        )


def _parsed(text: str) -> Any:
    """The value that a text is in JSON or, as tables of text hold it, in Python; else None."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None
