"""One process at a time works in a directory, also where the file system has no locks.

The lock is a file in the directory that names its holder: host, process id, since when. Two things
say whether the holder is alive:

- flock, which the kernel gives back however the holder ends. Some cluster file systems refuse it,
  and some keep it to one node, so it proves that nobody holds the lock on *this* machine at most.
- a heartbeat: the holder touches the file every `Timing.heartbeat` seconds. A holder on another
  machine whose heartbeat has not moved for `Timing.stale` seconds is taken for dead. Only times
  that the file system itself gave are compared, because the clocks of two nodes may differ.

So a job that is requeued on another node starts after its predecessor was killed, and a second
submit is refused while the first one runs.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from megatron_policysplit.errors import FAILED, ConfigError

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


@dataclass(frozen=True)
class Timing:
    """Seconds of a lock's waits."""

    heartbeat: float = 10.0  # between two signs of life
    stale: float = 60.0  # without a sign of life, after which a holder elsewhere is dead
    settle: float = 2.0  # until every contender sees who wrote last
    ending: float = 10.0  # for the children of a killed holder to end, too


@dataclass(frozen=True)
class Holder:
    """Who holds a lock, as its file says in one line of JSON."""

    host: str
    pid: int
    since: str  # UTC
    boot: str  # of the kernel that runs it: two machines may have one host name
    pid_space: str  # in which its pid counts: containers have their own
    started: str  # the process's start in clock ticks after the boot: a pid may be used again

    @classmethod
    def this_process(cls) -> Holder:
        """This process, from now on."""
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        pid = os.getpid()
        return cls(
            socket.gethostname(), pid, since, _boot(), os.readlink("/proc/self/ns/pid"), _start(pid)
        )

    @classmethod
    def read(cls, text: str) -> Holder | None:
        """The holder that a lock file names; None where it is empty or cut short."""
        try:
            values = json.loads(text)
            return cls(**{field.name: values[field.name] for field in fields(cls)})
        except (ValueError, KeyError, TypeError):
            return None

    def shares_kernel(self) -> bool:
        """Whether this process runs on the holder's machine, so that flock speaks for both."""
        return self.boot == _boot()

    def is_visible(self) -> bool:
        """Whether the holder's pid means something to this process."""
        return self.shares_kernel() and self.pid_space == os.readlink("/proc/self/ns/pid")

    def runs(self) -> bool:
        """Whether a visible holder is alive."""
        return _start(self.pid) == self.started != ""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _start(pid: int) -> str:
    """When a process started, in clock ticks after the boot; "" for none, and for a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    state, *numbers = stat.rpartition(")")[2].split()
    return "" if state in "ZX" else numbers[18]


class DirectoryLock:
    """The lock of a directory: `acquire` and `release` it; `check` only looks.

    Args:
        path: the lock file. Its directory must exist when the lock is taken.
        name: the directory as messages call it, `run.dir=runs/a`.
        remedy: what else the user can do, beside waiting for the holder or ending it.
        timing: seconds of the waits.
    """

    def __init__(self, path: Path, name: str, remedy: str, timing: Timing = Timing()):  # noqa: B008
        self.path, self.name, self.remedy, self.timing = path, name, remedy, timing
        self.descriptor: int | None = None  # open while the lock is held; children may inherit it
        self._holder: Holder | None = None
        self._ended = threading.Event()

    def check(self) -> None:
        """Raise ConfigError if another process holds the lock. Waits as `acquire` does."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # no lock, or a directory that cannot be used: whoever writes says why
            return
        try:
            self._refuse_living(descriptor, fcntl.LOCK_SH)
        finally:
            os.close(descriptor)

    def acquire(self) -> None:
        """Take the lock, and begin to give signs of life.

        Raises ConfigError if another process holds it; OSError where the file cannot be written.
        """
        while True:
            descriptor, is_new = self._open()
            try:
                seen = self._refuse_living(descriptor, fcntl.LOCK_EX, is_new)
                # The last holder may have removed the file between its opening and its locking.
                if self._is_in_place(descriptor):
                    self._write(descriptor)
                    if not is_new and not seen:
                        self._settle(descriptor)
                    break
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
        self.descriptor = descriptor
        threading.Thread(target=self._beat, name="directory-lock", daemon=True).start()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock for a block of code; its directory is made.

        Raises ConfigError as `acquire` does, and where the directory cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.acquire()
        except OSError as error:
            raise ConfigError(
                f"{self.name} cannot be written: {error.strerror}; {self.remedy}"
            ) from error
        try:
            yield
        finally:
            self.release()

    def release(self) -> None:
        """Give the lock back and remove its file."""
        self._ended.set()
        if self.descriptor is None:
            return
        if self._is_in_place(self.descriptor) and _read(self.descriptor) == self._holder:
            self.path.unlink(missing_ok=True)
        os.close(self.descriptor)
        self.descriptor = None

    def _open(self) -> tuple[int, bool]:
        """The open lock file, and whether this call made it."""
        flags = os.O_RDWR | os.O_CLOEXEC
        while True:
            try:
                return os.open(self.path, flags | os.O_CREAT | os.O_EXCL, 0o644), True
            except FileExistsError:
                pass
            try:
                return os.open(self.path, flags), False
            except FileNotFoundError:  # removed in between
                continue

    def _is_in_place(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), self.path.stat())
        except FileNotFoundError:
            return False

    def _refuse_living(self, descriptor: int, operation: int, is_new: bool = False) -> bool:
        """Raise ConfigError if the lock's holder is alive.

        Returns whether the kernel has said so for all who could hold it: it has locked the file,
        and the holder named there is of this machine. operation: LOCK_EX, or LOCK_SH to look only.
        """
        has_locks = self._flock(descriptor, operation)
        if is_new:
            return has_locks
        holder = _read(descriptor)
        deadline = time.monotonic() + self.timing.settle
        while holder is None and time.monotonic() < deadline:  # it is about to write its name
            time.sleep(self.timing.settle / 20)
            holder = _read(descriptor)
        if holder is not None and has_locks and holder.shares_kernel():
            return True
        if holder is not None and not has_locks and holder.is_visible():
            if holder.runs():
                raise self._in_use(holder)
            return False
        if self._shows_life(descriptor, holder):
            raise self._in_use(_read(descriptor) or holder)
        return False

    def _flock(self, descriptor: int, operation: int) -> bool:
        """Lock the open file (LOCK_SH: for a moment); False where the file system has no locks.

        Raises ConfigError if another process has it. One that only looks has it for a moment. The
        ranks of a launcher that was killed inherited its lock and are about to end; they get
        `Timing.ending` seconds.
        """
        began = time.monotonic()
        while True:
            try:
                fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
                if operation == fcntl.LOCK_SH:
                    fcntl.flock(descriptor, fcntl.LOCK_UN)
                return True
            except BlockingIOError:
                holder = _read(descriptor)
                is_ending = holder is None or (holder.is_visible() and not holder.runs())
                patience = self.timing.ending if is_ending else min(0.5, self.timing.ending)
                if time.monotonic() - began > patience:
                    raise self._in_use(holder) from None
                time.sleep(0.05)
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    return False
                raise

    def _shows_life(self, descriptor: int, holder: Holder | None) -> bool:
        """Whether a holder on another machine, or one without a name, gives a sign of life."""
        timing, seen = self.timing, os.fstat(descriptor).st_mtime_ns
        age = self._age(seen)
        if age is not None and age > timing.stale:
            return False
        wait = timing.stale - max(0.0, age or 0.0)
        print(
            f"policysplit: {self.name} was last used by {holder or 'an unnamed process'}; waiting "
            f"up to {wait:.0f} s for a sign that it still runs",
            file=sys.stderr,
            flush=True,
        )
        deadline = time.monotonic() + wait
        while time.monotonic() < deadline:
            time.sleep(min(1.0, timing.heartbeat / 4))
            try:
                # Opened again, because network file systems ask the server only then.
                with open(self.path, "rb") as file:
                    if os.fstat(file.fileno()).st_mtime_ns != seen:
                        return True
            except FileNotFoundError:
                return False  # the holder has ended and removed it
        return False

    def _age(self, modified_ns: int) -> float | None:
        """Seconds since a time that the file system gave, by its own clock.

        None where no file can be made to ask it.
        """
        try:
            with tempfile.TemporaryFile(dir=self.path.parent) as probe:
                return (os.fstat(probe.fileno()).st_mtime_ns - modified_ns) / 1e9
        except OSError:
            return None

    def _write(self, descriptor: int) -> None:
        """Write this process's name into the file."""
        self._holder = Holder.this_process()
        text = json.dumps(asdict(self._holder)) + "\n"
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, text.encode(), 0)
            os.fsync(descriptor)
        except OSError:
            self.path.unlink(missing_ok=True)
            raise

    def _settle(self, descriptor: int) -> None:
        """Raise ConfigError if another process took over the same dead holder's lock after us."""
        time.sleep(self.timing.settle)
        holder = _read(descriptor)
        if holder != self._holder:
            raise self._in_use(holder)

    def _beat(self) -> None:
        """Touch the file until the lock is given back; end this process if it has lost it.

        Another process takes over only from one that seemed dead, such as one that was suspended.
        """
        descriptor = self.descriptor
        while not self._ended.wait(self.timing.heartbeat):
            try:
                holder = Holder.read(self.path.read_text(encoding="utf-8"))
                if holder is not None and holder != self._holder:
                    self._lost(holder)
                os.utime(descriptor)
            except OSError:  # a disk that does not answer, or a directory that somebody removed
                continue

    def _lost(self, holder: Holder) -> None:
        print(
            f"error: {self.name} was taken over by {holder}, because this process had given no "
            f"sign of life for {self.timing.stale:.0f} s; it ends so as not to write there, too",
            file=sys.stderr,
            flush=True,
        )
        os._exit(FAILED)  # ranks end with this process

    def _in_use(self, holder: Holder | None) -> ConfigError:
        if holder is None:
            return ConfigError(
                f"{self.name} is in use by another process; wait for it, or {self.remedy}"
            )
        return ConfigError(
            f"{self.name} is in use by {holder} since {holder.since}; wait for it, end it (kill "
            f"{holder.pid} on {holder.host}), or {self.remedy}"
        )


def _read(descriptor: int) -> Holder | None:
    """The holder that an open lock file names."""
    return Holder.read(os.pread(descriptor, 4096, 0).decode("utf-8", errors="replace"))
