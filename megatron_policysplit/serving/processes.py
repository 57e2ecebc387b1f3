"""A process of SGLang: its ports are held, its output is in a log, it dies with its starter.

Three things end such a process:

- `stop` asks it to end, and then kills its whole group.
- The kernel kills it when the thread that called `launch` ends (PR_SET_PDEATHSIG, set by
  `launcher.py`; SGLang's scheduler and detokenizer die with it by the same means), so a trainer
  that was killed leaves nothing behind. It is the thread that counts, not the process: call `start`
  of a server or router from a thread that lives as long as the run, the control loop's or the main
  thread, never from a thread pool.
- It dies of itself, which `alive` sees and `end_of_log` explains.

All methods of one object are called from one thread.
"""

from __future__ import annotations

import asyncio
import datetime
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_policysplit.distributed.environment import without_defaults
from megatron_policysplit.distributed.launch import ended
from megatron_policysplit.distributed.rank_variables import without_launcher
from megatron_policysplit.errors import ConfigError, EngineError, PortError

LAUNCHER = Path(__file__).with_name("launcher.py")
TERMINATE_SECONDS = 15.0  # SGLang looks for a stop signal every 5 s
POLL_SECONDS = 0.2
TAIL_BYTES, TAIL_LINES, TAIL_COLUMNS = 65536, 15, 300
# What the actor sets for itself, beside the launcher's variables. A server that took those over
# would wait for ranks not its own; expandable segments do not go with SGLang's memory saver.
_OF_THE_ACTOR = re.compile(r"PYTORCH(_CUDA)?_ALLOC_CONF|CUDA_DEVICE_MAX_CONNECTIONS")
_OF_THE_INTERPRETER = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
_ANY_HOST = ("0.0.0.0", "::", "")
_CAUSES = (
    (
        r"No module named '?(sglang\w*)",
        "its interpreter has no {0}: install it there, or set rollout.server.python",
    ),
    (r"address already in use|Address already in use", "a port it needs is taken"),
    (
        r"CUDA out of memory|OutOfMemoryError",
        "its GPUs have too little memory: lower mem-fraction-static in rollout.server.arguments, "
        "or raise rollout.server.tensor",
    ),
    (r"error: (unrecognized arguments: .*|argument .*)", "rollout.server.arguments: {0}"),
)
_EXCEPTION = re.compile(r"^(?:[\w.]+\.)?\w*(?:Error|Exception)\b.*$", re.MULTILINE)


class Process:
    """`python -m module arguments` in a session of its own, with its output at the end of a log."""

    def __init__(
        self, what: str, python: str, host: str, port: int, api_key: str | None, log: Path
    ):
        """Nothing is started yet.

        what: its name in messages.
        python: the interpreter that has SGLang.
        host, port: where it is to listen; port 0 takes a free one, the same at every restart.
        api_key: reaches the process through its environment alone.
        log: the file that takes its output.
        """
        self.what, self.python, self.host, self.log = what, python, host, Path(log)
        self.starts = 0  # how often it was started
        self._configured_port, self._api_key = port, api_key
        self._sockets: list[socket.socket] = []  # bound to its ports, its own first
        self._process: subprocess.Popen | None = None
        self._log_start = 0  # bytes of the log when it was last started

    @property
    def port(self) -> int:
        """The port, once started."""
        return self._sockets[0].getsockname()[1]

    @property
    def address(self) -> str:
        """The URL of it, once started; for a host like 0.0.0.0 with this machine's own address."""
        host = own_address() if self.host in _ANY_HOST else self.host
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def hold_ports(self, others: int) -> list[int]:
        """Take the port and `others` free ones, if that is not done yet; returns the free ones.

        Raises PortError, an EngineError, if the port is taken.
        """
        if not self._sockets:
            self._sockets.append(_bound_socket(self.host, self._configured_port, self.what))
        while len(self._sockets) < 1 + others:
            self._sockets.append(_bound_socket("", 0, self.what))
        return [bound.getsockname()[1] for bound in self._sockets[1:]]

    def launch(self, module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start the process; raises ConfigError if there is no such interpreter."""
        # By its path: another interpreter need not find our packages.
        command = [self.python, str(LAUNCHER), module, *arguments]
        environment = {
            **environment,
            "POLICYSPLIT_PARENT": str(os.getpid()),
            "POLICYSPLIT_API_KEY": self._api_key or "",
        }
        self.log.parent.mkdir(parents=True, exist_ok=True)
        now = datetime.datetime.now().isoformat(sep=" ", timespec="seconds")
        again = f" again ({self.starts + 1})" if self.starts else ""
        # Its owner's alone: the command's flags and what SGLang prints of them may hold secrets.
        with open(self.log, "a", encoding="utf-8", opener=partial(os.open, mode=0o600)) as log:
            print(f"--- {now} started{again}: {shlex.join(command)}", file=log, flush=True)
            self._log_start = log.tell()
            try:
                # A session of its own, so that a whole group can be killed: SGLang has children.
                self._process = subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                raise ConfigError(
                    f"rollout.server.python={self.python} cannot be run ({error.strerror}); "
                    "give the interpreter of an environment that has SGLang"
                ) from error
        self.starts += 1

    def alive(self) -> bool:
        """Whether it runs. Once it has ended, what is left of its process group is killed."""
        return self._process is not None and not ended(self._process)

    def kill(self) -> None:
        """Kill its process group at once; it keeps its ports, for another start."""
        if self.alive():
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    async def stop(self) -> None:
        """Ask it to end, kill its group after TERMINATE_SECONDS, and give its ports back."""
        try:
            if self.alive():
                self._process.terminate()
                deadline = time.monotonic() + TERMINATE_SECONDS
                while self.alive() and time.monotonic() < deadline:
                    await asyncio.sleep(POLL_SECONDS)
        finally:
            self.close()

    def close(self) -> None:
        """Kill it and give its ports back, without waiting for an orderly end."""
        self.kill()
        while self._sockets:
            self._sockets.pop().close()

    def error(self, event: str) -> EngineError:
        """Return the error for an event of this process: with a likely cause and its log's end."""
        text = self.end_of_log()
        cause = _cause(text)
        lines = [line[:TAIL_COLUMNS] for line in text.splitlines() if line.strip()][-TAIL_LINES:]
        end = "\n".join(lines) if lines else "(nothing)"
        return EngineError(
            f"{self.what} {event}{': ' + cause if cause else ''}; the end of {self.log}:\n{end}"
        )

    def death(self) -> EngineError:
        """Return the error for a process that has ended."""
        code = self._process.returncode
        if code < 0:
            return self.error(f"was killed by {signal.Signals(-code).name}")
        return self.error(f"ended with exit code {code}")

    def end_of_log(self) -> str:
        """Return the end of what it has printed since it was last started, without the key."""
        with self.log.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, size - TAIL_BYTES))
            text = log.read().decode("utf-8", errors="replace")
        text = re.sub(r"\x1b\[[0-9;]*m", "", text)  # colours
        return text.replace(self._api_key, "***") if self._api_key else text


