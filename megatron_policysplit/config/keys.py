"""Configuration keys: `key` declares one as a field of a dataclass, `Key` is what it then says."""

from __future__ import annotations

import math
import os
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from megatron_policysplit.errors import ConfigError

MISSING = "???"  # OmegaConf's marker for a value the user must give
# What every number is used as, whatever its key allows: a count, and a number of single precision.
LARGEST_INTEGER = 2**31 - 1
SMALLEST_NUMBER, LARGEST_NUMBER = 1.2e-38, 3.4e38
# AdamW multiplies its rates with each other and divides them by 1 - beta.
LARGEST_RATE = 1e6
# Megatron-Core and batches add to a seed what is far below the other half of 64 bits.
LARGEST_SEED = 2**62
LARGEST_SECONDS = 1e9  # some 30 years; timers of Python and torch hold at most nine times that


def key(
    default: Any,
    help: str,
    *,
    choices: tuple = (),
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    path: bool = False,
    entries: type | None = None,
    verbatim: bool = False,
    secret: bool = False,
):
    """Declare a configuration key as a field of a dataclass.

    default: the key's default; a type makes an instance of it, such as a group of keys.
    help: one sentence of documentation.
    choices: the allowed values; () allows all.
    minimum, above: an inclusive and an exclusive lower bound.
    maximum: an inclusive upper bound.
    path: a text that names a file or directory, whose leading `~` is the home directory.
    entries: of a mapping: the dataclass of its entries. Entries of a dataclass with the key `file`
        alone may also be texts.
    verbatim: of a mapping: its numbers and words are kept as they are written, as text.
    secret: of a mapping: `${...}` in it is neither shown nor written out resolved.
    """
    metadata = {
        "help": help,
        "choices": choices,
        "minimum": minimum,
        "above": above,
        "maximum": maximum,
        "path": path,
        "entries": entries,
        "verbatim": verbatim,
        "secret": secret,
    }
    if isinstance(default, (type, dict, list)):
        factory = default if isinstance(default, type) else default.copy
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Key:
    """One configuration key, as `key` has declared it. Made by `list_keys`."""

    name: str  # full, with dots: train.learning_rate
    type: type  # int, float, bool, str, list or dict
    optional: bool  # whether null is allowed
    default: Any
    help: str
    choices: tuple = ()  # the allowed values; () allows all
    minimum: float | None = None  # inclusive
    above: float | None = None  # exclusive
    maximum: float | None = None  # inclusive
    path: bool = False  # whether a leading `~` is the home directory
    entries: type | None = None  # of a mapping: the dataclass of its entries
    verbatim: bool = False  # of a mapping: whether its values are text as it is written
    secret: bool = False  # of a mapping: whether its `${...}` is never shown resolved
    item: type | None = None  # of a list: the type of its items

    @property
    def type_name(self) -> str:
        """The type in words, as error messages and the documentation say it."""
        names = {
            int: "an integer",
            float: "a number",
            bool: "true or false",
            str: "a string",
            dict: "a mapping",
        }
        names[list] = "a list"
        return names[self.type] + (" or null" if self.optional else "")

    @property
    def allowed(self) -> str:
        """The allowed values in words; empty where the type says it all."""
        if self.choices:
            words = [str(choice) for choice in self.choices] + (["null"] if self.optional else [])
            return "one of " + ", ".join(words)
        lower = ""
        if self.minimum is not None:
            lower = f"at least {_number(self.minimum)}"
        elif self.above is not None:
            lower = f"above {_number(self.above)}"
        upper = "" if self.maximum is None else f"at most {_number(self.maximum)}"
        bounds = " and ".join(filter(None, (lower, upper)))
        return bounds and bounds + (" or null" if self.optional else "")

    def fits(self, value: Any) -> bool:
        """Whether a value of the right type is an allowed one."""
        return self.requirement(value) is None

    def requirement(self, value: Any) -> str | None:
        """What a value of the right type fails to be, in words; None if it is an allowed one."""
        if value is None:
            return None if self.optional else self.type_name
        if self.choices:
            return None if value in self.choices else self.allowed
        if isinstance(value, list):
            return next(filter(None, map(self._requirement_of_item, value)), None)
        # YAML has .nan and .inf, which no key means.
        if isinstance(value, float) and not math.isfinite(value):
            return self.allowed or "a finite number"
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            return None
        if (
            (self.minimum is not None and value < self.minimum)
            or (self.above is not None and value <= self.above)
            or (self.maximum is not None and value > self.maximum)
        ):
            return self.allowed
        return self._representable(value)

    def _requirement_of_item(self, item: Any) -> str | None:
        """What an item of a list fails to be; None if it is an allowed one."""
        if self.item is int and not 0 <= item <= LARGEST_INTEGER:
            return f"a list of integers from 0 to {LARGEST_INTEGER}"
        return None

    def _representable(self, value: float) -> str | None:
        """What a number within the key's bounds fails to be for those who compute with it."""
        if self.type is int:
            limit = LARGEST_INTEGER if self.maximum is None else self.maximum
            return None if -limit <= value <= limit else f"at most {_number(limit)}"
        if value == 0 or SMALLEST_NUMBER <= abs(value) <= LARGEST_NUMBER:
            return None
        return (
            f"a number of single precision, whose size is 0 or from {SMALLEST_NUMBER:g} to "
            f"{LARGEST_NUMBER:g}"
        )


