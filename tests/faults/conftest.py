"""A model and its questions, the same for all runs; each test gets a run directory of its own."""

from pathlib import Path

import pytest

from tests.support.sglang import require_server_environment
from tests.support.sglang_runs import make_workspace

ROUNDS = 3


def pytest_generate_tests(metafunc):
    """Whatever takes a round is done three times in a row."""
    if "round_number" in metafunc.fixturenames:
        metafunc.parametrize("round_number", range(ROUNDS), ids=lambda number: f"round{number}")


@pytest.fixture(scope="session")
def config(tmp_path_factory) -> Path:
    require_server_environment()
    return make_workspace(tmp_path_factory.mktemp("workspace"))
