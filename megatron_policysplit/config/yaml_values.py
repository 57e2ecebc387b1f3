"""What YAML text means for a configuration key, by the key's type.

YAML guesses the type of a value from its spelling: 1.10 is the number 1.1, 010 is 8, 12:30 is 750
and off is false. Here the key's type decides. A value whose spelling YAML would change is refused
with the remedy, and the text of a `key=value` is taken as it stands.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import yaml

from megatron_policysplit.config.keys import Key, list_keys
from megatron_policysplit.errors import ConfigError

_SHOWN = 200  # characters of a value in a message
_MAX_NODES = 100_000  # of a document with its aliases written out
_TAG = "tag:yaml.org,2002:"
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"|' + r"'(?:[^']|'')*'", re.DOTALL)
# YAML 1.1 has the first two forms and YAML 1.2 has not; the third is how people write booleans.
_OTHER_BASE = re.compile(r"[-+]?(0[0-9_]+|0b[01_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")
_TRUE_OR_FALSE = re.compile("true|false|yes|no|on|off", re.IGNORECASE)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without dates, and with 1e-6 as a number, which YAML 1.1 takes for text."""

    yaml_implicit_resolvers: dict = {}


# Type -> the characters that its spellings begin with ("" for nothing at all), and the spellings.
_SPELLINGS: dict[str, tuple[list[str], str]] = {
    "bool": (
        [*"yYnNtTfFoO"],
        r"[Yy]es|YES|[Nn]o|NO|[Tt]rue|TRUE|[Ff]alse|FALSE|[Oo]n|ON|[Oo]ff|OFF",
    ),
    "int": (
        [*"-+0123456789"],
        r"[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]+|0|[1-9][0-9_]*(?::[0-5]?[0-9])*)",
    ),
    "float": (
        [*"-+0123456789."],
        r"[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+\.[0-9_]*"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
    ),
    "null": ([*"~nN", ""], r"~|null|Null|NULL|"),
    "merge": (["<"], "<<"),
}
for _type, (_first, _spelling) in _SPELLINGS.items():
    _Loader.add_implicit_resolver(_TAG + _type, re.compile(f"^(?:{_spelling})$"), _first)
_CONSTRUCTOR = _Loader("")


@dataclass(frozen=True)
class Source:
    """The text that nodes of a document are of, for the errors."""

    text: str
    file: str | None = None  # None: the value of a `key=value`

    def show(self, node: yaml.Node) -> str:
        """A node's text as it is written, the beginning of its first line."""
        if node.start_mark.index == node.end_mark.index:
            return "null"
        lines = self.text[node.start_mark.index : node.end_mark.index].strip().splitlines()
        first = lines[0][:_SHOWN]
        return first + (" ..." if len(lines) > 1 or first != lines[0] else "")

    def place(self, node: yaml.Node) -> str:
        """Where a node stands, in brackets behind a blank; empty for a `key=value`."""
        return "" if self.file is None else f" ({self.file}, line {node.start_mark.line + 1})"


def compose(text: str) -> yaml.Node | None:
    """The document in a text, None for an empty one.

    Raises yaml.YAMLError for what is not YAML, has a key twice, or grows without bound when its
    aliases are written out.
    """
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is not None:
            _check_tree(root, (), [0])
    except RecursionError as error:
        raise yaml.MarkedYAMLError(problem="it is nested too deeply") from error
    finally:
        loader.dispose()
    return root


