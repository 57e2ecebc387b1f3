"""This host's name, the ports that a run takes, and the servers that it calls."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from megatron_policysplit.doctor.asking import ProbeFailed, within
from megatron_policysplit.doctor.needs import Needs
from megatron_policysplit.doctor.record import Record, fail, ok, warn

NAME_SECONDS = 10.0  # a resolver tries a name server that is gone for 5 s, twice
CONNECT_SECONDS = 5.0
# srun's ranks take 10000 + the job's number modulo 20000 (distributed/rank_variables.py).
DERIVED_PORTS = (10000, 29999)
_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_PROBLEM = "does not resolve"


@dataclass(frozen=True)
class HostName:
    """A host's name, and the addresses that it resolves to (none: `error` says why)."""

    name: str
    addresses: tuple[str, ...] = ()
    error: str = ""

    @property
    def is_loopback(self) -> bool:
        """Whether it leads to this machine alone, wherever it is asked for."""
        return bool(self.addresses) and all(
            ipaddress.ip_address(address.partition("%")[0]).is_loopback
            for address in self.addresses
        )


@dataclass(frozen=True)
class PortFacts:
    """A port that a run listens on."""

    key: str  # what names it
    host: str
    port: int
    error: str | None  # why it cannot be bound


@dataclass(frozen=True)
class PeerFacts:
    """A server that a run calls."""

    key: str
    address: str
    error: str | None  # why nothing answers there


def resolve(name: str) -> HostName:
    """What a name resolves to, asked for at most NAME_SECONDS."""
    try:
        found = within(
            NAME_SECONDS, lambda: socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
        )
    except ProbeFailed as error:
        return HostName(name, error=str(error))
    except (OSError, UnicodeError) as error:
        return HostName(name, error=getattr(error, "strerror", None) or str(error))
    return HostName(name, tuple(dict.fromkeys(entry[4][0] for entry in found)))


def is_own(name: HostName) -> bool:
    """Whether a name leads to this host: only its own addresses can be bound."""
    return any(bind_error(address, 0) is None for address in name.addresses)


def bind_error(host: str, port: int) -> str | None:
    """Why a port cannot be listened on; None if it can. host: a name, an address, or ""."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            # Another socket that only holds the port may be bound as well; one that listens not.
            probe.listen(1)
    except OSError as error:
        return error.strerror or str(error)
    return None


def connect_error(host: str, port: int, *, refused_is_reachable: bool = False) -> str | None:
    """Why a TCP connection cannot be made within CONNECT_SECONDS; None if it can."""
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except ConnectionRefusedError as error:
        return None if refused_is_reachable else error.strerror
    except (OSError, UnicodeError) as error:
        return getattr(error, "strerror", None) or str(error)
    return None


def look_at_ports(environ: Mapping[str, str], needs: Needs | None) -> list[PortFacts]:
    """Try to bind the ports that the environment and the configuration name."""
    ports = []
    address, port = environ.get("MASTER_ADDR", ""), environ.get("MASTER_PORT", "")
    if port.isdecimal() and int(port) < 65536 and address and is_own(resolve(address)):
        ports.append(("MASTER_PORT", "", int(port)))
    if needs is not None:
        for number in needs.fixed_ports:
            ports.append(("rollout.server.port", needs.server_host, number))
    return [PortFacts(key, host, port, bind_error(host, port)) for key, host, port in ports]


def look_at_peers(needs: Needs | None) -> list[PeerFacts]:
    """Connect to the servers that the configuration names."""
    if needs is None:
        return []
    urls = [("rollout.addresses", address) for address in needs.addresses]
    urls += [("eval.judge.url", needs.judge)] if needs.judge is not None else []
    peers = []
    for key, url in urls:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        host = parts.hostname or ""
        shown = f"{parts.scheme}://{host}:{port}"  # without what may be a password
        peers.append(PeerFacts(key, shown, connect_error(host, port)))
    return peers


def ephemeral_ports() -> tuple[int, int] | None:
    """The range from which the kernel gives ports to connections; None where it does not say."""
    try:
        low, high = _RANGE.read_text().split()
    except (OSError, ValueError):
        return None
    return int(low), int(high)


def interfaces() -> list[str]:
    """Names of this host's network interfaces."""
    return [name for _, name in socket.if_nameindex()]


def check_host_name(host: HostName, environ: Mapping[str, str], nodes: int) -> Record:
    """Whether this host's own name resolves, to an address that other nodes can reach.

    gloo listens on the address that it resolves to, else on the loopback, unless
    GLOO_SOCKET_IFNAME names an interface. nodes: of the run, or of the allocation.
    """
    chosen = environ.get("GLOO_SOCKET_IFNAME")
    if host.addresses:
        value = f"{host.name} is {', '.join(host.addresses)}"
    else:
        value = f"{host.name} {_PROBLEM} ({host.error})"
    if chosen:
        return ok("host name", f"{value}; gloo uses GLOO_SOCKET_IFNAME={chosen}")
    if host.addresses and not host.is_loopback:
        return ok("host name", value)
    remedy = (
        "set GLOO_SOCKET_IFNAME to the interface between the nodes, or give this name its address "
        "in /etc/hosts"
    )
    if nodes > 1:
        return fail("host name", f"{value}: gloo cannot meet other nodes there", remedy)
    return warn("host name", f"{value}: that is enough for one node only", remedy)


