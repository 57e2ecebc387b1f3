"""Other nodes: whether their names resolve and lead somewhere, their clocks and their versions."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from megatron_policysplit.doctor.asking import ProbeFailed, output_of
from megatron_policysplit.doctor.network import HostName, connect_error, resolve
from megatron_policysplit.doctor.record import Record, fail, from_json, ok, warn

SCONTROL_SECONDS = 20.0
CLOCK_SECONDS = 60.0  # for srun to start `date` everywhere
DOCTOR_SECONDS = 300.0  # for srun to run this command everywhere
# Beyond it, logs of two nodes cannot be put in order. Slurm's munge refuses above 300 s.
SKEW_SECONDS = 2.0
MUNGE_SECONDS = 300.0
PORT = 29500  # any: a node that refuses a connection is there, too
LOOKS_AT_ONCE = 32
# Records whose values must be the same on all nodes.
ALIKE = (
    "Python",
    "torch",
    "CUDA",
    "libraries",
    "Megatron-Core",
    "Transformer Engine",
    "Triton",
    "transformers",
    "SGLang",
    "GPU",
)
OF_MACHINES = ("CUDA", "GPU")  # a run may go over machines that differ; packages may not


@dataclass(frozen=True)
class Reach:
    """A node: what its name resolves to, and why it does not answer (None if it does)."""

    host: HostName
    error: str | None = None


@dataclass(frozen=True)
class Clock:
    """What a node's clock said between two looks at this one's, all in seconds since 1970."""

    node: str
    before: float
    said: float
    after: float

    @property
    def ahead(self) -> float:
        """Seconds by which it is ahead of this node's clock, at least; negative: behind."""
        if self.said > self.after:
            return self.said - self.after
        return min(0.0, self.said - self.before)


def allocated_hosts(environ: Mapping[str, str]) -> list[str]:
    """The hosts of the Slurm allocation. Raises ProbeFailed outside of one."""
    nodes = environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise ProbeFailed("SLURM_JOB_NODELIST is not set: this is no allocation of Slurm's")
    printed = output_of(["scontrol", "show", "hostnames", nodes], SCONTROL_SECONDS, environ)
    return printed.split()


def look_at_hosts(hosts: Sequence[str], port: int) -> list[Reach]:
    """Resolve each name and connect to it, several at once."""

    def look(name: str) -> Reach:
        host = resolve(name)
        if not host.addresses:
            return Reach(host)
        return Reach(host, connect_error(name, port, refused_is_reachable=True))

    with ThreadPoolExecutor(LOOKS_AT_ONCE) as pool:
        return list(pool.map(look, hosts))


def check_hosts(reached: Sequence[Reach]) -> list[Record]:
    """A record for each node that does not resolve or answer; one for all others."""
    records, good = [], []
    for reach in reached:
        host = reach.host
        name = f"node {host.name}"
        if not host.addresses:
            records.append(
                fail(
                    name,
                    f"does not resolve ({host.error}); ranks try for a minute and end",
                    "give it an entry in DNS or /etc/hosts on all nodes, or set MASTER_ADDR to an "
                    "address",
                )
            )
        elif reach.error is not None:
            records.append(
                fail(
                    name,
                    f"{', '.join(host.addresses)} does not answer ({reach.error})",
                    "is it up, and does a firewall between the nodes let all ports pass?",
                )
            )
        elif host.is_loopback and len(reached) > 1:
            records.append(
                warn(
                    name,
                    f"resolves to this machine's loopback ({', '.join(host.addresses)})",
                    "give it its address in /etc/hosts; right only where all nodes are one machine",
                )
            )
        else:
            good.append(host.name)
    if good:
        records.append(ok("nodes", f"resolve and can be reached: {', '.join(good)}"))
    return records


def srun(hosts: Sequence[str]) -> list[str]:
    """The command that runs one task on each node and begins each line with the task's number.

    A task that fails ends no other. `--overlap`: also beside a step that has the nodes' cores.
    """
    count = len(hosts)
    return [
        "srun",
        f"--nodes={count}",
        f"--ntasks={count}",
        "--ntasks-per-node=1",
        f"--nodelist={','.join(hosts)}",
        "--overlap",
        "--label",
        "--kill-on-bad-exit=0",
        "--wait=0",
    ]