def _check_tree(node: yaml.Node, above: tuple[yaml.Node, ...], count: list[int]) -> None:
    """Raise yaml.YAMLError for a node that holds itself, too many nodes, or a key twice."""
    count[0] += 1
    if node in above or count[0] > _MAX_NODES:
        raise yaml.MarkedYAMLError(problem="its aliases never end", problem_mark=node.start_mark)
    if isinstance(node, yaml.ScalarNode):
        return
    is_mapping = isinstance(node, yaml.MappingNode)
    if is_mapping:
        names: set[str] = set()
        for name, _ in node.value:
            if not isinstance(name, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(
                    problem="a key is a list or a mapping", problem_mark=name.start_mark
                )
            if name.value in names and name.tag != _TAG + "merge":
                raise yaml.MarkedYAMLError(
                    problem=f"found duplicate key {name.value}", problem_mark=name.start_mark
                )
            names.add(name.value)
    for child in [value for _, value in node.value] if is_mapping else node.value:
        _check_tree(child, (*above, node), count)
    if is_mapping:
        _CONSTRUCTOR.flatten_mapping(node)


def pairs(node: yaml.MappingNode) -> Iterator[tuple[str, yaml.Node]]:
    """The keys of a mapping, as they are written, with their values; those of `<<` included."""
    yield from {name.value: value for name, value in node.value}.items()


def is_null(node: yaml.Node) -> bool:
    """Whether a node is `null`, `~` or nothing."""
    return node.tag == _TAG + "null"


def read_text(name: str, value: str, *, optional: bool) -> str | None:
    """The text of `name=value`, as it stands: without blanks around it, or without its quotes.

    `null`, or nothing at all, is null for an optional key. Raises ConfigError for quotes that hold
    no YAML text, and for an empty value where there must be one.
    """
    value = value.strip()
    if _QUOTED.fullmatch(value):
        try:
            return _CONSTRUCTOR.construct_scalar(compose(value))
        except yaml.YAMLError as error:
            raise ConfigError(
                f"the value of {name}={value} is not valid YAML; use single quotes"
            ) from error
    if value and value != "null":
        return value
    if not optional:
        raise ConfigError(f"{name}={value} is not a string; put it in quotes if you mean that text")
    return None


def read_value(key: Key, node: yaml.Node, source: Source) -> Any:
    """The value that a node is for a key, its `${...}` unresolved.

    Raises ConfigError for a value that is not of the key's type as it is written.
    """
    if is_null(node):
        if not key.optional:
            raise ConfigError(f"{key.name}=null is not {key.type_name}" + source.place(node))
        return None
    if key.type is dict:
        return _mapping(key, node, source)
    if key.type is list:
        if not isinstance(node, yaml.SequenceNode):
            _refuse(key, node, source)
        item = Key(key.name, key.item, False, None, "")
        return [read_value(item, child, source) for child in node.value]
    if key.type is str:
        return _text(key, node, source)
    return _plain(key, node, source)


def _refuse(key: Key, node: yaml.Node, source: Source, remedy: str = "") -> NoReturn:
    raise ConfigError(f"{key.name}={source.show(node)} is not {key.type_name}{remedy}")


def _text(key: Key, node: yaml.Node, source: Source) -> str:
    """A text; a node that YAML takes for something else is refused."""
    if isinstance(node, yaml.ScalarNode) and node.tag == _TAG + "str":
        return node.value
    kinds = {"int": "a number", "float": "a number", "bool": "true or false"}
    if isinstance(node, yaml.ScalarNode):
        kind = kinds.get(node.tag.removeprefix(_TAG), "no text")
    else:
        kind = "a mapping" if isinstance(node, yaml.MappingNode) else "a list"
    raise ConfigError(
        f"{key.name}={source.show(node)} is not {key.type_name} but {kind} to YAML"
        f"{source.place(node)}; put it in quotes"
    )


def _plain(key: Key, node: yaml.Node, source: Source) -> Any:
    """A number or a truth value; what is text may be an interpolation."""
    if not isinstance(node, yaml.ScalarNode):
        _refuse(key, node, source)
    if node.tag == _TAG + "str":
        if key.type is bool and "${" not in node.value:
            if not _TRUE_OR_FALSE.fullmatch(node.value):
                _refuse(key, node, source)
        return node.value
    tags = {bool: ("bool",), int: ("int",), float: ("int", "float")}[key.type]
    if node.tag.removeprefix(_TAG) not in tags:
        whole = _whole(node) if key.type is int else None
        _refuse(key, node, source, "" if whole is None else f"; write {whole}")
    _check_base(key.name, node, source, "write the number you mean")
    value = _scalar(key, node, source)
    try:
        return key.type(value)
    except OverflowError as error:  # an integer beyond any float
        raise ConfigError(
            f"{key.name}={source.show(node)} is not allowed; it must be {key.requirement(math.inf)}"
        ) from error


def _whole(node: yaml.ScalarNode) -> int | None:
    """The integer that a number with a point or an exponent is; None if it is none."""
    try:
        number = float(node.value.replace("_", ""))
    except ValueError:
        return None
    return int(number) if number.is_integer() and abs(number) < 1e15 else None


def _scalar(key: Key, node: yaml.ScalarNode, source: Source) -> Any:
    """What YAML takes a scalar for."""
    try:
        return _CONSTRUCTOR.construct_object(node)
    except ValueError:  # more digits than Python converts, or none
        _refuse(key, node, source)


def _check_base(name: str, node: yaml.ScalarNode, source: Source, remedy: str) -> None:
    """Raise ConfigError for a number that YAML reads in another base than it seems to have."""
    if not _OTHER_BASE.fullmatch(node.value):
        return
    try:
        value = _CONSTRUCTOR.construct_object(node)
    except ValueError:  # an underscore alone
        value = "no number"
    raise ConfigError(f"{name}={node.value} is {value} to YAML{source.place(node)}; {remedy}")


def _mapping(key: Key, node: yaml.Node, source: Source) -> dict[str, Any]:
    """A mapping whose entries are read as the key declares them."""
    if not isinstance(node, yaml.MappingNode):
        _refuse(key, node, source)
    values = {}
    for part, child in pairs(node):
        values[part] = read_entry(key, (part,), child, source)
    return values


def entry_key(key: Key, path: tuple[str, ...]) -> Key | None:
    """The key that declares the entry of a mapping at `path`; None where nothing does."""
    if key.entries is None or not path:
        return None
    name = ".".join((key.name, *path))
    known = {known.name: known for known in list_keys(key.entries, f"{key.name}.{path[0]}.")}
    if len(path) == 1 and [known.rpartition(".")[2] for known in known] == ["file"]:
        return Key(name, str, False, None, "")
    return known.get(name)


def _entry_name(key: Key, node: yaml.ScalarNode) -> Any:
    """A key within a mapping: text as it is written, and integers where nothing is declared."""
    is_free = key.entries is None and not key.verbatim
    if is_free and node.tag == _TAG + "int" and not _OTHER_BASE.fullmatch(node.value):
        return _CONSTRUCTOR.construct_object(node)
    return node.value


def read_entry(key: Key, path: tuple[str, ...], node: yaml.Node, source: Source) -> Any:
    """The value of a node at `path` within a mapping."""
    name = ".".join((key.name, *path))
    is_mapping = isinstance(node, yaml.MappingNode)
    declared = entry_key(key, path)
    may_be_entry = is_mapping and len(path) == 1
    if declared is not None and not may_be_entry:
        return read_value(declared, node, source)
    if is_mapping:
        return {
            _entry_name(key, part): read_entry(key, (*path, part.value), child, source)
            for part, child in node.value
        }
    if isinstance(node, yaml.SequenceNode):
        return [read_entry(key, path, child, source) for child in node.value]
    if is_null(node):
        return None
    if node.tag == _TAG + "str":
        return node.value
    is_verbatim = key.verbatim and len(path) == 1  # a mapping within it has types, such as JSON
    if node.tag == _TAG + "bool":
        if node.value.lower() in ("true", "false"):
            return node.value.lower() == "true"
        if not is_verbatim:
            value = str(_CONSTRUCTOR.construct_object(node)).lower()
            raise ConfigError(
                f"{name}={node.value} is {value} to YAML{source.place(node)}; write {value}, or "
                "put text in quotes"
            )
    if is_verbatim:
        return node.value
    _check_base(name, node, source, "write the number you mean, or put text in quotes")
    return _scalar(Key(name, float, False, None, ""), node, source)
