"""A process of SGLang under our hand: its ports are held, its output is in a log, it dies with the
one that started it.

Three things end such a process. `stop` asks and then kills its whole group. The kernel kills it
when the thread that called `start` ends (PR_SET_PDEATHSIG, set by `launcher.py`; SGLang's scheduler
and detokenizer die with it by the same means), so a trainer that was killed leaves nothing behind:
call `start` from a thread that lives as long as the run, the control loop's or the main thread,
never from a thread pool. And it can die of itself, which `alive` sees and `end_of_log` explains.
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
from pathlib import Path
from typing import Any

from megatron_policysplit.distributed.launch import ended
from megatron_policysplit.errors import ConfigError, EngineError

LAUNCHER = Path(__file__).with_name("launcher.py")
TERMINATE_SECONDS = 15.0  # SGLang looks for a stop signal every 5 s
POLL_SECONDS = 0.2
TAIL_BYTES, TAIL_LINES, TAIL_COLUMNS = 65536, 15, 300
# What torchrun and the actor set for themselves. A server that took it over would wait for ranks
# that are not its own, and expandable segments do not go with the memory saver.
_OF_THE_ACTOR = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*|"
    r"PYTORCH(_CUDA)?_ALLOC_CONF|CUDA_DEVICE_MAX_CONNECTIONS"
)
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
        "or raise "
        "rollout.server.tensor",
    ),
    (r"error: (unrecognized arguments: .*|argument .*)", "rollout.server.arguments: {0}"),
)
_EXCEPTION = re.compile(r"^(?:[\w.]+\.)?\w*(?:Error|Exception)\b.*$", re.MULTILINE)


class Process:
    """`python -m module arguments` with its own session; what it prints goes to the end of the file
    `log`.

    host, port: where it is to listen; port 0 takes a free one, which stays the same over restarts.
    what: its name in messages. api_key reaches the process through its environment alone.
    """

    def __init__(
        self, what: str, python: str, host: str, port: int, api_key: str | None, log: Path
    ):
        self.what, self.python, self.host, self.log = what, python, host, Path(log)
        self.starts = 0
        self._wanted_port, self._api_key = port, api_key
        self._held: list[socket.socket] = []
        self._process: subprocess.Popen | None = None
        self._log_start = 0

    @property
    def port(self) -> int:
        """The port, once started."""
        return self._held[0].getsockname()[1]

    @property
    def address(self) -> str:
        """Such as http://127.0.0.1:30000, once started; for a host like 0.0.0.0, this machine's own
        address.
        """
        host = own_address() if self.host in _ANY_HOST else self.host
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def hold_ports(self, others: int) -> list[int]:
        """Take the port and `others` free ones, if that is not done yet; the numbers of the others.

        EngineError if the port is taken.
        """
        if not self._held:
            self._held.append(_hold(self.host, self._wanted_port, self.what))
        while len(self._held) < 1 + others:
            self._held.append(_hold("", 0, self.what))
        return [held.getsockname()[1] for held in self._held[1:]]

    def launch(self, module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start the process; ConfigError if there is no such interpreter."""
        command = [self.python, str(LAUNCHER), module, *arguments]
        environment = {
            **environment,
            "POLICYSPLIT_PARENT": str(os.getpid()),
            "POLICYSPLIT_API_KEY": self._api_key or "",
        }
        self.log.parent.mkdir(parents=True, exist_ok=True)
        now = datetime.datetime.now().isoformat(sep=" ", timespec="seconds")
        again = f" again ({self.starts + 1})" if self.starts else ""
        with self.log.open("a", encoding="utf-8") as log:
            print(f"--- {now} started{again}: {shlex.join(command)}", file=log, flush=True)
            self._log_start = log.tell()
            try:
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
        """SIGKILL to its process group, at once; start again or `release` the ports afterwards."""
        if self.alive():
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    async def stop(self) -> None:
        """Ask it to end, kill its process group after TERMINATE_SECONDS, and give its ports back."""
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
        while self._held:
            self._held.pop().close()

    def error(self, happened: str) -> EngineError:
        """The error for something that went wrong with this process: the likely cause and the end
        of its log.
        """
        text = self.end_of_log()
        cause = _cause(text)
        lines = [line[:TAIL_COLUMNS] for line in text.splitlines() if line.strip()][-TAIL_LINES:]
        end = "\n".join(lines) if lines else "(nothing)"
        return EngineError(
            f"{self.what} {happened}{': ' + cause if cause else ''}; the end of {self.log}:\n{end}"
        )

    def death(self) -> EngineError:
        """The error for a process that has ended."""
        code = self._process.returncode
        how = (
            f"was killed by {signal.Signals(-code).name}"
            if code < 0
            else f"ended with exit code {code}"
        )
        return self.error(how)

    def end_of_log(self) -> str:
        """The end of what it has printed since it was last started, without the key."""
        with self.log.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, size - TAIL_BYTES))
            text = log.read().decode("utf-8", errors="replace")
        text = re.sub(r"\x1b\[[0-9;]*m", "", text)
        return text.replace(self._api_key, "***") if self._api_key else text


def _cause(text: str) -> str:
    for pattern, sentence in _CAUSES:
        found = re.search(pattern, text)
        if found:
            return sentence.format(*found.groups())
    exceptions = _EXCEPTION.findall(text)
    return exceptions[-1][:TAIL_COLUMNS] if exceptions else ""


def _hold(host: str, port: int, what: str) -> socket.socket:
    """A socket that is bound but does not listen: nobody else is given the port, and whoever sets
    SO_REUSEADDR, as SGLang and its router do, can still listen on it.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    held = socket.socket(family, socket.SOCK_STREAM)
    try:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind((host, port))
    except (OSError, OverflowError) as error:
        held.close()
        if isinstance(error, OverflowError):
            raise ConfigError(
                f"rollout.server.port: {port} is not a port; the largest is 65535"
            ) from error
        raise EngineError(
            f"{what} cannot listen on {host or 'any address'}, port {port} ({error.strerror}): "
            "another process has it, "
            "or this machine has no such address; set rollout.server.port (0 takes a free one) or "
            "rollout.server.host"
        ) from error
    return held


def inherited_environment(environ: Mapping[str, str], python: str) -> dict[str, str]:
    """What a process of `python` takes over from ours: all but what belongs to the actor's ranks or
    its interpreter.

    The directory of `python` comes first in PATH: SGLang compiles kernels with the ninja of its own
    environment.
    """
    dropped = (
        () if Path(python).absolute() == Path(sys.executable).absolute() else _OF_THE_INTERPRETER
    )
    kept = {k: v for k, v in environ.items() if not _OF_THE_ACTOR.fullmatch(k) and k not in dropped}
    if os.sep in python:
        kept["PATH"] = os.pathsep.join(
            [str(Path(python).parent.absolute()), kept.get("PATH", os.defpath)]
        )
    return kept


def flags(arguments: Mapping[str, Any]) -> list[str]:
    """Command-line flags: true is a flag alone, false and null are none, a list is several values,
    a dict is JSON.
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
    """The IPv4 address by which other machines reach this one: that of the default route, else of
    the host name.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(
                ("192.0.2.1", 9)
            )  # a documentation address; connecting a datagram socket sends nothing
            return probe.getsockname()[0]
        except OSError:
            return socket.gethostbyname(socket.gethostname())
