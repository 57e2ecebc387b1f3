"""Servers that a run started are killed or stopped while they generate: the run goes on, and the server comes back."""

import signal

import pytest

from tests.support import e2e
from tests.support.sglang_runs import (
    STEPS,
    TRANSPORTS,
    Tree,
    assert_whole,
    log_of,
    processes_of,
    step_of,
    wait_for_line,
    wait_for_step,
    wait_until_generating,
)

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]


def lose_and_recover(running, victim, harm):
    """`harm` one server in mid-generation; the other trains on, the lost one comes back and generates again."""
    wait_for_step(running, 1)
    wait_until_generating(running, victim)
    harm(processes_of(running, victim))
    running.wait_for(lambda: "is lost" in running.text())
    assert f"engine {victim} (" in running.text()
    step = step_of(running)
    running.wait_for(lambda: step_of(running) >= min(step + 1, STEPS - 2))
    assert "is back" not in running.text()
    running.hold(e2e.TRAIN_ANSWER)  # so that the run does not end before the server is there
    wait_for_line(running, "is back")
    started = log_of(running, victim).rfind("--- ")
    assert started > 0
    running.release()
    running.wait_for(lambda: "Decode batch" in log_of(running, victim)[started:])
    tree = Tree.below(running.process.pid)
    assert running.finish(300) == 0, running.text()
    tree.assert_ended()
    assert_whole(running.directory)
    assert running.text().count("is lost") == 1


def test_a_server_is_killed(config, tmp_path, round_number):
    transport, victim = TRANSPORTS[round_number], round_number % 2
    running = e2e.start(config, tmp_path / "run", f"weight_sync.transport={transport}")
    lose_and_recover(running, victim, lambda processes: processes[0].kill())
    assert "SIGKILL" in running.text()


@pytest.mark.parametrize("part", ["sglang::scheduler", "sglang::detokenizer", "everything"])
def test_a_server_hangs(config, tmp_path, round_number, part):
    def stop(processes):
        chosen = [p for p in processes if part == "everything" or part in " ".join(p.cmdline())]
        assert chosen
        for process in chosen:
            process.send_signal(signal.SIGSTOP)

    running = e2e.start(
        config,
        tmp_path / "run",
        f"weight_sync.transport={TRANSPORTS[round_number]}",
        "rollout.server.health_seconds=8",
        "rollout.request_seconds=10",
        "rollout.retries=10",
        "weight_sync.timeout_seconds=15",
    )
    lose_and_recover(running, round_number % 2, stop)
