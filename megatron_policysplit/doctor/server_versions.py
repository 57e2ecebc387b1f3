"""Whether the servers' interpreter has SGLang, and what fits the trainer's."""

from __future__ import annotations

import sys

from megatron_policysplit.doctor.needs import Needs
from megatron_policysplit.doctor.record import Record, fail, ok
from megatron_policysplit.doctor.versions import Interpreter, check_requirements

VERIFIED_SGLANG, VERIFIED_ROUTER = "0.5.23", "0.3.2"


def check_server(trainer: Interpreter, server: Interpreter, needs: Needs) -> list[Record]:
    """SGLang, its router, torch and NCCL of the servers' interpreter, against the trainer's."""
    python = needs.server_python or sys.executable
    sglang, router = server.versions.get("sglang"), server.versions.get("sglang-router")
    records = []
    if sglang is None:
        records.append(
            fail(
                "SGLang",
                f"not installed in {python}",
                "install it there, or set rollout.server.python to an interpreter that has it",
            )
        )
    else:
        value = f"{sglang} (Python {server.python}, torch {server.torch})"
        records.append(ok("SGLang", f"{value}; verified is {VERIFIED_SGLANG}"))
    if needs.own_servers > 1 and router is None:
        records.append(
            fail(
                "SGLang's router",
                f"not installed in {python}, but {needs.own_servers} servers need one",
                "pip install sglang-router there",
            )
        )
    elif router is not None:
        records.append(ok("SGLang's router", f"{router}; verified is {VERIFIED_ROUTER}"))
    if needs.has_other_python:
        records.append(check_requirements("SGLang's requirements", server))
    records += _both_sides(trainer, server, needs)
    return records


def _both_sides(trainer: Interpreter, server: Interpreter, needs: Needs) -> list[Record]:
    """torch and NCCL of trainer and servers, as the transport of weights needs them."""
    records = []
    ours, theirs = _release(trainer.torch), _release(server.torch)
    value = f"{trainer.torch} here, {server.torch} in the servers' interpreter"
    if needs.transport == "tensor" and ours != theirs:
        remedy = "disk" if needs.colocated else "distributed or disk"
        records.append(
            fail(
                "torch of both sides",
                f"{value}: weight_sync.transport=tensor shares memory between equal versions only",
                f"install the same version, or set weight_sync.transport={remedy}",
            )
        )
    elif needs.has_other_python:
        records.append(ok("torch of both sides", value))
    if needs.transport == "distributed" and trainer.gpus:
        value = f"{trainer.nccl} here, {server.nccl} in the servers' interpreter"
        if trainer.nccl != server.nccl:
            records.append(
                fail(
                    "NCCL of both sides",
                    f"{value}: they form one group with weight_sync.transport=distributed",
                    "install the same version (nvidia-nccl-cu12 or -cu13) on both sides, or set "
                    "weight_sync.transport=disk",
                )
            )
        else:
            records.append(ok("NCCL of both sides", value))
    return records


def _release(version: str | None) -> str | None:
    """A version without its build: 2.11.0 of 2.11.0+cu130."""
    return None if version is None else version.partition("+")[0]
