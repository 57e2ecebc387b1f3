"""A configuration key: what `config.key` says of a field, and how its values are judged and shown."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from megatron_policysplit.errors import ConfigError


@dataclass(frozen=True)
class Key:
    """One configuration key: its full dotted name, its type, and what `config.key` says about it."""

    name: str
    type: type
    optional: bool
    default: Any
    help: str
    choices: tuple
    minimum: float | None
    above: float | None

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
        null = " or null" if self.optional else ""
        if self.minimum is not None:
            return f"at least {self.minimum:g}{null}"
        return f"above {self.above:g}{null}" if self.above is not None else ""

    def fits(self, value: Any) -> bool:
        """Whether a value of the right type is an allowed one."""
        if value is None:
            return self.optional
        if self.choices:
            return value in self.choices
        if isinstance(value, float) and not math.isfinite(value):
            return False
        return (self.minimum is None or value >= self.minimum) and (
            self.above is None or value > self.above
        )


def walk(cls: type, prefix: str = "") -> Iterator[Key]:
    hints = typing.get_type_hints(cls)
    for field in fields(cls):
        hint, name = hints[field.name], prefix + field.name
        if is_dataclass(hint):
            yield from walk(hint, name + ".")
            continue
        optional = typing.get_origin(hint) in (typing.Union, types.UnionType)
        if optional:
            hint = next(
                argument for argument in typing.get_args(hint) if argument is not type(None)
            )
        meta = field.metadata
        default = (
            field.default_factory() if field.default_factory in (dict, list) else field.default
        )
        plain = typing.get_origin(hint) or hint
        limits = (meta["choices"], meta["minimum"], meta["above"])
        yield Key(name, plain, optional, default, meta["help"], *limits)


def show(value: Any) -> str:
    """A value as the user would write it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def list_keys(cls: type, prefix: str = "") -> list[Key]:
    """The keys of a dataclass whose fields are made with `config.key`."""
    return list(walk(cls, prefix))


def read_keys(cls: type, given: Mapping[str, Any], prefix: str, owner: str) -> Any:
    """A mapping as a dataclass whose fields are made with `config.key`. prefix: of the keys' full
    names.

    Raises ConfigError for an unknown key or a value not allowed. owner: whose keys they are, in
    words.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    known = {key.name: key for key in list_keys(cls, prefix)}
    read = OmegaConf.structured(cls)
    OmegaConf.set_readonly(read, False)
    for part, value in given.items():
        name = f"{prefix}{part}"
        if name not in known:
            listed = ", ".join(key.rpartition(".")[2] for key in known)
            raise ConfigError(
                f"unknown key {name}; "
                + (f"the options of {owner} are {listed}" if known else f"{owner} has none")
            )
        try:
            OmegaConf.update(read, part, value)
            found = read[part]
        except OmegaConfBaseException as error:
            raise ConfigError(f"{name}={show(value)} is not {known[name].type_name}") from error
        if not known[name].fits(found):
            raise ConfigError(
                f"{name}={show(found)} is not allowed; it must be "
                f"{known[name].allowed or 'a finite number'}"
            )
    return OmegaConf.to_object(read)
