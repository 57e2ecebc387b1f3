"""Loading a checked `Config` from YAML and `key=value` overrides.

Every mistake is one sentence that names the key.
"""

from __future__ import annotations

import os
import re
from dataclasses import asdict
from functools import reduce
from typing import Any

from megatron_policysplit.config.keys import MISSING, Key, expand_user, list_keys, read_keys, show
from megatron_policysplit.config.schema import Config
from megatron_policysplit.config.secrets import SecretMapping
from megatron_policysplit.config.settings import CONFIG_FILE as CONFIG_FILE  # handed on
from megatron_policysplit.config.settings import KEYS, read_settings
from megatron_policysplit.errors import ConfigError

# The keys that a finished step does not depend on, so that a run may go on after they change.
_FREE_GROUPS = ("parallel", "weight_sync", "agreement", "eval", "log", "checkpoint", "run")
_FREE_KEYS = {
    "model.layers",
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
    "train.deterministic",
    "train.distributed_optimizer",
    "train.max_bad_steps",
}


def load_config(path: str | None, overrides: list[str]) -> Config:
    """The defaults, then the YAML file (None: no file), then `key=value` overrides in their order.

    A leading `~` of a path is replaced by the home directory. Raises ConfigError for a file that is
    missing or not a YAML mapping, an unknown key, a value of the wrong type or outside the allowed
    ones, and for mandatory keys that nobody gave.
    """
    return _resolve(read_settings(path, overrides), list(KEYS))


def load_written(path: str) -> Config:
    """The configuration of a run as its config.yaml holds it, for comparisons and prompts.

    `${...}` that the file kept, because it may be a secret, is not resolved: the keys that may hold
    one have their defaults. Raises ConfigError as `load_config` does.
    """
    names = [name for name, key in KEYS.items() if not key.secret]
    return _resolve(read_settings(path, []), names)


def _resolve(settings: list[tuple[str, Any]], names: list[str]) -> Config:
    """The configuration of the settings of the keys `names`, defaults elsewhere."""
    from omegaconf import OmegaConf
    from omegaconf.errors import GrammarParseError, OmegaConfBaseException

    config = OmegaConf.structured(Config)
    for name, value in settings:
        if name not in names:
            continue
        try:
            OmegaConf.update(config, name, value, merge=True)
        except GrammarParseError as error:
            raise ConfigError(_grammar_error(name, value)) from error
        except OmegaConfBaseException as error:
            raise ConfigError(f"{name}={show(value)} is not {KEYS[name].type_name}") from error
    try:
        missing = OmegaConf.missing_keys(config)
        if missing:
            missing_names = [name for name in KEYS if name in missing] or sorted(missing)
            raise ConfigError(
                f"{_listed(missing_names)} must be given, in the configuration file or as key=value"
            )
        loaded = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ConfigError(_interpolation_error(error, config)) from error
    for name in names:
        _finish(loaded, KEYS[name], OmegaConf.select(config, name, throw_on_missing=False))
    check_values(loaded)
    return loaded


def _finish(config: Config, key: Key, setting: Any) -> None:
    """Expand `~` in a path, and keep how a mapping that may hold secrets was written.

    setting: the value as OmegaConf holds it. Raises ConfigError.
    """
    from omegaconf import OmegaConf

    group, _, leaf = key.name.rpartition(".")
    owner = reduce(getattr, group.split("."), config)
    value = getattr(owner, leaf)
    if key.path and value is not None:
        value = expand_user(value, key.name)
    if key.entries is not None:
        value = {name: _expand_entry(key, name, entry) for name, entry in value.items()}
    if key.secret:
        value = SecretMapping(value, OmegaConf.to_container(setting, resolve=False))
    _check_encodable(key.name, value)
    setattr(owner, leaf, value)


def _expand_entry(key: Key, name: str, entry: Any) -> Any:
    """An entry of a mapping with `~` expanded in its paths."""
    if not isinstance(entry, dict):
        return entry
    paths = {known.name for known in list_keys(key.entries) if known.path}
    return {
        part: expand_user(value, f"{key.name}.{name}.{part}")
        if part in paths and isinstance(value, str)
        else value
        for part, value in entry.items()
    }