def _cause(text: str) -> str:
    """The likely cause of an end, from the log; else the last exception in it, or nothing."""
    for pattern, sentence in _CAUSES:
        match = re.search(pattern, text)
        if match:
            return sentence.format(*match.groups())
    exceptions = _EXCEPTION.findall(text)
    return exceptions[-1][:TAIL_COLUMNS] if exceptions else ""


def _bound_socket(host: str, port: int, what: str) -> socket.socket:
    """A socket that is bound but does not listen: it holds the port.

    Nobody else is given the port, and whoever sets SO_REUSEADDR, as SGLang and its router do, can
    still listen on it.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        if isinstance(error, OverflowError):
            raise ConfigError(
                f"rollout.server.port: {port} is not a port; the largest is 65535"
            ) from error
        raise PortError(
            f"{what} cannot listen on {host or 'any address'}, port {port} ({error.strerror}): "
            "another process has it, or this machine has no such address; set "
            "rollout.server.port (0 takes a free one) or rollout.server.host"
        ) from error
    return bound


def inherited_environment(environ: Mapping[str, str], python: str) -> dict[str, str]:
    """Return what a process of `python` inherits of our environment.

    That is all but what belongs to the actor's ranks, or to our interpreter if it is another one.
    """
    is_ours = Path(python).absolute() == Path(sys.executable).absolute()
    excluded = () if is_ours else _OF_THE_INTERPRETER
    environment = {
        name: value
        for name, value in without_launcher(without_defaults(environ)).items()
        if not _OF_THE_ACTOR.fullmatch(name) and name not in excluded
    }
    if os.sep in python:
        # First in PATH: SGLang compiles kernels with the ninja of its own environment.
        directory = str(Path(python).parent.absolute())
        path = environment.get("PATH", os.defpath)
        environment["PATH"] = os.pathsep.join([directory, path])
    return environment


def flags(arguments: Mapping[str, Any]) -> list[str]:
    """Return arguments as command-line flags.

    True is a flag alone, false and null are none, a list is several values, a dict is JSON.
    """
    import json

    words: list[str] = []
    for name, value in arguments.items():
        if value is None or value is False or value == []:
            continue
        words.append(f"--{name}")
        if value is True:
            continue
        values = value if isinstance(value, (list, tuple)) else [value]
        words += [json.dumps(item) if isinstance(item, dict) else str(item) for item in values]
    return words


def own_address() -> str:
    """Return the IPv4 address of this machine's default route, else of its host name."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # An address reserved for documentation; connecting a datagram socket sends nothing.
            probe.connect(("192.0.2.1", 9))
            return probe.getsockname()[0]
        except OSError:
            return socket.gethostbyname(socket.gethostname())
