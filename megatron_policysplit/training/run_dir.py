"""The run directory: whether it is this run's, who holds it, and the configuration in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_policysplit.actor.checkpoint_files import complete, read_trainer_json
from megatron_policysplit.config import Config
from megatron_policysplit.config.load import (
    CONFIG_FILE,
    fingerprint,
    first_difference,
    load_written,
    show,
    to_yaml,
)
from megatron_policysplit.distributed.directory_lock import DirectoryLock
from megatron_policysplit.errors import ConfigError, WriteError
from megatron_policysplit.files import replace_text

LOCK_FILE = "run.lock"
# The first line of a run's configuration. A file without it may be a user's own.
HEADER = "# Written by policysplit train, which replaces this file at every start.\n"
EXPORTS = ("hf", "best")  # Hugging Face directories that a run writes


def run_lock(config: Config) -> DirectoryLock:
    """The lock of run.dir, held by who starts the ranks or, under torchrun or srun, by rank 0."""
    return DirectoryLock(
        Path(config.run.dir) / LOCK_FILE, f"run.dir={config.run.dir}", "give another run.dir"
    )


def check_run_dir(config: Config) -> bool:
    """Whether run.dir holds this very run already.

    Raises ConfigError if it holds another run or files that a run would overwrite, if the run has
    trained more steps than train.steps, or if it cannot be created or written; CheckpointError if
    its newest checkpoint is damaged.
    """
    # The nearest directory that exists decides whether run.dir can be made.
    directory = Path(config.run.dir)
    existing = next(
        parent for parent in [directory, *directory.absolute().parents] if parent.exists()
    )
    if not existing.is_dir():
        raise ConfigError(
            f"run.dir={directory} cannot be a directory: {existing} is a file; give another run.dir"
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(
            f"run.dir={directory} cannot be written: no permission in {existing}; give another "
            "run.dir"
        )
    _check_config_file(config)
    if not _has_begun(directory):
        _check_exports(directory)
        return False
    if (directory / CONFIG_FILE).exists():
        _check_same_run(config)
    _check_steps(config)
    return (directory / CONFIG_FILE).exists()


@contextmanager
def locked_run_dir(config: Config) -> Iterator[DirectoryLock]:
    """Hold run.dir, which is created, against other trainings; look at it once more.

    Another run may have begun and ended there since `check_run_dir`. Raises ConfigError where that
    is so, where another training holds run.dir, or where it cannot be written.
    """
    lock = run_lock(config)
    with lock.held():
        check_run_dir(config)
        yield lock


def prepare_run_dir(config: Config) -> None:
    """Create run.dir and write the configuration into it, complete or not at all.

    Raises ConfigError where that is not possible: nothing has been started.
    """
    directory = Path(config.run.dir)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # It may hold secrets that the user wrote out.
        replace_text(directory / CONFIG_FILE, HEADER + to_yaml(config), mode=0o600)
    except WriteError as error:
        raise ConfigError(f"run.dir={directory}: {error}") from error
    except OSError as error:
        raise ConfigError(
            f"run.dir={directory} cannot be written: {error.strerror}; give another run.dir"
        ) from error


def _has_begun(directory: Path) -> bool:
    """Whether the run in a directory wrote anything worth keeping.

    A run that was refused at its start left only its configuration.
    """
    metrics = directory / "metrics.jsonl"
    return (directory / "checkpoints").exists() or (metrics.exists() and metrics.stat().st_size > 0)


def _check_config_file(config: Config) -> None:
    """Raise ConfigError if run.dir holds a configuration that no run has written there.

    A run's own has HEADER. One of a run from before there was a HEADER is what `to_yaml` makes of
    its content, and either a log stands beside it or it is what this run would write.
    """
    directory = Path(config.run.dir)
    file = directory / CONFIG_FILE
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"run.dir={directory}: {file} is not a configuration of a run ({error}); move it away, "
            "or give another run.dir"
        ) from error
    if text.startswith(HEADER) or text == to_yaml(config):
        return
    logged = (directory / "metrics.jsonl").exists() or (directory / "checkpoints").exists()
    if logged and _is_machine_written(text):
        return
    raise ConfigError(
        f"run.dir={directory} holds a {CONFIG_FILE} that no run has written, and training would "
        f"replace it; give another run.dir, or rename {file}"
    )


def _is_machine_written(text: str) -> bool:
    """Whether a YAML file has neither comments nor a layout of its own."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_yaml(OmegaConf.create(yaml.safe_load(text))) == text
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, AssertionError):
        return False


def _check_exports(directory: Path) -> None:
    """Raise ConfigError if a new run would replace a model that stands in its directory."""
    for name in EXPORTS:
        path = directory / name
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise ConfigError(
                f"run.dir={directory} holds {path}, which no run has written and training would "
                "replace; give another run.dir, or move it away"
            )


def _check_same_run(config: Config) -> None:
    """Raise ConfigError if the run in run.dir is another one."""
    directory = Path(config.run.dir)
    try:
        existing_run = fingerprint(load_written(str(directory / CONFIG_FILE)))
    except ConfigError as error:
        raise ConfigError(
            f"run.dir={directory} holds a run whose configuration cannot be read ({error}); "
            f"restore {directory / CONFIG_FILE}, or give another run.dir"
        ) from error
    difference = first_difference(existing_run, fingerprint(config))
    if difference is not None:
        name, old, new = difference
        raise ConfigError(
            f"run.dir={directory} holds another run, with {name}={show(old)} where this one has "
            f"{show(new)}; give another run.dir, or go on with that run by {name}={show(old)}"
        )


def _check_steps(config: Config) -> None:
    """Raise ConfigError if the run has trained more steps than it is now to have."""
    for path in complete(Path(config.run.dir) / "checkpoints")[-1:]:
        step = read_trainer_json(path)["state"]["step"]
        if step > config.train.steps:
            raise ConfigError(
                f"train.steps={config.train.steps} is fewer than the {step} steps that the run in "
                f"run.dir={config.run.dir} has trained ({path}); raise train.steps, or give "
                "another run.dir"
            )
