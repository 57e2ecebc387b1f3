"""The launcher with small scripts in place of the worker: signals, deaths, exit codes, no process left."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from megatron_policysplit.distributed.launch import Patience, launch

LAUNCHER = """
import sys
from megatron_policysplit.distributed.launch import Patience, launch
sys.exit(launch(sys.argv[3:], int(sys.argv[2]), [sys.executable, sys.argv[1]], Patience(save=4, peers=2, terminate=1)))
"""
PREAMBLE = """
import os, pathlib, signal, subprocess, sys, time
rank, directory = int(os.environ["RANK"]), pathlib.Path(sys.argv[1])
def tell(name, text=""):
    partial = directory / f".{name}.{rank}"
    partial.write_text(str(text))
    partial.rename(directory / f"{name}.{rank}")
"""


def worker(tmp_path: Path, body: str) -> Path:
    script = tmp_path / "worker.py"
    script.write_text(PREAMBLE + textwrap.dedent(body))
    return script


def start(tmp_path: Path, body: str, nproc: int = 2) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(worker(tmp_path, body)), str(nproc), str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"},
    )


def run(tmp_path: Path, body: str, nproc: int = 2) -> tuple[int, str]:
    """Exit code and stderr of a launcher that ends by itself."""
    process = start(tmp_path, body, nproc)
    _, stderr = process.communicate(timeout=30)
    return process.returncode, stderr


def read(tmp_path: Path, name: str, ranks: int = 2) -> list[str]:
    """What every rank told under `name`, waiting for it."""
    paths = [tmp_path / f"{name}.{rank}" for rank in range(ranks)]
    wait_for(lambda: all(path.exists() for path in paths))
    return [path.read_text() for path in paths]


def wait_for(condition, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "condition never held"
        time.sleep(0.02)


def alive(pid: str) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_environment_of_the_ranks_and_success(tmp_path):
    code, stderr = run(
        tmp_path,
        """
        names = ("RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR OMP_NUM_THREADS MASTER_PORT").split()
        tell("env", " ".join(os.environ[name] for name in names))
        """,
    )
    assert (code, stderr) == (0, "")
    first, second = (line.split() for line in read(tmp_path, "env"))
    threads = str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert first[:6] == ["0", "0", "2", "2", "127.0.0.1", threads]
    assert second[:6] == ["1", "1", "2", "2", "127.0.0.1", threads]
    assert first[6] == second[6] and 1024 < int(first[6]) < 65536


def test_a_given_thread_count_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    script = worker(tmp_path, 'tell("threads", os.environ["OMP_NUM_THREADS"])')
    assert launch([str(tmp_path)], 1, [sys.executable, str(script)]) == 0
    assert read(tmp_path, "threads", 1) == ["7"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_is_forwarded_once_and_the_ranks_save(tmp_path, number):
    process = start(
        tmp_path,
        """
        got = []
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: got.append(number))
        tell("ready")
        while not got:
            time.sleep(0.01)
        time.sleep(0.5)
        tell("signals", got)
        sys.exit(75)
        """,
    )
    read(tmp_path, "ready")
    process.send_signal(number)
    time.sleep(0.2)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 75
    assert read(tmp_path, "signals") == [str([int(number)])] * 2
    assert stderr == f"policysplit: {number.name}: waiting up to 4 s for 2 ranks to save and exit\n"


def test_signal_before_a_rank_handles_signals(tmp_path):
    process = start(tmp_path, 'tell("ready")\ntime.sleep(60)')
    read(tmp_path, "ready")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 75


def test_signal_when_only_one_rank_handles_signals(tmp_path):
    """The one that does would wait for the other at the group's first meeting."""
    process = start(
        tmp_path,
        """
        if rank == 0:
            signal.signal(signal.SIGTERM, lambda *_: None)
        tell("ready")
        time.sleep(60)
        """,
    )
    read(tmp_path, "ready")
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 75
    assert time.monotonic() - began < 30  # the ranks would sleep 60 s


