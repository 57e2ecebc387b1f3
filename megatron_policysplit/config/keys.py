"""Configuration keys: `key` declares one as a field of a dataclass, `Key` is what it then says."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from megatron_policysplit.errors import ConfigError

MISSING = "???"  # OmegaConf's marker for a value the user must give


def key(
    default: Any,
    help: str,
    *,
    choices: tuple = (),
    minimum: float | None = None,
    above: float | None = None,
):
    """Declare a configuration key as a field of a dataclass.

    default: the key's default; a type makes an instance of it, such as a group of keys.
    help: one sentence of documentation.
    choices: the allowed values; () allows all.
    minimum, above: an inclusive and an exclusive lower bound.
    """
    metadata = {"help": help, "choices": choices, "minimum": minimum, "above": above}
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
    choices: tuple  # the allowed values; () allows all
    minimum: float | None  # inclusive
    above: float | None  # exclusive

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
        # YAML has .nan and .inf, which no key means.
        if isinstance(value, float) and not math.isfinite(value):
            return False
        return (self.minimum is None or value >= self.minimum) and (
            self.above is None or value > self.above
        )


def walk(cls: type, prefix: str = "") -> Iterator[Key]:
    """Yield the keys of a dataclass and of the dataclasses in it, in the order of their fields."""
    hints = typing.get_type_hints(cls)
    for item in fields(cls):
        hint, name = hints[item.name], prefix + item.name
        if is_dataclass(hint):
            yield from walk(hint, name + ".")
            continue
        optional = typing.get_origin(hint) in (typing.Union, types.UnionType)
        if optional:
            hint = next(part for part in typing.get_args(hint) if part is not type(None))
        meta = item.metadata
        default = item.default_factory() if item.default_factory in (dict, list) else item.default
        plain = typing.get_origin(hint) or hint  # dict[str, Any] -> dict
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
        try:
            OmegaConf.update(settings, part, value)
            converted = settings[part]  # of the key's type, "1" for an integer included
        except OmegaConfBaseException as error:
            raise ConfigError(f"{name}={show(value)} is not {known[name].type_name}") from error
        if not known[name].fits(converted):
            raise ConfigError(
                f"{name}={show(converted)} is not allowed; it must be "
                f"{known[name].allowed or 'a finite number'}"
            )
    return OmegaConf.to_object(settings)
