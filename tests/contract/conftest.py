"""One real SGLang server for the whole session, and a proxy in front of it; each test finds both as new."""

from pathlib import Path

import pytest

from tests.support.fault_proxy import FaultProxy
from tests.support.sglang import LiveServer, Reference, live_server, make_model


@pytest.fixture(scope="session")
def reference(tmp_path_factory) -> Reference:
    """The model that the server was started with, other weights for it, and what transformers makes of them."""
    return Reference(make_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="session")
def live(reference, tmp_path_factory) -> LiveServer:
    log: Path = tmp_path_factory.mktemp("server") / "server.log"
    with live_server(reference.path, log) as server:
        yield server


@pytest.fixture
def server(live) -> LiveServer:
    """The server with the first weights as version 0, nothing in flight, no weight session open."""
    live.reset()
    return live


@pytest.fixture
def proxy(server) -> FaultProxy:
    with FaultProxy(server.port) as proxy:
        yield proxy
