"""Installed packages and whether they fit each other, in the trainer's and the servers' Python."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_policysplit.config import Config
from megatron_policysplit.doctor.finding import FAIL, OK, WARN, Finding, output_of
from megatron_policysplit.errors import UserError
from megatron_policysplit.serving.interpreter import check_interpreter, server_count
from megatron_policysplit.serving.processes import inherited_environment

IMPORT_SECONDS = 180.0  # torch from a cluster's file system, for the first time
OPTIONAL = ("transformer-engine", "triton", "apex")
_CUBLAS = ("nvidia-cublas", "nvidia-cublas-cu13", "nvidia-cublas-cu12")  # of torch's own wheels
DISTRIBUTION = "megatron_policysplit"

# Asked of an interpreter that need not have our packages.
_TORCH = """
import json, sys
facts = {"python": sys.version.split()[0]}
try:
    import torch
    facts |= {"torch": torch.__version__, "cuda": torch.version.cuda}
    if torch.version.cuda:
        nccl = torch.cuda.nccl.version()
        facts |= {"cudnn": torch.backends.cudnn.version(), "nccl": ".".join(map(str, nccl))}
except Exception as error:
    facts["error"] = f"{type(error).__name__}: {error}"
print(json.dumps(facts))
"""
# Asked of the trainer's own.
_OURS = """
import json
from megatron_policysplit.distributed import device
print(json.dumps({
    "gpus": device.gpu_count(),
    "unused": device.unused_gpu(),
    "transformer_engine": device.transformer_engine_problem(),
    "triton": device.missing_triton(),
    "apart": device.gpus_without_peer_access(),
}))
"""


@dataclass(frozen=True)
class Torch:
    """What an interpreter's torch says of itself."""

    python: str
    torch: str | None = None  # None: it cannot be imported
    cuda: str | None = None  # the CUDA release that it was built for; None: a build for CPUs
    cudnn: int | None = None
    nccl: str | None = None
    error: str = ""  # why it cannot be imported


@dataclass(frozen=True)
class Trainer:
    """What the trainer finds on this machine."""

    gpus: int = 0
    unused: str | None = None  # a GPU that this torch cannot use, in words
    transformer_engine: str | None = None  # why it cannot be used, in words
    triton: str | None = None  # why the head's kernels cannot be used, in words
    apart: list[list[int]] = field(default_factory=list)  # pairs of GPUs without peer access
    packages: dict[str, str] = field(default_factory=dict)  # optional ones that are installed


def ask_torch(python: str) -> Torch:
    """Ask an interpreter for its torch. Raises as `output_of` does."""
    environ = None if python == sys.executable else inherited_environment(os.environ, python)
    return Torch(**_last_json(output_of([python, "-c", _TORCH], IMPORT_SECONDS, environ)))


def ask_trainer() -> Trainer:
    """Ask a process like a rank what it would find. Raises as `output_of` does."""
    facts = _last_json(output_of([sys.executable, "-c", _OURS], IMPORT_SECONDS))
    packages = {name: version for name in OPTIONAL if (version := installed(name)) is not None}
    return Trainer(**facts, packages=packages)


def _last_json(text: str) -> dict[str, Any]:
    return json.loads(text.strip().splitlines()[-1])


