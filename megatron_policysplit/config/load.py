"""Loading a checked `Config` from YAML and `key=value` overrides.

Every mistake is one sentence that names the key.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from megatron_policysplit.config.keys import MISSING, Key, list_keys, read_keys, show
from megatron_policysplit.config.schema import Config
from megatron_policysplit.errors import ConfigError

CONFIG_FILE = "config.yaml"  # in the run directory
# The keys that a finished step does not depend on, so that a run may go on after they change.
_FREE_GROUPS = ("parallel", "weight_sync", "agreement", "eval", "log", "checkpoint", "run")
_FREE_KEYS = {
    "rollout.engine",
    "rollout.lot_questions",
    "rollout.max_batch_samples",
    "rollout.replay_dir",
    "rollout.addresses",
    "rollout.api_key_variable",
    "rollout.concurrency",
    "rollout.request_seconds",
    "rollout.retries",
    "rollout.unavailable_seconds",
    "rollout.colocated",
    "reward.workers",
    "reward.timeout_seconds",
    "train.steps",
    "train.max_tokens_per_micro_batch",
    "train.head_chunk_tokens",
    "train.max_bad_steps",
}

KEYS: dict[str, Key] = {key.name: key for key in list_keys(Config)}
GROUPS = {name.rsplit(".", depth)[0] for name in KEYS for depth in range(1, name.count(".") + 1)}


def load_config(path: str | None, overrides: list[str]) -> Config:
    """The defaults, then the YAML file (None: no file), then `key=value` overrides in their order.

    Raises ConfigError for a file that is missing or not a YAML mapping, an unknown key, a value of
    the wrong type or outside the allowed ones, and for mandatory keys that nobody gave.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    config = OmegaConf.structured(Config)
    settings = list(_read_file(path)) if path is not None else []
    for override in overrides:
        settings += _read_override(override)
    for name, value in settings:
        try:
            OmegaConf.update(config, name, value, merge=True)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{name}={show(value)} is not {KEYS[name].type_name}") from error
    try:
        missing = OmegaConf.missing_keys(config)
    except OmegaConfBaseException as error:
        raise ConfigError(_interpolation_error(error)) from error
    if missing:
        names = [name for name in KEYS if name in missing]
        listed = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
        raise ConfigError(f"{listed} must be given, in the configuration file or as key=value")
    try:
        loaded = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ConfigError(_interpolation_error(error)) from error
    check_values(loaded)
    return loaded


def _read_file(path: str) -> list[tuple[str, Any]]:
    """The (full key, value) pairs of a YAML file, interpolations unresolved. Raises ConfigError."""
    import yaml
    from omegaconf import DictConfig, OmegaConf

    if not Path(path).is_file():
        raise ConfigError(f"configuration file {path} does not exist")
    try:
        content = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or "it cannot be read as UTF-8 text"
        raise ConfigError(
            f"configuration file {path}{where} is not valid YAML: {reason}"
        ) from error
    except OSError as error:
        reason = error.strerror or "its content is a single value"
        raise ConfigError(
            f"configuration file {path} is not a mapping of keys to values: {reason}"
        ) from error
    if not isinstance(content, DictConfig):
        raise ConfigError(
            f"configuration file {path} is not a mapping of keys to values: it holds a list"
        )
    return list(_leaves(OmegaConf.to_container(content, resolve=False)))


def _read_override(override: str) -> list[tuple[str, Any]]:
    """The (full key, value) pairs of one `key=value`. Raises ConfigError."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    name, equals, value = override.partition("=")
    if not equals or not name:
        raise ConfigError(f"override {override!r} is not of the form key=value")
    try:
        content = OmegaConf.to_container(OmegaConf.from_dotlist([override]), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(
            f"the value of {name}={value} is not valid YAML; put it in quotes"
        ) from error
    return list(_leaves(content))


def _leaves(node: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The (full key, value) pairs of a nested mapping; an empty group sets nothing."""
    for part, value in node.items():
        name = f"{prefix}{part}"
        if name in KEYS:
            # A list or mapping with nothing behind its colon is null in YAML: the default.
            if not (KEYS[name].type in (dict, list) and value is None):
                yield name, value
        elif name in GROUPS or any(group.startswith(name + ".") for group in GROUPS):
            if isinstance(value, dict):
                yield from _leaves(value, name + ".")
            elif value is not None:
                inside = [known for known in KEYS if known.startswith(name + ".")]
                raise ConfigError(
                    f"{name}={show(value)}: {name} is a group of keys, for example {inside[0]}"
                )
        elif isinstance(value, dict) and value and all(isinstance(key, str) for key in value):
            first = next(_unknown_leaves(value, name + "."))
            raise ConfigError(_unknown_key(first))
        else:
            raise ConfigError(_unknown_key(name))


def _unknown_leaves(node: dict, prefix: str) -> Iterator[str]:
    """The full keys of a nested mapping under a group that does not exist."""
    for part, value in node.items():
        if isinstance(value, dict) and value:
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


def _interpolation_error(error: Exception) -> str:
    """The sentence about a value with `${...}` that OmegaConf cannot resolve."""
    reason = str(error).split("\n")[0]
    name = getattr(error, "full_key", None)
    return (
        f"the value of {name} cannot be resolved: {reason}"
        if name
        else f"cannot be resolved: {reason}"
    )


def read_options(cls: type, values: dict[str, Any], method: str) -> Any:
    """Read algorithm.options.METHOD into that method's dataclass `cls`.

    Raises ConfigError for an unknown key or a value not allowed.
    """
    return read_keys(cls, values, f"algorithm.options.{method}.", method)


def flatten(config: Config) -> dict[str, Any]:
    """The configuration as full key -> value, in the order of the dataclasses."""
    values = {}
    for name in KEYS:
        value: Any = config
        for part in name.split("."):
            value = getattr(value, part)
        values[name] = value
    return values


def check_values(config: Config) -> None:
    """Raise ConfigError for the first value that is missing or outside its key's allowed values."""
    for name, value in flatten(config).items():
        key = KEYS[name]
        if value == MISSING:
            raise ConfigError(f"{name} must be given, in the configuration file or as key=value")
        if not key.fits(value):
            raise ConfigError(
                f"{name}={show(value)} is not allowed; it must be "
                f"{key.allowed or 'a finite number'}"
            )


def world_size(config: Config) -> int:
    """The number of the actor's ranks: tensor x pipeline x data."""
    return config.parallel.tensor * config.parallel.pipeline * config.parallel.data


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as nested plain dicts."""
    return asdict(config)


def to_yaml(config: Config) -> str:
    """The configuration as YAML that `load_config` reads back into an equal one."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def fingerprint(config: Config) -> dict[str, Any]:
    """The keys that make a run this run and no other, with their values.

    Left out is what a run may change between two starts: layout, evaluation, logs, checkpoints,
    worker processes, engine batching, how long to train and how to pack.
    """
    values = flatten(config)
    free = {name for name in values if name.split(".")[0] in _FREE_GROUPS and name != "run.seed"}
    free |= _FREE_KEYS | {name for name in values if name.startswith("rollout.server.")}
    return {name: value for name, value in values.items() if name not in free}


def first_difference(a: dict[str, Any], b: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """The first key on which two fingerprints differ, with both values; None if they are equal."""
    for name in sorted(a.keys() | b.keys(), key=list(KEYS).index):
        if a.get(name) != b.get(name):
            return name, a.get(name), b.get(name)
    return None