def test_ranks_that_fail_alike_are_not_named(tmp_path):
    code, stderr = run(tmp_path, 'time.sleep(0.5 * rank)\nprint("error: it failed", file=sys.stderr)\nsys.exit(1)')
    assert (code, stderr) == (1, "error: it failed\n" * 2)


def test_a_rank_that_does_not_stop_is_killed(tmp_path):
    process = start(
        tmp_path,
        """
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75) if rank == 0 else None)
        tell("pid", os.getpid())
        while True:
            time.sleep(0.05)
        """,
    )
    pids = read(tmp_path, "pid")
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 1
    assert time.monotonic() - began > 4  # it had its time
    assert "policysplit: ending rank 1: still running after the time it had\n" in stderr
    assert f"policysplit: rank 1 (pid {pids[1]}) was killed by SIGKILL\n" in stderr
    assert not any(alive(pid) for pid in pids)


def test_killed_rank_is_named_and_no_process_is_left(tmp_path):
    process = start(
        tmp_path,
        """
        grader = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
        tell("pid", os.getpid())
        tell("grader", grader.pid)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(120)
        """,
    )
    pids, graders = read(tmp_path, "pid"), read(tmp_path, "grader")
    os.kill(int(pids[1]), signal.SIGKILL)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 1
    assert stderr.startswith(f"policysplit: rank 1 (pid {pids[1]}) was killed by SIGKILL\n")
    wait_for(lambda: not any(alive(pid) for pid in pids + graders))


def test_the_others_may_end_by_themselves(tmp_path):
    code, stderr = run(
        tmp_path,
        """
        if rank == 1:
            tell("pid", os.getpid())
            sys.exit(3)
        time.sleep(1)
        tell("noticed")
        sys.exit(1)
        """,
    )
    assert code == 1
    assert (tmp_path / "noticed.0").exists()
    assert stderr == f"policysplit: rank 1 (pid {(tmp_path / 'pid.1').read_text()}) exited with code 3\n"


def test_an_exit_code_that_all_ranks_agree_on_is_returned(tmp_path):
    code, stderr = run(
        tmp_path,
        """
        if rank == 0:
            time.sleep(0.4)
            print("error: no such model", file=sys.stderr)
        sys.exit(2)
        """,
    )
    assert (code, stderr) == (2, "error: no such model\n")


def test_bad_input_that_only_one_rank_sees_is_named(tmp_path):
    code, stderr = run(tmp_path, "sys.exit(2 if rank == 1 else 0)")
    assert code == 1
    assert "policysplit: rank 1 (pid " in stderr and ") exited with code 2\n" in stderr


def test_ranks_die_with_a_killed_launcher(tmp_path):
    process = start(tmp_path, 'tell("pid", os.getpid())\ntime.sleep(120)')
    pids = read(tmp_path, "pid")
    process.kill()
    process.communicate(timeout=30)
    wait_for(lambda: not any(alive(pid) for pid in pids), seconds=5)


def test_forked_processes_die_with_a_killed_process(tmp_path):
    """As Megatron-Core's checkpoint writers do, of which each may have forked another."""
    body = """
        import os, pathlib, sys, time
        from megatron_policysplit.distributed.launch import forks_die_with_us
        forks_die_with_us()
        for name in ("child", "grandchild"):
            if os.fork():
                time.sleep(600)
            pathlib.Path(sys.argv[1], name).write_text(str(os.getpid()))
        time.sleep(600)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(body), str(tmp_path)])
    wait_for(lambda: (tmp_path / "grandchild").exists() and (tmp_path / "grandchild").read_text())
    forked = [(tmp_path / name).read_text() for name in ("child", "grandchild")]
    assert all(alive(pid) for pid in forked)
    parent.kill()
    parent.wait()
    wait_for(lambda: not any(alive(pid) for pid in forked))


def test_handlers_of_the_caller_are_restored(tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    assert launch([str(tmp_path)], 1, [sys.executable, str(worker(tmp_path, "sys.exit(4)"))], Patience()) == 4
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_the_launcher_imports_no_torch():
    code = "import sys, megatron_policysplit.distributed.launch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