def _check_encodable(name: str, value: Any) -> None:
    """Raise ConfigError for text that no UTF-8 file can hold: half of a surrogate pair."""
    if isinstance(value, dict):
        for part, item in value.items():
            _check_encodable(f"{name}.{part}", item)
    elif isinstance(value, list):
        for item in value:
            _check_encodable(name, item)
    elif isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        shown = value.encode("utf-8", "backslashreplace").decode()
        raise ConfigError(f"{name}={shown} is not UTF-8 text; write it in UTF-8")


def _listed(names: list[str]) -> str:
    """Names in words: `a, b and c`."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _interpolation_error(error: Exception, config: Any) -> str:
    """The sentence about a value with `${...}` that OmegaConf cannot resolve.

    What the interpolation stands for is not repeated: it may be a secret.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import GrammarParseError, ValidationError

    name = getattr(error, "full_key", None) or ""
    written = OmegaConf.to_container(config, resolve=False)
    for part in name.split("."):
        written = written.get(part) if isinstance(written, dict) else None
    if isinstance(error, ValidationError) and name in KEYS:
        return f"{name}={show(written)} is not {KEYS[name].type_name}"
    if isinstance(error, GrammarParseError):
        return _grammar_error(name, written)
    reason = str(error).split("\n")[0]
    return f"the value of {name} cannot be resolved: {reason}"


def _grammar_error(name: str, value: Any) -> str:
    """The sentence about a text with a `${` that begins no interpolation."""
    return (
        f"{name}={show(value)} has a ${{ that begins no ${{oc.env:NAME}}; write \\${{ for the text"
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
        if isinstance(value, str) and value == MISSING:
            raise ConfigError(f"{name} must be given, in the configuration file or as key=value")
        if (requirement := KEYS[name].requirement(value)) is not None:
            raise ConfigError(f"{name}={show(value)} is not allowed; it must be {requirement}")


def world_size(config: Config) -> int:
    """The number of the actor's ranks: tensor x pipeline x data."""
    return config.parallel.tensor * config.parallel.pipeline * config.parallel.data


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as nested plain dicts, to be shown or written.

    `${...}` is resolved but in the mappings that may hold secrets.
    """
    return as_written(asdict(config), config)


def to_yaml(config: Config) -> str:
    """The configuration as YAML that `load_config` reads back into an equal one.

    `${...}` is resolved but in the mappings that may hold secrets.
    """
    from omegaconf import OmegaConf

    values = as_written(_escape(asdict(config)), config)
    return OmegaConf.to_yaml(OmegaConf.create(values))


def as_written(values: dict[str, Any], config: Config) -> dict[str, Any]:
    """`values`, nested as a configuration, with its secret mappings as they were written."""
    for name, value in flatten(config).items():
        if isinstance(value, SecretMapping):
            group, _, leaf = name.rpartition(".")
            reduce(dict.__getitem__, group.split("."), values)[leaf] = value.written
    return values


def _escape(value: Any) -> Any:
    """A resolved value with what would be taken for an interpolation escaped."""
    if isinstance(value, dict):
        return {name: _escape(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_escape(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: 2 * match[1] + "\\${", value)
    return value


def fingerprint(config: Config) -> dict[str, Any]:
    """The keys that make a run this run and no other, with their values.

    Left out is what a run may change between two starts: layout and kind of layers, where the
    optimizer's state is, evaluation, logs, checkpoints, worker processes, engine batching, how long
    to train and how to pack.
    """
    values = flatten(config)
    free = {name for name in values if name.split(".")[0] in _FREE_GROUPS and name != "run.seed"}
    free |= _FREE_KEYS | {name for name in values if name.startswith("rollout.server.")}
    return {name: value for name, value in values.items() if name not in free}


def first_difference(a: dict[str, Any], b: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """The first key on which two fingerprints differ, with both values; None if they are equal.

    Two spellings of one path are equal.
    """
    for name in sorted(a.keys() | b.keys(), key=list(KEYS).index):
        one, other = a.get(name), b.get(name)
        if one != other and not (KEYS[name].path and is_same_path(one, other)):
            return name, one, other
    return None


def is_same_path(a: str | None, b: str | None) -> bool:
    """Whether two paths lead to the same place, links followed."""
    return None not in (a, b) and os.path.realpath(a) == os.path.realpath(b)
