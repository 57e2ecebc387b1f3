"""Weight syncs that break half-way in a whole run: refused, receiver killed, receiver stopped, sender killed.

Two servers run beside the trainer, each behind a proxy that lets the test act at the very bucket. No rollout is ever
of mixed weights (`assert_whole`), and no rank hangs.
"""

import signal
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from tests.support import e2e
from tests.support.fault_proxy import Fault, FaultProxy, Rule
from tests.support.sglang import LiveServer, live_server
from tests.support.sglang_runs import (
    TRANSPORTS,
    Tree,
    assert_whole,
    eventually,
    first_line,
    step_of,
    wait_for_line,
    wait_for_step,
)

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900, func_only=True)]

BUCKET = {
    "tensor": "/update_weights_from_tensor",
    "disk": "/update_weights_from_disk",
    "distributed": "/update_weights_from_distributed",
}


@dataclass
class Served:
    """A server that outlives runs, and the proxy through which they reach it."""

    live: LiveServer
    proxy: FaultProxy

    def processes(self) -> list:
        return Tree.below(self.live.server.pid).processes


@pytest.fixture(scope="module")
def pair(config, tmp_path_factory):
    """Two servers, started again where a test has killed one."""
    directory = tmp_path_factory.mktemp("servers")
    with ExitStack() as stack:
        served = []
        for number in range(2):
            live = stack.enter_context(live_server(config.parent / "model", directory / f"{number}.log"))
            served.append(Served(live, stack.enter_context(FaultProxy(live.port))))
        yield served


@pytest.fixture
def servers(pair):
    for served in pair:
        served.proxy.script()
        if not served.live.server.alive():
            served.live.start_again()
        served.live.reset()
    return pair


def start(config, directory, servers, transport):
    addresses = ",".join(served.proxy.address for served in servers)
    return e2e.start(
        config,
        directory,
        f"weight_sync.transport={transport}",
        f"rollout.addresses=[{addresses}]",
        "weight_sync.timeout_seconds=15",
        "rollout.request_seconds=15",
        "rollout.server.health_seconds=8",
        "rollout.retries=10",
    )


def break_the_next_sync(running, transport, victim, *, fault=None, before=None):
    """Strike at a bucket in the middle of the sync after the step that is being graded now."""
    wait_for_step(running, 1)
    running.hold(e2e.TRAIN_ANSWER)
    call = 1 if transport == "disk" else 2
    victim.proxy.script(Rule(BUCKET[transport], fault, call, status=500, before=before))
    running.release()
    running.wait_for(lambda: victim.proxy.paths().count(BUCKET[transport]) >= call)


def finish(running, servers):
    assert running.finish(400) == 0, running.text()
    assert_whole(running.directory)
    versions = {served.live.call("version") for served in servers}
    assert len(versions) == 1, versions


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_bucket_is_refused(config, tmp_path, servers, transport, round_number):
    victim = servers[round_number % 2]
    running = start(config, tmp_path / "run", servers, transport)
    break_the_next_sync(running, transport, victim, fault=Fault.REFUSE)
    finish(running, servers)
    assert f"({victim.proxy.address}) did not take the weights" in running.text()
    assert victim.proxy.paths().count("/continue_generation") >= 1


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_receiver_is_killed(config, tmp_path, servers, transport, round_number):
    victim = servers[round_number % 2]
    running = start(config, tmp_path / "run", servers, transport)
    break_the_next_sync(running, transport, victim, before=victim.live.server.kill)
    step = step_of(running)
    running.wait_for(lambda: step_of(running) > step)
    running.hold(e2e.TRAIN_ANSWER)
    victim.live.start_again()
    wait_for_line(running, f"({victim.proxy.address}) is back")
    running.release()
    finish(running, servers)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_receiver_hangs(config, tmp_path, servers, transport, round_number):
    victim = servers[round_number % 2]
    scheduler = next(p for p in victim.processes() if "sglang::scheduler" in " ".join(p.cmdline()))
    running = start(config, tmp_path / "run", servers, transport)
    try:
        break_the_next_sync(running, transport, victim, before=lambda: scheduler.send_signal(signal.SIGSTOP))
        step = step_of(running)
        running.wait_for(lambda: step_of(running) > step)
        running.hold(e2e.TRAIN_ANSWER)
    finally:
        scheduler.send_signal(signal.SIGCONT)
    eventually(lambda: victim.proxy.paths().count("/continue_generation") > 0, 120, "the engine used again")
    running.release()
    finish(running, servers)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_sender_is_killed(config, tmp_path, servers, transport, round_number):
    """The servers are left in an open session; the run that resumes ends it and gives them all weights again."""
    victim = servers[round_number % 2]
    running = start(config, tmp_path / "run", servers, transport)
    wait_for_step(running, 1)
    chief = running.rank(0)
    # torch's manager removes the shared files when the engine, which goes on, has let go of them too.
    tree = Tree.below(running.process.pid).without("torch_shm_manager")
    try:
        break_the_next_sync(running, transport, victim, before=chief.kill)
    except AssertionError as error:  # it ended while it was waited for
        assert "the run ended with" in str(error)
    assert running.process.wait(120) == 1, running.text()
    assert first_line(running, "policysplit: rank 0") == f"policysplit: rank 0 (pid {chief.pid}) was killed by SIGKILL"
    tree.assert_ended()
    victim.proxy.script()
    again = start(config, tmp_path / "run", servers, transport)
    finish(again, servers)
    assert "resumed from" in again.text()