def check_interfaces(environ: Mapping[str, str], present: Sequence[str]) -> list[Record]:
    """Interfaces that variables name must exist. NCCL's value is prefixes, `=` names or `^` not."""
    records = []
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        value = environ.get(variable)
        if not value or value.startswith("^"):
            continue
        is_exact = variable.startswith("GLOO") or value.startswith("=")
        names = [name for name in value.lstrip("=").split(",") if name]
        found = [
            name
            for name in names
            if any(name == other if is_exact else other.startswith(name) for other in present)
        ]
        # gloo takes all of its list, NCCL those that are there.
        if len(found) == len(names) or (variable.startswith("NCCL") and found):
            records.append(ok(variable, value))
        else:
            records.append(
                fail(
                    variable,
                    f"{value}, but this host has {', '.join(present)}",
                    f"set {variable} to one of them, or unset it",
                )
            )
    return records


def check_ports(
    ports: Sequence[PortFacts], ephemeral: tuple[int, int] | None, needs: Needs | None
) -> list[Record]:
    """Ports that are taken, and ports that any connection of this host may take."""
    records = []
    free = []
    for facts in ports:
        name = f"port {facts.port}"
        value = f"{facts.key}, on {facts.host or 'any address'}"
        if facts.error is not None:
            remedy = (
                "set MASTER_PORT to a free port"
                if facts.key == "MASTER_PORT"
                else "end what listens there (ss -ltnp), or set rollout.server.port (0 takes free "
                "ones)"
            )
            records.append(fail(name, f"{value}: {facts.error}", remedy))
        elif ephemeral is not None and ephemeral[0] <= facts.port <= ephemeral[1]:
            records.append(
                warn(
                    name,
                    f"{value}: free, but from the range {ephemeral[0]} to {ephemeral[1]} out of "
                    "which any connection gets its port",
                    f"choose one below {ephemeral[0]}",
                )
            )
        else:
            free.append(f"{facts.port} ({facts.key})")
    if free:
        named = free[0] if len(free) == 1 else f"{len(free)} ports from {free[0]} to {free[-1]}"
        records.append(ok("ports", f"free: {named}"))
    if ephemeral is not None:
        records.append(_check_range(ephemeral, needs or Needs()))
    return records


def _check_range(ephemeral: tuple[int, int], needs: Needs) -> Record:
    low, high = ephemeral
    count, value = high - low + 1, f"{low} to {high} (net.ipv4.ip_local_port_range)"
    # Every request is a connection of its own where it is not kept alive, and a closed one keeps
    # its port for a minute.
    need = 2 * needs.local_ranks * (needs.concurrency + needs.ranks)
    if count < need:
        return warn(
            "ports of connections",
            f"{value}: {count}, and a run here may open {need}",
            "sysctl -w net.ipv4.ip_local_port_range='32768 60999'",
        )
    if needs.nodes > 1 and low <= DERIVED_PORTS[1]:
        return warn(
            "ports of connections",
            f"{value}: ranks that srun starts meet at a port from {DERIVED_PORTS[0]} to "
            f"{DERIVED_PORTS[1]}, which a connection may have",
            "set MASTER_PORT to a free port outside of it",
        )
    return ok("ports of connections", value)


def check_peer(peer: PeerFacts) -> Record:
    """A server that a run calls answers."""
    if peer.error is None:
        return ok(peer.key, f"{peer.address} can be reached")
    value = f"{peer.address} cannot be reached ({peer.error})"
    if peer.key == "eval.judge.url":
        return warn(peer.key, value, "start it before the first evaluation")
    return fail(peer.key, value, "start it, or set rollout.addresses to where it is")


def check_master(host: HostName | None) -> list[Record]:
    """MASTER_ADDR, where it is set, resolves. host: what it resolves to."""
    if host is None:
        return []
    if not host.addresses:
        return [
            fail(
                "MASTER_ADDR",
                f"{host.name} {_PROBLEM} ({host.error}); ranks try for a minute and end",
                "set it to the name or address of the host of rank 0",
            )
        ]
    return [ok("MASTER_ADDR", f"{host.name} is {', '.join(host.addresses)}")]


def proxies(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables that name a proxy, by name, without a password that may be in them."""
    return {
        name: re.sub(r"//[^@/]*@", "//***@", value)
        for name, value in environ.items()
        if name.lower() in ("http_proxy", "https_proxy", "all_proxy") and value
    }


def own_name() -> HostName:
    """This host's name and what it resolves to."""
    return resolve(socket.gethostname())
