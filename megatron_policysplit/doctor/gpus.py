"""The GPUs: what the driver says of them, what torch sees, and whether they are enough."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_policysplit.doctor.asking import ProbeFailed, output_of
from megatron_policysplit.doctor.needs import Needs
from megatron_policysplit.doctor.record import Record, fail, gib, ok, warn
from megatron_policysplit.doctor.versions import Gpu, Interpreter

SMI_SECONDS = 30.0  # nvidia-smi wakes a driver that sleeps
# A GPU without a process has a few hundred MiB in use by its driver.
IDLE_BYTES = 2**30
_COLUMNS = (
    "index",
    "name",
    "memory.total",
    "memory.used",
    "mig.mode.current",
    "ecc.errors.uncorrected.volatile.total",
    "driver_version",
)


@dataclass(frozen=True)
class Card:
    """A GPU as nvidia-smi lists it. Memory in bytes."""

    index: int
    name: str
    total: int
    used: int
    mig: bool
    ecc_errors: int | None  # uncorrected ones since the last start; None where it has no ECC


@dataclass(frozen=True)
class Holder:
    """A process that holds GPU memory."""

    pid: int
    name: str
    used: int | None  # bytes; None where the driver does not say


@dataclass(frozen=True)
class DriverFacts:
    """What the driver says. Made by `look_at_driver`."""

    device_file: bool  # /dev/nvidia0
    driver: str | None = None  # its version
    cards: tuple[Card, ...] = ()
    holders: tuple[Holder, ...] = ()
    error: str | None = None  # why nvidia-smi says nothing
    links: tuple[str, ...] = field(default=())  # of nvidia-smi topo: NV18, SYS, ... of each pair


def look_at_driver() -> DriverFacts:
    """Ask nvidia-smi, where there is one."""
    device_file = Path("/dev/nvidia0").exists()
    if shutil.which("nvidia-smi") is None:
        return DriverFacts(device_file, error="nvidia-smi is not on PATH" if device_file else None)
    try:
        driver, cards = parse_cards(_query("gpu", _COLUMNS))
        holders = parse_holders(_query("compute-apps", ("pid", "process_name", "used_memory")))
    except ProbeFailed as error:
        return DriverFacts(device_file, error=str(error))
    try:
        links = parse_links(output_of(["nvidia-smi", "topo", "-m"], SMI_SECONDS))
    except ProbeFailed:  # not in every container; torch says what can reach what
        links = ()
    return DriverFacts(device_file or bool(cards), driver, cards, holders, None, links)


def _query(what: str, columns: Sequence[str]) -> str:
    command = ["nvidia-smi", f"--query-{what}={','.join(columns)}", "--format=csv,noheader,nounits"]
    return output_of(command, SMI_SECONDS)


def parse_cards(text: str) -> tuple[str | None, tuple[Card, ...]]:
    """The driver's version and the cards in nvidia-smi's answer (memory in MiB there)."""
    cards, driver = [], None
    for row in csv.reader(io.StringIO(text), skipinitialspace=True):
        if len(row) != len(_COLUMNS):
            continue
        index, name, total, used, mig, ecc, driver = row
        mib = 2**20
        errors = int(ecc) if ecc.isdecimal() else None
        cards.append(
            Card(
                int(index), name, _whole(total) * mib, _whole(used) * mib, mig == "Enabled", errors
            )
        )
    return driver, tuple(cards)


def parse_holders(text: str) -> tuple[Holder, ...]:
    """The processes in nvidia-smi's answer."""
    rows = csv.reader(io.StringIO(text), skipinitialspace=True)
    return tuple(
        Holder(int(pid), name, int(used) << 20 if used.isdecimal() else None)
        for pid, name, used in (row for row in rows if len(row) == 3)
    )


def parse_links(text: str) -> tuple[str, ...]:
    """The kinds of links between GPUs in the matrix of `nvidia-smi topo -m`, each once."""
    links = set()
    rows = [line.split() for line in text.splitlines() if line.startswith("GPU")]
    for row in rows:
        links |= {cell for cell in row[1 : 1 + len(rows)] if cell != "X"}
    return tuple(sorted(links))


def _whole(text: str) -> int:
    return int(text) if text.isdecimal() else 0


def check_gpus(driver: DriverFacts, trainer: Interpreter, needs: Needs | None) -> list[Record]:
    """Records about the GPUs. trainer: the trainer's interpreter, whose torch has seen them."""
    if not trainer.gpus:
        return [_without_gpu(driver, needs)]
    records = [check_count(trainer.gpus, needs)]
    if driver.error is not None:
        records.append(
            warn("driver", driver.error, "MIG, ECC and other processes were not looked at")
        )
    records += [
        check_architectures(trainer),
        *check_memory(trainer.gpus, driver, needs),
        check_peers(trainer.gpus, driver, needs),
        *check_cards(driver),
    ]
    return records


def _without_gpu(driver: DriverFacts, needs: Needs | None) -> Record:
    if driver.device_file:
        # What torch says is in the record about torch.
        return fail(
            "GPU",
            "there is an NVIDIA GPU, but torch sees none",
            "see the line about torch",
        )
    if needs is not None and needs.devices:
        return fail(
            "GPU",
            f"none, but rollout.server.devices={list(needs.devices)} names some",
            "run on a machine with GPUs, or set rollout.server.devices=[]",
        )
    return ok("GPU", "none: trains on the CPU")


