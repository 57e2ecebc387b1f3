"""Whether a run writes where its input stands: `check_places` compares the paths of a run."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_policysplit.config import Config
from megatron_policysplit.errors import ConfigError

# What a run writes into run.dir, and changes or deletes there.
_WRITTEN = (
    "best",
    "checkpoints",
    "config.yaml",
    "hf",
    "logs",
    "messages.log",
    "metrics.jsonl",
    "reward_errors.jsonl",
    "rollouts",
    "tensorboard",
    "triton",
    "weights",
)


def check_places(config: Config) -> None:
    """Check that the run does not write into its model, or over a file that it reads.

    The current directory, or the one that holds the data, may be run.dir: a run leaves what it does
    not write alone. Raises ConfigError naming the keys, their values and the remedy.
    """
    _check_run_dir(config.run.dir)
    run_dir, model = _resolved(config.run.dir), _resolved(config.model.path)
    if run_dir == model or model in run_dir.parents:
        where = "is" if run_dir == model else "is inside"
        raise ConfigError(
            f"run.dir={config.run.dir} {where} model.path={config.model.path}, and a run would put "
            "its checkpoints into the model; give another run.dir"
        )
    snapshots = config.weight_sync.directory
    if snapshots is not None and (
        _resolved(snapshots) == model or model in _resolved(snapshots).parents
    ):
        raise ConfigError(
            f"weight_sync.directory={snapshots} is in model.path={config.model.path}, whose files "
            "must stay; give another directory"
        )
    for name, path in _inputs(config):
        place = _resolved(path)
        inside = place.relative_to(run_dir).parts if run_dir in place.parents else ()
        if inside and inside[0] in _WRITTEN:
            raise ConfigError(
                f"{name}={path} is what the run in run.dir={config.run.dir} writes itself; give "
                "another run.dir"
            )


def _check_run_dir(path: str) -> None:
    """Raise ConfigError for a run.dir that nobody means: nothing, or the root."""
    if not path.strip():
        raise ConfigError("run.dir is empty; give a directory, or . for the current one")
    if _resolved(path) == Path(_resolved(path).anchor):
        raise ConfigError(
            f"run.dir={path} is the root of the file system; give a directory of the run's own"
        )


def _inputs(config: Config) -> list[tuple[str, str]]:
    """The keys of what a run reads, with their paths."""
    paths = {
        "model.path": config.model.path,
        "model.megatron": config.model.megatron,
        "data.path": config.data.path,
        "eval.path": config.eval.path,
        "rollout.replay_dir": config.rollout.replay_dir,
        "modes.high_entropy_prompt_file": config.modes.high_entropy_prompt_file,
        "eval.judge.prompt_file": config.eval.judge.prompt_file,
    }
    return [(name, path) for name, path in paths.items() if path is not None]


def _resolved(path: str) -> Path:
    """The absolute path, links followed."""
    return Path(os.path.realpath(path))