def installed(name: str) -> str | None:
    """The version of a distribution; None if there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_requirements() -> list[Finding]:
    """Whether what this package requires is installed in a version that it takes."""
    from packaging.requirements import Requirement

    wrong, count = [], 0
    for text in importlib.metadata.requires(DISTRIBUTION) or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        count += 1
        version = installed(requirement.name)
        if version is None:
            wrong.append(f"{requirement.name} is not installed")
        elif not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
    if wrong:
        remedy = "pip install megatron_policysplit again (docs/gpu.md on machines with GPUs)"
        return [Finding("packages", FAIL, "; ".join(wrong), remedy)]
    megatron = f"Megatron-Core {installed('megatron-core')}"
    return [Finding("packages", OK, f"all {count} required ones fit, {megatron} among them")]


def check_torch(torch: Torch, trainer: Trainer) -> list[Finding]:
    """torch, what it was built for, and what goes with it on a GPU."""
    if torch.torch is None:
        return [Finding("torch", FAIL, f"cannot be imported ({torch.error})", "install it again")]
    build = f"CUDA {torch.cuda}" if torch.cuda else "CPUs"
    text = f"{torch.torch} for {build}, Python {torch.python}"
    if torch.nccl:
        cublas = next(filter(None, map(installed, _CUBLAS)), "of the system")
        text += f", NCCL {torch.nccl}, cuDNN {torch.cudnn}, cuBLAS {cublas}"
    if trainer.unused is not None:
        return [Finding("torch", FAIL, trainer.unused)]
    findings = [Finding("torch", OK, text)]
    if torch.cuda and not trainer.gpus and Path("/dev/nvidia0").exists():
        findings.append(
            Finding(
                "driver",
                FAIL,
                f"torch for CUDA {torch.cuda} sees none of this machine's GPUs",
                "compare with the CUDA release that nvidia-smi shows (a newer torch needs a newer "
                "driver), and unset CUDA_VISIBLE_DEVICES",
            )
        )
    return findings


def check_gpu_packages(trainer: Trainer, layers: str) -> list[Finding]:
    """Transformer Engine and Triton, which matter on a GPU only; layers: `model.layers`."""
    if not trainer.gpus:
        return []
    findings, problem = [], trainer.transformer_engine
    version = trainer.packages.get("transformer-engine")
    if problem is None:
        findings.append(Finding("Transformer Engine", OK, version or "can be imported"))
    elif layers == "local":
        findings.append(Finding("Transformer Engine", OK, f"{problem}; model.layers=local"))
    else:
        status = FAIL if layers == "transformer_engine" else WARN
        remedy = "model.layers=auto takes Megatron-Core's own layers; docs/gpu.md says how to build"
        findings.append(Finding("Transformer Engine", status, problem, remedy))
    if trainer.triton is not None:
        findings.append(Finding("Triton", WARN, trainer.triton))
    else:
        findings.append(Finding("Triton", OK, trainer.packages.get("triton", "can be used")))
    if (apex := trainer.packages.get("apex")) is not None:
        findings.append(Finding("apex", OK, apex))
    if trainer.apart:
        pairs = ", ".join(f"{one} and {other}" for one, other in trainer.apart[:4])
        remedy = "NCCL goes through host memory between them: nvidia-smi topo -m says why"
        findings.append(Finding("peer access", WARN, f"none between GPUs {pairs}", remedy))
    elif trainer.gpus > 1:
        findings.append(Finding("peer access", OK, f"between all {trainer.gpus} GPUs"))
    return findings


def check_wanted_packages(config: Config | None) -> list[Finding]:
    """Packages that only some configurations need."""
    findings = []
    if config is not None and config.log.wandb_project is not None:
        version = installed("wandb")
        status, remedy = (OK, "") if version else (FAIL, "pip install wandb")
        findings.append(Finding("wandb", status, version or "is not installed", remedy))
    version = installed("nvidia-modelopt")
    findings.append(
        Finding("modelopt", OK, version or "is not installed; only `convert quantize` needs it")
    )
    return findings


def check_servers(config: Config, trainer_torch: Torch) -> list[Finding]:
    """SGLang in the interpreter of the servers that a run starts, and its torch beside ours."""
    rollout, server = config.rollout, config.rollout.server
    if rollout.engine != "sglang" or rollout.addresses:
        return []
    python = server.python or sys.executable
    count = server_count(config)
    try:
        # Several servers stand behind a router.
        modules = ["sglang", "sglang_router"][: 1 + (count > 1)]
        check_interpreter(server.python, modules, server.environment)
    except UserError as error:
        return [Finding("SGLang", FAIL, str(error))]
    torch = ask_torch(python)
    router = ", with its router" * (count > 1)
    findings = [Finding("SGLang", OK, f"in {python}{router}, torch {torch.torch}")]
    return findings + compare_torches(trainer_torch, torch, config.weight_sync.transport)


def compare_torches(trainer: Torch, server: Torch, transport: str) -> list[Finding]:
    """Whether weights can go from one torch to the other; transport: `weight_sync.transport`."""
    if transport == "tensor" and _release(trainer.torch) != _release(server.torch):
        return [
            Finding(
                "weights to SGLang",
                FAIL,
                f"weight_sync.transport=tensor shares memory between equal torch only: "
                f"{trainer.torch} here, {server.torch} in the servers",
                "install the same release, or set weight_sync.transport=disk",
            )
        ]
    if transport == "distributed" and trainer.nccl != server.nccl:
        return [
            Finding(
                "weights to SGLang",
                FAIL,
                f"weight_sync.transport=distributed needs one NCCL: {trainer.nccl} here, "
                f"{server.nccl} in the servers",
                "install torch releases with the same NCCL, or set weight_sync.transport=disk",
            )
        ]
    return [Finding("weights to SGLang", OK, f"weight_sync.transport={transport}")]


def _release(version: str | None) -> str | None:
    return None if version is None else version.split("+")[0]
