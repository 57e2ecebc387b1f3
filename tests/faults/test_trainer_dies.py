"""Whatever of the trainer is killed, nothing that it started outlives it: server, scheduler, detokenizer, router."""

import signal

import pytest

from tests.support import e2e
from tests.support.sglang_runs import TRANSPORTS, Tree, wait_for_step, wait_until_generating

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]
PARTS = ("sglang.launch_server", "sglang::scheduler", "sglang::detokenizer", "sglang::router")


@pytest.mark.parametrize("killed", ["the launcher", "the rank that owns the servers", "the other rank", "all of them"])
def test_no_orphans(config, tmp_path, round_number, killed):
    running = e2e.start(config, tmp_path / "run", f"weight_sync.transport={TRANSPORTS[round_number]}")
    try:
        wait_for_step(running, 1)
        wait_until_generating(running, round_number % 2)
        tree = Tree.below(running.process.pid)
        for part in PARTS:
            assert tree.named(part), part
        victims = {
            "the launcher": [running.process],
            "the rank that owns the servers": [running.rank(0)],
            "the other rank": [running.rank(1)],
            "all of them": [running.process, running.rank(0), running.rank(1)],
        }[killed]
        for victim in victims:
            victim.send_signal(signal.SIGKILL)
        running.process.wait(60)
        tree.assert_ended()
    finally:
        running.kill()
