"""The settings in a configuration file and in `key=value` overrides, under their keys' full names.

`load` makes a `Config` of them. Every mistake is one sentence that names the key or the file.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from megatron_policysplit.config import yaml_values
from megatron_policysplit.config.keys import Key, expand_user, list_keys
from megatron_policysplit.config.schema import CONFIG_FILE as CONFIG_FILE
from megatron_policysplit.config.schema import Config
from megatron_policysplit.config.yaml_values import Source
from megatron_policysplit.errors import ConfigError

KEYS: dict[str, Key] = {key.name: key for key in list_keys(Config)}
GROUPS = {name.rsplit(".", depth)[0] for name in KEYS for depth in range(1, name.count(".") + 1)}


def read_settings(path: str | None, overrides: list[str]) -> list[tuple[str, Any]]:
    """The (full key, value) pairs of a file, if any, then of overrides, `${...}` unresolved.

    Raises ConfigError for what cannot be read, an unknown key, and a value that is not of its key's
    type as it is written.
    """
    settings = list(_read_file(path)) if path is not None else []
    for override in overrides:
        settings += _read_override(override)
    return settings


def _read_file(path: str) -> list[tuple[str, Any]]:
    """The (full key, value) pairs of a YAML file, interpolations unresolved. Raises ConfigError."""
    text = read_yaml_text(path, "configuration file")
    try:
        root = yaml_values.compose(text)
    except yaml.YAMLError as error:
        raise ConfigError(yaml_error(f"configuration file {path}", error)) from error
    if root is None or yaml_values.is_null(root):
        return []
    if not isinstance(root, yaml.MappingNode):
        what = "a list" if isinstance(root, yaml.SequenceNode) else "a single value"
        raise ConfigError(
            f"configuration file {path} is not a mapping of keys to values: it holds {what}"
        )
    return list(_leaves(root, Source(text, path)))


def read_yaml_text(path: str | Path, what: str) -> str:
    """The text of a YAML file. Raises ConfigError. what: its kind, for the errors."""
    file = Path(expand_user(str(path), what))
    try:
        return file.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigError(f"{what} {path} does not exist") from error
    except IsADirectoryError as error:
        inside = file / CONFIG_FILE
        remedy = f"give {inside}" if inside.is_file() else "give the path of a YAML file"
        raise ConfigError(f"{what} {path} is a directory; {remedy}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{what} {path} is not valid YAML: it cannot be read as UTF-8 text"
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{what} {path} cannot be read ({reason}); give another file") from error


def yaml_error(what: str, error: yaml.YAMLError) -> str:
    """The sentence about a text that is not YAML. what: the text, for the error."""
    mark = getattr(error, "problem_mark", None)
    where = f", line {mark.line + 1}" if mark else ""
    reason = getattr(error, "problem", None) or "it holds a character that YAML does not allow"
    return f"{what}{where} is not valid YAML: {reason}"


def _read_override(override: str) -> list[tuple[str, Any]]:
    """The (full key, value) pairs of one `key=value`. Raises ConfigError."""
    name, equals, value = override.partition("=")
    name = name.strip()
    if not equals or not name:
        raise ConfigError(f"override {override!r} is not of the form key=value")
    name = re.sub(r"\[([^][]*)\]", r".\1", name)
    key, path = _find(name)
    declared = None if key is None else _text_key(key, path, value)
    if declared is not None:
        text = yaml_values.read_text(name, value, optional=declared.optional)
        return [(key.name, _nest(path, text))]
    source = Source(value)
    try:
        node = yaml_values.compose(value)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"the value of {name}={value} is not valid YAML; put it in quotes"
        ) from error
    if node is None:
        node = yaml_values.compose("null")
    if path:
        return [(key.name, _nest(path, yaml_values.read_entry(key, path, node, source)))]
    return list(_leaf(name, node, source))


def _text_key(key: Key, path: tuple[str, ...], value: str) -> Key | None:
    """The key whose text `value` is, as it stands; None where the value is YAML.

    path: within a mapping.
    """
    if not path:
        return key if key.type is str else None
    word = value.strip()
    declared = yaml_values.entry_key(key, path)
    if declared is not None:
        is_entry = len(path) == 1 and word.startswith("{")
        return declared if declared.type is str and not is_entry else None
    is_yaml = word.startswith(("[", "{")) or word.lower() in ("true", "false")
    is_text = key.verbatim and len(path) == 1 and not is_yaml
    return Key(key.name, str, True, None, "") if is_text else None


def _find(name: str) -> tuple[Key | None, tuple[str, ...]]:
    """The key of a full name, and the rest of the name where the key is a mapping."""
    if name in KEYS:
        return KEYS[name], ()
    parts = name.split(".")
    for length in range(1, len(parts)):
        key = KEYS.get(".".join(parts[:length]))
        if key is not None and key.type is dict:
            return key, tuple(parts[length:])
    return None, ()


def _nest(path: tuple[str, ...], value: Any) -> Any:
    """`value` at `path` in nested mappings."""
    for part in reversed(path):
        value = {part: value}
    return value


def _leaves(node: yaml.MappingNode, source: Source, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The (full key, value) pairs of a nested mapping; an empty group sets nothing."""
    for part, value in yaml_values.pairs(node):
        yield from _leaf(f"{prefix}{part}", value, source)


