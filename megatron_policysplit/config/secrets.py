"""Secrets: API keys, named by the environment variable that holds them, and `${oc.env:...}`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from megatron_policysplit.config.rollout_schema import RolloutConfig
from megatron_policysplit.errors import ConfigError


class SecretMapping(dict):
    """A mapping that may hold secrets: its values with `${...}` resolved, and as it was written.

    Made by `load_config` for keys that are declared `secret`. Shown in a message, it is what was
    written.
    """

    def __init__(self, values: Mapping[str, Any] = (), written: Mapping[str, Any] | None = None):
        super().__init__(values)
        self.written = dict(values if written is None else written)

    def __repr__(self) -> str:
        return repr(self.written)


def open_private(path: Path) -> TextIO:
    """A new UTF-8 file to write, which its owner alone can read. Raises OSError if it exists."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    return os.fdopen(descriptor, "w", encoding="utf-8")


def read_api_key(
    variable: str | None, environ: Mapping[str, str], named_by: str = "rollout.api_key_variable"
) -> str | None:
    """Read an API key from an environment variable; None without a variable.

    Raises ConfigError if the variable holds no key, or one that cannot be sent.

    variable: name of the environment variable.
    environ: the environment.
    named_by: the configuration key that names the variable, for the errors.
    """
    if variable is None:
        return None
    key = environ.get(variable, "")
    if not key:
        raise ConfigError(f"{named_by}={variable}: that environment variable is not set, or empty")
    # The key itself is never shown: errors end up in logs.
    if not re.fullmatch(r"[!-~]+", key):
        raise ConfigError(
            f"{named_by}={variable}: the key in it has a blank, a line end or a character that is "
            "not ASCII; HTTP headers cannot carry those"
        )
    return key


def api_key(rollout: RolloutConfig) -> str | None:
    """The API key of the SGLang servers from the environment; None if they have none.

    Raises ConfigError if its variable is named but not set.
    """
    return read_api_key(rollout.api_key_variable, os.environ)