def check_count(gpus: Sequence[Gpu], needs: Needs | None) -> Record:
    """Enough GPUs for the ranks of this node and the servers beside them."""
    names = sorted({gpu.name for gpu in gpus})
    capability = ", ".join(sorted({"{}.{}".format(*gpu.capability) for gpu in gpus}))
    value = f"{len(gpus)} x {' and '.join(names)}, compute capability {capability}"
    if len(names) > 1:
        remedy = "ranks wait for the slowest, and the smallest memory counts"
        return warn("GPU", f"{value}: of several kinds", remedy)
    if needs is None:
        return ok("GPU", value)
    if needs.devices and max(needs.devices) >= len(gpus):
        return fail(
            "GPU",
            f"{value}, but rollout.server.devices={list(needs.devices)}",
            f"name GPUs from 0 to {len(gpus) - 1}",
        )
    beside = needs.gpus - needs.local_ranks
    if needs.gpus > len(gpus):
        servers = f" and {beside} of servers beside them" if beside else ""
        return fail(
            "GPU",
            f"{value}, but the configuration takes {needs.gpus} on this node: {needs.local_ranks} "
            f"ranks{servers}",
            "use more nodes (--nodes in an allocation, or --hosts), a smaller layout"
            + (", or rollout.colocated=true" if beside else ""),
        )
    return ok("GPU", f"{value}; the configuration takes {needs.gpus} on this node")


def check_architectures(trainer: Interpreter) -> Record:
    """Whether torch has kernels for each GPU: of its major version, or PTX that is not newer."""
    name = "GPU kernels"
    if not trainer.architectures:
        return warn(name, "torch does not say for which GPUs it was built", "try it out")
    for capability in sorted({gpu.capability for gpu in trainer.gpus}):
        if not any(_runs(entry, capability) for entry in trainer.architectures):
            return fail(
                name,
                f"torch has none for compute capability {capability[0]}.{capability[1]}, only "
                f"{', '.join(trainer.architectures)}",
                "install a torch that was built for this GPU",
            )
    return ok(name, f"torch has them ({', '.join(trainer.architectures)})")


def _runs(entry: str, capability: tuple[int, int]) -> bool:
    """Whether code for sm_90, or PTX for compute_90, runs on a GPU of `capability`."""
    kind, _, digits = entry.partition("_")
    is_exact = digits.endswith("a")  # sm_90a: for this GPU alone
    digits = digits.rstrip("af")
    built = int(digits[:-1]), int(digits[-1])
    if is_exact:
        return built == capability
    return (
        built <= capability
        if kind == "compute"
        else built[0] == capability[0] >= built[0] and (built[1] <= capability[1])
    )


def check_memory(gpus: Sequence[Gpu], driver: DriverFacts, needs: Needs | None) -> list[Record]:
    """Free memory, who holds the rest, and whether a rank's part of the model fits."""
    free, total = min(gpu.free for gpu in gpus), min(gpu.total for gpu in gpus)
    value = f"at least {gib(free)} of {gib(total)} are free on each"
    records = []
    if needs is not None and needs.parameters is not None:
        need = needs.rank_bytes
        value += f"; weights, gradients and optimizer of a rank take {gib(need)}"
        if need > total:
            remedy = "raise parallel.tensor or pipeline, or set train.distributed_optimizer=true"
            return [fail("GPU memory", value, remedy)]
        if need > free:
            return [fail("GPU memory", value, "end what holds the memory"), *_holders(driver)]
    if total - free > IDLE_BYTES:
        records.append(warn("GPU memory", value, "end what holds the memory, or choose other GPUs"))
        records += _holders(driver)
    else:
        records.append(ok("GPU memory", value))
    return records


def _holders(driver: DriverFacts) -> list[Record]:
    if not driver.holders:
        return []
    named = "; ".join(
        f"{h.pid} {h.name}" + ("" if h.used is None else f" ({gib(h.used)})")
        for h in driver.holders
    )
    return [warn("GPU processes", named, "end those that are left over (kill PID)")]


def check_peers(gpus: Sequence[Gpu], driver: DriverFacts, needs: Needs | None) -> Record:
    """Whether GPUs of this node reach each other's memory."""
    if len(gpus) == 1:
        return ok("peer access", "there is one GPU")
    links = f" (links: {', '.join(driver.links)})" if driver.links else ""
    cut = [
        f"{index} and {other}"
        for index, gpu in enumerate(gpus)
        for other in range(index + 1, len(gpus))
        if other not in gpu.peers
    ]
    if not cut:
        return ok("peer access", f"between all GPUs{links}")
    value = f"not between GPUs {', '.join(cut[:6])}{' and others' * (len(cut) > 6)}{links}"
    if needs is not None and needs.tensor > 1:
        return warn(
            "peer access",
            f"{value}: NCCL copies through host memory, which slows parallel.tensor="
            f"{needs.tensor} down",
            "turn PCIe access control (ACS) off, or use parallel.pipeline or data instead",
        )
    return warn("peer access", f"{value}: NCCL copies through host memory", "it is slower")


def check_cards(driver: DriverFacts) -> list[Record]:
    """MIG and ECC errors, where nvidia-smi tells."""
    records = []
    if mig := [str(card.index) for card in driver.cards if card.mig]:
        records.append(
            warn(
                "MIG",
                f"GPU {', '.join(mig)} is cut into instances, of which a process sees one",
                "one rank a process and no NCCL between instances; take a whole GPU for more",
            )
        )
    bad = [f"GPU {c.index}: {c.ecc_errors}" for c in driver.cards if c.ecc_errors]
    if bad:
        records.append(
            fail(
                "ECC",
                f"uncorrected errors since the last start ({', '.join(bad)})",
                "reset the GPU (nvidia-smi -r) or have it replaced; do not train on it",
            )
        )
    elif any(card.ecc_errors is not None for card in driver.cards):
        records.append(ok("ECC", "no uncorrected errors since the last start"))
    return records
