"""Asks the servers' interpreter what it has, before a run starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_policysplit.config import Config
from megatron_policysplit.config.load import world_size
from megatron_policysplit.errors import ConfigError
from megatron_policysplit.serving.processes import inherited_environment

ASK_SECONDS = 60.0  # an environment on a cluster's file system may be slow at first
_QUESTION = (
    "import importlib.util as util, sys; "
    "print(*(name for name in sys.argv[1:] if util.find_spec(name) is None))"
)


def server_count(config: Config) -> int:
    """Servers that a run starts itself."""
    server = config.rollout.server
    return world_size(config) // server.tensor if config.rollout.colocated else server.count or 1


def check_interpreter(
    python: str | None, modules: Sequence[str], environment: Mapping[str, Any]
) -> None:
    """Raise ConfigError if an interpreter lacks one of the modules; it imports none of them.

    python: `rollout.server.python`; None is this process's own.
    environment: `rollout.server.environment`, of which PYTHONPATH counts here.
    """
    interpreter = python or sys.executable
    inherited = inherited_environment(os.environ, interpreter)
    if (path := environment.get("PYTHONPATH")) is not None:
        inherited["PYTHONPATH"] = str(path)
    try:
        done = subprocess.run(
            [interpreter, "-c", _QUESTION, *modules],
            env=inherited,
            capture_output=True,
            text=True,
            timeout=ASK_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"rollout.server.python={interpreter} cannot be run ({error})") from error
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(f"rollout.server.python={interpreter} cannot be run ({reason})")
    if missing := done.stdout.split():
        name = "rollout.server.python" + (
            "=null, which is the trainer's interpreter," if python is None else f"={python}"
        )
        raise ConfigError(
            f"{name} has no {' and no '.join(missing)}; install SGLang there, or set "
            "rollout.server.python to the interpreter of an environment that has it (on a machine "
            "without a GPU `make sglang-cpu` makes one: .venv-sglang/bin/python)"
        )
