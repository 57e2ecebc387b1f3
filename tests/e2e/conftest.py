"""One uninterrupted run of six steps that the tests compare with."""

from pathlib import Path

import pytest

from tests.support import e2e


@pytest.fixture(scope="session")
def config(tmp_path_factory) -> Path:
    return e2e.make_workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(scope="session")
def straight(config, tmp_path_factory) -> e2e.Run:
    """TP=2, every sink, by the command: six steps in one go, checkpoints after steps 3 and 6."""
    directory = tmp_path_factory.mktemp("straight") / "run"
    sinks = ("log.tensorboard=true", "log.wandb_project=test", "log.wandb_mode=offline")
    return e2e.train_by_command(config, directory, *sinks)