def _number(value: float) -> str:
    """A bound as one writes it."""
    return str(value) if isinstance(value, int) else f"{value:g}"


def walk(cls: type, prefix: str = "") -> Iterator[Key]:
    """Yield the keys of a dataclass and of the dataclasses in it, in the order of their fields."""
    hints = typing.get_type_hints(cls)
    for field_ in fields(cls):
        hint, name = hints[field_.name], prefix + field_.name
        if is_dataclass(hint):
            yield from walk(hint, name + ".")
            continue
        optional = typing.get_origin(hint) in (typing.Union, types.UnionType)
        if optional:
            hint = next(part for part in typing.get_args(hint) if part is not type(None))
        factory = field_.default_factory
        default = factory() if factory in (dict, list) else field_.default
        plain = typing.get_origin(hint) or hint  # dict[str, Any] -> dict
        item = typing.get_args(hint)[0] if plain is list else None
        yield Key(name, plain, optional, default, item=item, **field_.metadata)


def show(value: Any) -> str:
    """A value as the user would write it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def list_keys(cls: type, prefix: str = "") -> list[Key]:
    """The keys of a dataclass whose fields are made with `config.key`."""
    return list(walk(cls, prefix))


def expand_user(path: str, name: str) -> str:
    """A path with the home directory for a leading `~` or `~user`.

    Raises ConfigError where there is no such user, and for a path that no file system takes.

    name: the key or option, for the error.
    """
    if "\0" in path:
        raise ConfigError(f"{name}={path!r} has a null character; give another path")
    longest = max(len(part.encode("utf-8", "surrogateescape")) for part in path.split("/"))
    if longest > 255 or len(path.encode("utf-8", "surrogateescape")) > 4095:
        raise ConfigError(f"{name}={path[:40]}... is too long for a path; give another one")
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        user = path.partition("/")[0]
        raise ConfigError(
            f"{name}={path}: there is no home directory for {user}; give another path, or "
            f"./{path} for one that begins with ~"
        )
    return expanded


def read_keys(cls: type, values: Mapping[str, Any], prefix: str, owner: str) -> Any:
    """Read a mapping into a dataclass whose fields are made with `config.key`.

    Raises ConfigError for an unknown key or a value not allowed.

    cls: the dataclass.
    values: key -> value, without the prefix.
    prefix: what the keys' full names begin with, for the errors.
    owner: whose keys they are, in words, for the errors.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    known = {key.name: key for key in list_keys(cls, prefix)}
    settings = OmegaConf.structured(cls)
    OmegaConf.set_readonly(settings, False)  # as those of a frozen dataclass are
    for part, value in values.items():
        name = f"{prefix}{part}"
        if name not in known:
            listed = ", ".join(key.rpartition(".")[2] for key in known)
            raise ConfigError(
                f"unknown key {name}; "
                + (f"the options of {owner} are {listed}" if known else f"{owner} has none")
            )
        key = known[name]
        _check_plain_type(key, value)
        try:
            OmegaConf.update(settings, part, value)
            converted = settings[part]  # of the key's type, "1" for an integer included
        except (OmegaConfBaseException, OverflowError) as error:
            raise ConfigError(f"{name}={show(value)} is not {key.type_name}") from error
        if (requirement := key.requirement(converted)) is not None:
            raise ConfigError(f"{name}={show(converted)} is not allowed; it must be {requirement}")
        if key.path and converted is not None:
            settings[part] = expand_user(converted, name)
    return OmegaConf.to_object(settings)


def _check_plain_type(key: Key, value: Any) -> None:
    """Raise ConfigError for a value that OmegaConf would take for another type's."""
    if key.type is str and isinstance(value, (bool, int, float)):
        raise ConfigError(
            f"{key.name}={show(value)} is not {key.type_name}; put text that YAML takes for "
            "something else in quotes"
        )
    if key.type is bool and isinstance(value, (int, float)) and not isinstance(value, bool):
        raise ConfigError(f"{key.name}={show(value)} is not {key.type_name}")