def _leaf(name: str, node: yaml.Node, source: Source) -> Iterator[tuple[str, Any]]:
    """The (full key, value) pairs of a key or group. Raises ConfigError where it is neither."""
    key, path = _find(name)
    is_mapping = isinstance(node, yaml.MappingNode)
    if key is not None and path:
        yield key.name, _nest(path, yaml_values.read_entry(key, path, node, source))
    elif key is not None:
        # A list or mapping with nothing behind its colon is null in YAML: the default.
        if not (key.type in (dict, list) and yaml_values.is_null(node)):
            yield name, yaml_values.read_value(key, node, source)
    elif name in GROUPS:
        if is_mapping:
            yield from _leaves(node, source, name + ".")
        elif not yaml_values.is_null(node):
            inside = [known for known in KEYS if known.startswith(name + ".")]
            raise ConfigError(
                f"{name}={source.show(node)}: {name} is a group of keys, for example {inside[0]}"
            )
    elif is_mapping and node.value:
        raise ConfigError(_unknown_key(next(_unknown_leaves(node, name + "."))))
    else:
        raise ConfigError(_unknown_key(name))


def _unknown_leaves(node: yaml.MappingNode, prefix: str) -> Iterator[str]:
    """The full keys of a nested mapping under a group that does not exist."""
    for part, value in yaml_values.pairs(node):
        if isinstance(value, yaml.MappingNode) and value.value:
            yield from _unknown_leaves(value, f"{prefix}{part}.")
        else:
            yield f"{prefix}{part}"


def _unknown_key(name: str) -> str:
    """The sentence about a key that does not exist, with what was meant or could be."""
    group, _, leaf = name.rpartition(".")
    siblings = [known.rsplit(".", 1)[-1] for known in KEYS if known.rpartition(".")[0] == group]
    nearest = nearest_key(name)
    if group in GROUPS and (nearest is None or _ratio(leaf, nearest.rsplit(".", 1)[-1]) < 0.6):
        return f"unknown key {name}; the keys of {group} are {', '.join(siblings)}"
    if nearest is None:
        groups = ", ".join(field.name for field in fields(Config))
        return f"unknown key {name}; the groups are {groups}"
    return f"unknown key {name}; did you mean {nearest}?"


def _ratio(a: str, b: str) -> float:
    """How alike two words are, from 0 to 1."""
    return difflib.SequenceMatcher(None, a, b).ratio()


def nearest_key(name: str) -> str | None:
    """The known key that a misspelt one most likely means, or None.

    It is near as a whole, or near in its last part.
    """

    def likeness(known: str) -> float:
        whole = _ratio(name, known)
        leaf = _ratio(name.rsplit(".", 1)[-1], known.rsplit(".", 1)[-1])
        return max(whole, 0.75 * leaf + 0.25 * whole)

    best = max(KEYS, key=likeness)
    return best if likeness(best) >= 0.6 else None
