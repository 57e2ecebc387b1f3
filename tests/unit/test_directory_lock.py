"""One process at a time: living, dead and foreign holders, with the kernel's locks and without."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_policysplit.distributed import directory_lock
from megatron_policysplit.distributed.directory_lock import DirectoryLock, Holder, Timing
from megatron_policysplit.errors import ConfigError

QUICK = Timing(heartbeat=0.2, stale=1.0, settle=0.1, ending=2.0)
HOLDER = """
import sys, time, pathlib
from megatron_policysplit.distributed.directory_lock import DirectoryLock, Timing
lock = DirectoryLock(pathlib.Path(sys.argv[1]), "run.dir=r", "give another run.dir", Timing(0.2, 1.0, 0.1, 2.0))
lock.acquire()
print("held", flush=True)
if len(sys.argv) > 2:
    import subprocess
    child = subprocess.Popen(["sleep", sys.argv[2]], pass_fds=[lock.descriptor])
    print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture(params=["flock", "no locks"])
def path(request, tmp_path, monkeypatch) -> Path:
    """The path of a lock file; on a file system that may have no locks, for this process."""
    if request.param == "no locks":

        def refuse(descriptor, operation):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(fcntl, "flock", refuse)
    return tmp_path / "run.lock"


def lock(path: Path) -> DirectoryLock:
    return DirectoryLock(path, "run.dir=r", "give another run.dir", QUICK)


def hold(path: Path, *arguments: str) -> subprocess.Popen:
    """Another process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(path), *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    process.stdout.close()


def foreign(path: Path, age: float = 0.0) -> None:
    """A lock file of a process on another machine, `age` seconds after its last sign of life."""
    holder = replace(Holder.this_process(), host="node7", pid=4711, boot="of another kernel")
    path.write_text(json.dumps(asdict(holder)) + "\n")
    os.utime(path, (time.time() - age, time.time() - age))


def test_a_lock_names_its_holder_and_leaves_nothing(path):
    mine = lock(path)
    mine.acquire()
    assert Holder.read(path.read_text()).pid == os.getpid()
    mine.release()
    mine.release()  # twice does no harm
    assert list(path.parent.iterdir()) == []
    lock(path).check()


def test_a_living_holder_is_named(path):
    process = hold(path)
    try:
        holder = Holder.read(path.read_text())
        for call in (lock(path).check, lock(path).acquire):
            with pytest.raises(ConfigError) as error:
                call()
            assert str(error.value) == (
                f"run.dir=r is in use by process {process.pid} on {holder.host} since {holder.since}; wait for it, "
                f"end it (kill {process.pid} on {holder.host}), or give another run.dir"
            )
        assert path.exists()
    finally:
        end(process)


def test_a_holder_that_was_killed_is_followed_at_once(path):
    end(hold(path))
    assert path.exists()
    began = time.monotonic()
    lock(path).check()
    mine = lock(path)
    mine.acquire()
    assert time.monotonic() - began < QUICK.stale
    assert Holder.read(path.read_text()).pid == os.getpid()
    mine.release()


def test_the_lock_lasts_as_long_as_a_child_of_a_killed_holder(tmp_path):
    path = tmp_path / "run.lock"
    process = hold(path, "1.2")
    process.stdout.readline()  # the child runs
    began = time.monotonic()
    end(process)
    mine = lock(path)
    mine.acquire()  # waits for the child
    assert time.monotonic() - began > 0.8
    mine.release()
    process = hold(path, "30")
    child = int(process.stdout.readline())
    end(process)
    with pytest.raises(ConfigError, match=f"in use by process {process.pid} on "):
        lock(path).acquire()
    os.kill(child, signal.SIGKILL)


def test_a_pid_that_was_given_to_another_process_is_no_holder(path):
    holder = replace(Holder.this_process(), started="1")
    path.write_text(json.dumps(asdict(holder)) + "\n")
    mine = lock(path)
    mine.acquire()
    mine.release()


def test_a_stale_holder_on_another_machine_is_followed(path, capsys):
    foreign(path, age=600)
    lock(path).check()
    mine = lock(path)
    mine.acquire()
    assert "waiting" not in capsys.readouterr().err  # it is old by the file system's own clock
    mine.release()


def test_a_fresh_holder_on_another_machine_is_watched(path, capsys):
    """As a job that is requeued on another node finds it, before the heartbeat is old."""
    foreign(path)
    began = time.monotonic()
    mine = lock(path)
    mine.acquire()
    assert 0.5 < time.monotonic() - began < 5
    mine.release()
    said = capsys.readouterr().err
    assert "run.dir=r was last used by process 4711 on node7; waiting up to 1 s for a sign" in said


def test_a_living_holder_on_another_machine_is_named(path):
    foreign(path)
    beating = subprocess.Popen([sys.executable, "-c", BEAT, str(path)])
    try:
        for call in (lock(path).check, lock(path).acquire):
            with pytest.raises(ConfigError, match="in use by process 4711 on node7 since .*kill 4711 on node7"):
                call()
    finally:
        beating.kill()
        beating.wait()


BEAT = "import os, sys, time\nwhile True:\n    os.utime(sys.argv[1])\n    time.sleep(0.1)"


def test_an_empty_file_is_an_unnamed_holder(path):
    path.touch()
    os.utime(path, (1, 1))
    mine = lock(path)
    mine.acquire()
    mine.release()
    path.touch()
    beating = subprocess.Popen([sys.executable, "-c", BEAT, str(path)])
    try:
        with pytest.raises(ConfigError, match="run.dir=r is in use by another process; wait for it, or give"):
            lock(path).acquire()
    finally:
        beating.kill()
        beating.wait()


def test_of_two_that_follow_a_dead_holder_one_wins(tmp_path, monkeypatch):
    path = tmp_path / "run.lock"
    foreign(path, age=600)
    mine = lock(path)
    monkeypatch.setattr(directory_lock.time, "sleep", lambda seconds: foreign(path))  # the other writes last
    with pytest.raises(ConfigError, match="in use by process 4711 on node7"):
        mine.acquire()
    assert Holder.read(path.read_text()).host == "node7"  # its file stays


def test_a_holder_gives_signs_of_life_and_ends_when_it_lost_the_lock(tmp_path):
    path = tmp_path / "run.lock"
    process = hold(path)
    first = path.stat().st_mtime_ns
    deadline = time.monotonic() + 5
    while path.stat().st_mtime_ns == first and time.monotonic() < deadline:
        time.sleep(0.05)
    assert path.stat().st_mtime_ns > first
    foreign(path)
    assert process.wait(timeout=10) == 1
    process.stdout.close()


def test_a_directory_that_is_gone_has_no_holder(tmp_path):
    lock(tmp_path / "gone" / "run.lock").check()
    with pytest.raises(OSError):
        lock(tmp_path / "gone" / "run.lock").acquire()
