"""Standard output that goes away: a training outlives it, other commands end as programs do."""

import subprocess
import sys

import pytest

TRAINING = """
import sys
from megatron_policysplit.logs.streams import CONSOLE, outlive_console
outlive_console()
sys.stdin.readline()
from rich.console import Console
for number in range(3):
    Console().print("a line")
    print("another", flush=True)
open(sys.argv[1], "w").write(f"{CONSOLE.news()} {CONSOLE.news()}")
sys.exit(7)
"""
COMMAND = """
import sys
from megatron_policysplit.logs.streams import end_with_console
end_with_console()
sys.stdin.readline()
print("a line", flush=True)
sys.exit(7)
"""


def run(code: str, output: str, *arguments: str) -> tuple[int, str]:
    """Exit code and stderr of a process whose output is a full disk, or a pipe that is closed."""
    full = open("/dev/full", "w") if output == "full" else None
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=full or subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if full:
        full.close()
    else:
        process.stdout.close()
    _, stderr = process.communicate("go\n", timeout=60)
    return process.returncode, stderr


@pytest.mark.parametrize(("output", "reason"), [("pipe", "Broken pipe"), ("full", "No space left on device")])
def test_a_training_goes_on_without_its_console(tmp_path, output, reason):
    code, stderr = run(TRAINING, output, str(tmp_path / "news"))
    assert code == 7
    assert stderr == (
        f"policysplit: the console is gone ({reason}); the training goes on without it, see messages.log and "
        "metrics.jsonl in run.dir\n"
    )
    said = (tmp_path / "news").read_text()
    assert said == f"the console is gone ({reason}); the training goes on without it None"


def test_a_command_ends_with_its_reader():
    assert run(COMMAND, "pipe") == (141, "")
    code, stderr = run(COMMAND, "full")
    assert code == 1
    assert stderr.endswith(
        "WriteError: standard output cannot be written: No space left on device; send it elsewhere\n"
    )


def test_streams_in_memory_are_left_alone(monkeypatch):
    import io

    from megatron_policysplit.logs import streams

    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    streams._guard("stdout", lambda error: None)
    assert sys.stdout is stream
