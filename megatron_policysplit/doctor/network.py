"""Names, ports and clocks of this machine and of the other nodes."""

from __future__ import annotations

import json
import os
import shutil
import socket
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NoAnswer
from typing import TypeVar

from megatron_policysplit.config import Config
from megatron_policysplit.doctor.finding import FAIL, OK, WARN, Finding, output_of

NAME_SECONDS = 10.0  # a resolver without an answer tries for as long as this, and longer
CONNECT_SECONDS = 5.0
SRUN_SECONDS = 300.0
_SSH = 22  # whether something listens there does not matter: a refusal is an answer too
SKEW_WARN, SKEW_FAIL = 2.0, 30.0  # seconds; locks and requeues compare times to half a minute

T = TypeVar("T")


def within(seconds: float, call: Callable[[], T]) -> T:
    """`call()` in a thread; TimeoutError if it takes longer (the thread is left behind)."""
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(call).result(seconds)
    except NoAnswer as error:
        raise TimeoutError(f"no answer within {seconds:g} s") from error
    finally:
        pool.shutdown(wait=False)


def addresses_of(host: str) -> list[str]:
    """The addresses of a name. Raises OSError, or TimeoutError where the resolver hangs."""
    found = within(NAME_SECONDS, lambda: socket.getaddrinfo(host, None, type=socket.SOCK_STREAM))
    return sorted({entry[4][0] for entry in found})


def check_own_name(host: str, several_nodes: bool) -> list[Finding]:
    """Whether this machine's name leads to it; gloo listens at the address of that name."""
    try:
        addresses = addresses_of(host)
    except OSError as error:
        remedy = f"give {host} an entry in /etc/hosts or DNS"
        status = FAIL if several_nodes else WARN
        return [Finding("host name", status, f"{host} cannot be resolved ({error})", remedy)]
    text = f"{host} is {', '.join(addresses)}"
    is_loopback = all(address.startswith("127.") or address == "::1" for address in addresses)
    if is_loopback and several_nodes and "GLOO_SOCKET_IFNAME" not in os.environ:
        remedy = "set GLOO_SOCKET_IFNAME to the interface that reaches the other nodes"
        return [Finding("host name", WARN, f"{text}, the loopback", remedy)]
    return [Finding("host name", OK, text)]


def check_ports(config: Config | None, environ: Mapping[str, str]) -> list[Finding]:
    """Whether the ports with fixed numbers are free here."""
    ports = {}
    if environ.get("MASTER_PORT", "").isdecimal():
        ports[int(environ["MASTER_PORT"])] = "MASTER_PORT"
    server = None if config is None else config.rollout.server
    if server is not None and server.port and config.rollout.engine == "sglang":
        count = server.count or 1
        # The router stands after the servers.
        ports |= {server.port + i: "rollout.server.port" for i in range(count + (count > 1))}
    findings = []
    for port, name in ports.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError as error:
                said = f"{port} ({name}): {error.strerror}"
                findings.append(Finding("port", FAIL, said, f"set {name} to a free one"))
                continue
        findings.append(Finding("port", OK, f"{port} ({name}) is free"))
    return findings


def slurm_hosts(environ: Mapping[str, str]) -> list[str]:
    """The nodes of this Slurm job; [] outside one. Raises as `output_of` does."""
    nodes = environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST")
    if not nodes:
        return []
    return output_of(["scontrol", "show", "hostnames", nodes], 30).split()


def check_hosts(hosts: Sequence[str]) -> list[Finding]:
    """Whether each host's name resolves, and whether anything at all answers there."""
    with ThreadPoolExecutor(min(len(hosts), 32) or 1) as pool:
        return list(pool.map(check_host, hosts))


def check_host(host: str) -> Finding:
    name = f"node {host}"
    try:
        address = addresses_of(host)[0]
    except OSError as error:
        remedy = "give it an entry in /etc/hosts or DNS on every node; ranks would wait for it"
        return Finding(name, FAIL, f"its name cannot be resolved ({error})", remedy)
    try:
        socket.create_connection((address, _SSH), CONNECT_SECONDS).close()
    except ConnectionRefusedError:
        pass
    except OSError as error:
        remedy = "look at routes and firewalls; ranks need every port between nodes"
        return Finding(name, WARN, f"{address} does not answer ({error})", remedy)
    return Finding(name, OK, address)


def check_nodes(hosts: Sequence[str]) -> list[Finding]:
    """Clocks and installed versions of all nodes of this job, asked by srun."""
    if shutil.which("srun") is None or not hosts:
        return [Finding("nodes", WARN, "no Slurm job to ask the other nodes in", "use salloc")]
    srun = ["srun", "--overlap", f"--nodes={len(hosts)}", "--ntasks-per-node=1"]
    clocks = output_of([*srun, "sh", "-c", 'echo "$(hostname) $(date +%s.%N)"'], SRUN_SECONDS)
    findings = compare_clocks(dict(line.split() for line in clocks.splitlines() if line.strip()))
    doctor = [sys.executable, "-m", "megatron_policysplit.cli", "doctor", "--json", "--one-line"]
    # A doctor with something to complain about ends with 1, which srun would make its own.
    shell = '"$@" || true'
    reports = output_of([*srun, "sh", "-c", shell, "sh", *doctor], SRUN_SECONDS)
    lines = [json.loads(line) for line in reports.splitlines() if line.startswith("{")]
    return findings + compare_nodes({report["host"]: report["findings"] for report in lines})


def compare_clocks(times: Mapping[str, float | str]) -> list[Finding]:
    """times: node -> seconds since 1970, read at about the same time."""
    seconds = {host: float(value) for host, value in times.items()}
    middle = statistics.median(seconds.values())
    host, offset = max(
        ((host, value - middle) for host, value in seconds.items()), key=lambda pair: abs(pair[1])
    )
    text = f"{len(seconds)} nodes within {abs(offset):.1f} s"
    if abs(offset) < SKEW_WARN:
        return [Finding("clocks", OK, text)]
    status = FAIL if abs(offset) >= SKEW_FAIL else WARN
    remedy = "let chrony or ntpd set the clocks of all nodes"
    return [Finding("clocks", status, f"{host} is {offset:+.1f} s off", remedy)]


# Findings that may differ from node to node without harm.
_LOCAL = ("GPU", "host", "node", "port", "shared memory", "temporary", "variables", "run directory")


def compare_nodes(reports: Mapping[str, Sequence[Mapping[str, str]]]) -> list[Finding]:
    """reports: node -> its findings. What every node finds alike is in this node's own findings."""
    findings = []
    values: dict[str, dict[str, list[str]]] = {}
    for host, records in reports.items():
        for record in records:
            if record["status"] == FAIL:
                value = f"{record['name']}: {record['value']}"
                findings.append(Finding(f"node {host}", FAIL, value, record["remedy"]))
            if not record["name"].startswith(_LOCAL):
                by_value = values.setdefault(record["name"], {})
                by_value.setdefault(record["value"], []).append(host)
    for name, by_value in values.items():
        if len(by_value) > 1:
            text = "; ".join(f"{value} on {', '.join(on)}" for value, on in by_value.items())
            remedy = "give all nodes the same environment"
            findings.append(Finding(name, WARN, f"differs: {text}", remedy))
    return findings or [Finding("nodes", OK, f"{len(reports)} alike")]