def ask_clocks(hosts: Sequence[str], environ: Mapping[str, str]) -> list[Clock]:
    """The clocks of all nodes, asked by srun. Raises ProbeFailed."""
    before = time.time()
    script = 'echo "$(date +%s.%N) ${SLURMD_NODENAME:-$(hostname)}"'
    printed = output_of([*srun(hosts), "sh", "-c", script], CLOCK_SECONDS, environ)
    after = time.time()
    clocks = []
    for line in printed.splitlines():
        match = re.fullmatch(r"\s*\d+: (\d+\.\d+) (\S+)", line)
        if match:
            clocks.append(Clock(match[2], before, float(match[1]), after))
    if len(clocks) < len(hosts):
        raise ProbeFailed(f"{len(clocks)} of {len(hosts)} nodes told the time")
    return clocks


def check_clocks(clocks: Sequence[Clock]) -> list[Record]:
    """Clocks that are certainly ahead of this node's or behind it."""
    records = []
    for clock in clocks:
        if abs(clock.ahead) <= SKEW_SECONDS:
            continue
        direction = "ahead of" if clock.ahead > 0 else "behind"
        value = f"{clock.node}'s is at least {abs(clock.ahead):.1f} s {direction} this node's"
        remedy = "synchronise the clocks (chronyd, ntpd)"
        if abs(clock.ahead) > MUNGE_SECONDS:
            records.append(fail("clocks", f"{value}; munge refuses above 300 s", remedy))
        else:
            records.append(warn("clocks", value, remedy))
    return records or [ok("clocks", f"those of {len(clocks)} nodes show no difference")]


def ask_nodes(
    hosts: Sequence[str], arguments: Sequence[str], environ: Mapping[str, str]
) -> dict[str, list[Record]]:
    """What this command says on each node, asked by srun, by the node's name.

    arguments: CONFIG and its overrides, or none. Raises ProbeFailed.
    """
    doctor = [sys.executable, "-m", "megatron_policysplit.cli", "doctor", *arguments, "--json"]
    # The node's name goes before what the command prints; exit code 1 is a FAIL, told by a record.
    script = 'echo "${SLURMD_NODENAME:-$(hostname)}"; "$@" || [ $? -eq 1 ]'
    command = [*srun(hosts), "sh", "-c", script, "sh", *doctor]
    return parse_answers(output_of(command, DOCTOR_SECONDS, environ))


def parse_answers(printed: str) -> dict[str, list[Record]]:
    """The records of each node in what `srun --label` prints. Raises ProbeFailed."""
    lines: dict[str, list[str]] = {}
    for line in printed.splitlines():
        match = re.match(r"\s*(\d+): ?", line)
        if match:
            lines.setdefault(match[1], []).append(line[match.end() :])
    answers = {}
    for node, *text in lines.values():
        try:
            answers[node.strip()] = from_json("\n".join(text))
        except ValueError as error:
            raise ProbeFailed(f"{node} printed no records ({error})") from error
    return answers


def check_alike(answers: Mapping[str, Sequence[Record]], expected: int) -> list[Record]:
    """What differs between nodes, and what a node alone finds wrong.

    expected: number of nodes that were asked.
    """
    records = []
    if len(answers) < expected:
        value = f"{len(answers)} of {expected} nodes answered: {', '.join(answers) or 'none'}"
        records.append(fail("versions on nodes", value, "look at srun's messages on the others"))
    differing = []
    for name in ALIKE:
        values: dict[str, list[str]] = {}
        for node, its in answers.items():
            said = next((record.value for record in its if record.name == name), "(nothing)")
            values.setdefault(said, []).append(node)
        if len(values) > 1:
            differing.append(name)
            told = "; ".join(f"{', '.join(nodes)}: {said}" for said, nodes in values.items())
            say = warn if name in OF_MACHINES else fail
            records.append(say(f"{name} on nodes", told, "give all nodes the same environment"))
    if not differing and len(answers) >= expected:
        records.append(ok("versions on nodes", f"the same on {', '.join(answers)}"))
    return records + _of_each(answers, lambda record: record.name not in differing)


def _of_each(
    answers: Mapping[str, Sequence[Record]], is_told: Callable[[Record], bool]
) -> list[Record]:
    """What nodes warn of or fail at, once for all nodes that say the same."""
    nodes: dict[Record, list[str]] = {}
    for node, its in answers.items():
        for record in its:
            if record.status != "OK" and is_told(record):
                nodes.setdefault(record, []).append(node)
    return [
        Record(f"{record.name} on {', '.join(names)}", record.status, record.value, record.remedy)
        for record, names in nodes.items()
    ]
