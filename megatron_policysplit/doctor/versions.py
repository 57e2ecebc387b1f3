"""Whether the packages of an interpreter fit Python, each other and the GPU's driver."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from megatron_policysplit.doctor.asking import ask_script
from megatron_policysplit.doctor.needs import Needs
from megatron_policysplit.doctor.record import Record, fail, ok, warn

# What setup.py asks for.
MEGATRON = SpecifierSet(">=0.16,<0.20")
TRANSFORMERS = SpecifierSet(">=4.51")
TORCH = SpecifierSet(">=2.8")
PYTHON = SpecifierSet(">=3.11")
TRITON = SpecifierSet(">=3.4")
# Megatron-Core 0.16 names this range of Transformer Engine; later ones name no upper bound.
ENGINE_OF_0_16, ENGINE = SpecifierSet(">=2.9,<2.12"), SpecifierSet(">=2.9")
CPU_INDEX = "docs/gpu.md says how to install one for CUDA"

DISTRIBUTION = "megatron-policysplit"
PACKAGES = (
    DISTRIBUTION,  # and all that it asks for
    "torch",
    "megatron-core",
    "transformer-engine",
    "transformer-engine-torch",
    "transformer-engine-cu12",
    "transformer-engine-cu13",
    "triton",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "sglang",
    "sglang-router",
    "nvidia-modelopt",
    "wandb",
    "apex",
    "flash-attn",
)
IMPORT_SECONDS = 120.0  # torch and Transformer Engine from a cluster's file system


@dataclass(frozen=True)
class Gpu:
    """A GPU as torch sees it. Memory in bytes."""

    name: str
    capability: tuple[int, int]
    free: int
    total: int
    peers: tuple[int, ...] = ()  # GPUs whose memory it can reach by itself


@dataclass(frozen=True)
class Interpreter:
    """What an interpreter has. Made by `look_at`."""

    python: str
    versions: Mapping[str, str] = field(default_factory=dict)  # by distribution
    needs_python: Mapping[str, str] = field(default_factory=dict)  # Requires-Python of each
    requires: Mapping[str, Sequence[str]] = field(default_factory=dict)
    torch: str | None = None  # version with its build, such as 2.11.0+cu130
    torch_error: str | None = None  # why torch cannot be imported
    cuda: str | None = None  # that torch was built for
    hip: str | None = None
    cudnn: int | None = None
    cublas: str | None = None
    nccl: str | None = None
    architectures: tuple[str, ...] = ()  # such as sm_90, compute_90
    driver_cuda: tuple[int, int] | None = None  # the newest that the driver supports
    gpus: tuple[Gpu, ...] = ()
    no_gpu: str | None = None  # why torch sees no GPU
    engine_error: str | None = None  # why Transformer Engine's part for torch fails to import


def look_at(
    python: str, environ: Mapping[str, str], *, imports_engine: bool = False
) -> Interpreter:
    """Ask an interpreter, in a child process. Raises ProbeFailed."""
    arguments = [*PACKAGES, *(["--import"] if imports_engine else [])]
    answer = ask_script("packages", arguments, IMPORT_SECONDS, python=python, environ=environ)
    return interpreter_of(answer)


def interpreter_of(answer: Mapping[str, Any]) -> Interpreter:
    """The facts in an answer of scripts/packages.py."""
    found, torch = answer["distributions"], answer["torch"]
    gpus = tuple(
        Gpu(
            gpu["name"],
            tuple(gpu["capability"]),
            gpu["free"],
            gpu["total"],
            tuple(gpu["peers"]),
        )
        for gpu in torch.get("gpus", ())
    )
    driver = answer["driver_cuda"]
    return Interpreter(
        python=answer["python"],
        versions={name: entry["version"] for name, entry in found.items()},
        needs_python={name: entry["python"] for name, entry in found.items() if entry["python"]},
        requires={name: tuple(entry["requires"]) for name, entry in found.items()},
        torch=torch.get("version"),
        torch_error=torch.get("error"),
        cuda=torch.get("cuda"),
        hip=torch.get("hip"),
        cudnn=torch.get("cudnn"),
        cublas=torch.get("cublas"),
        nccl=torch.get("nccl"),
        architectures=tuple(torch.get("architectures", ())),
        driver_cuda=None if driver is None else tuple(driver),
        gpus=gpus,
        no_gpu=torch.get("no_gpu"),
        engine_error=answer["transformer_engine"],
    )


def check_versions(trainer: Interpreter, has_gpu: bool, needs: Needs | None) -> list[Record]:
    """Records about the trainer's own interpreter. has_gpu: whether the machine has an NVIDIA GPU.

    needs: what the configuration asks for; None without one.
    """
    return [
        _in_range("Python", trainer.python, PYTHON),
        check_torch(trainer, has_gpu),
        *check_cuda(trainer, has_gpu),
        check_megatron(trainer),
        check_engine(trainer, needs),
        check_triton(trainer),
        _in_range("transformers", trainer.versions.get("transformers"), TRANSFORMERS),
        check_installation(trainer),
        check_requirements("requirements", trainer),
        *check_extras(trainer, needs),
    ]


def check_torch(trainer: Interpreter, has_gpu: bool) -> Record:
    """torch, and whether it is a build for what the machine has."""
    if trainer.torch is None:
        reason = trainer.torch_error or "it is not installed"
        return fail("torch", f"cannot be imported: {reason}", f"install torch{TORCH}")
    build = f"CUDA {trainer.cuda}" if trainer.cuda else f"ROCm {trainer.hip}" if trainer.hip else ""
    value = f"{trainer.torch} ({'for ' + build if build else 'a build for CPUs'})"
    if Version(trainer.torch) not in TORCH:
        return fail("torch", value, f"install torch{TORCH}")
    if has_gpu and not build:
        return fail(
            "torch",
            f"{value}, but this machine has an NVIDIA GPU, which it cannot use",
            f"install a build for CUDA ({CPU_INDEX}), or hide nothing and train on the CPU",
        )
    if has_gpu and trainer.no_gpu is not None:
        return fail(
            "torch",
            f"{value}: there is an NVIDIA GPU that it does not see ({trainer.no_gpu})",
            "see CUDA_VISIBLE_DEVICES below and nvidia-smi; a driver that was updated needs a "
            "restart, a container needs --gpus",
        )
    return ok("torch", value)


def check_cuda(trainer: Interpreter, has_gpu: bool) -> list[Record]:
    """CUDA, cuDNN, cuBLAS and NCCL of a torch for GPUs; nothing without one."""
    if trainer.cuda is None:
        return []
    if not has_gpu:
        return [ok("CUDA", f"torch is built for {trainer.cuda} (not used without a GPU)")]
    versions = {"cuDNN": trainer.cudnn, "cuBLAS": trainer.cublas, "NCCL": trainer.nccl}
    named = ", ".join(f"{name} {version or 'unknown'}" for name, version in versions.items())
    records = [_driver(trainer)]
    if trainer.cudnn is None or trainer.nccl is None:
        records.append(
            warn("libraries", named, "install torch again: a build for CUDA brings them along")
        )
    else:
        records.append(ok("libraries", named))
    return records


def _driver(trainer: Interpreter) -> Record:
    built = _pair(trainer.cuda or "0.0")
    if trainer.driver_cuda is None:
        return warn(
            "CUDA",
            f"torch is built for {trainer.cuda}, but there is no driver (libcuda.so.1)",
            "install NVIDIA's driver, or start the container with --gpus",
        )
    major, minor = trainer.driver_cuda
    value = f"torch is built for {trainer.cuda}, the driver supports up to {major}.{minor}"
    # Within a major version a newer toolkit runs on an older driver.
    if built[0] > major:
        return fail("CUDA", value, f"update the driver, or install a torch for CUDA {major}.x")
    return ok("CUDA", value)


def check_megatron(trainer: Interpreter) -> Record:
    """Megatron-Core: the range of setup.py, and the Python that it asks for."""
    version = trainer.versions.get("megatron-core")
    record = _in_range("Megatron-Core", version, MEGATRON, package="megatron-core")
    wanted = trainer.needs_python.get("megatron-core")
    if record.status == "OK" and wanted and Version(trainer.python) not in SpecifierSet(wanted):
        return fail(
            "Megatron-Core",
            f"{version} asks for Python {wanted}, and this is {trainer.python}",
            "let pip choose (0.16 on Python 3.11, 0.19 on 3.12), or use another Python",
        )
    return record


def check_engine(trainer: Interpreter, needs: Needs | None) -> Record:
    """Transformer Engine: whole, of one version, for this torch, in Megatron-Core's range."""
    name, versions = "Transformer Engine", trainer.versions
    core, part = versions.get("transformer-engine"), versions.get("transformer-engine-torch")
    install = (
        "pip install --no-build-isolation 'transformer-engine[pytorch]' beside this torch "
        "(docs/gpu.md), or set model.layers=local"
    )
    is_wanted = needs is not None and needs.layers == "transformer_engine"
    if not trainer.gpus:
        if is_wanted:
            return fail(
                name,
                "model.layers=transformer_engine, but torch sees no GPU",
                "its layers run on a GPU only; set model.layers=auto or local",
            )
        return ok(name, f"{core or 'not installed'} (not used without a GPU)")
    if core is None:
        value = "not installed: layers are Megatron-Core's own"
        return fail(name, value, install) if is_wanted else warn(name, value, install)
    if needs is not None and needs.layers == "local":
        return ok(name, f"{core} (not used: model.layers=local)")
    if trainer.engine_error is None:
        return _engine_fits(trainer, core)
    # NGC images have one package without a part of its own for torch.
    cause = ""
    if part is None:
        cause = " without its part for torch (transformer-engine-torch)"
    elif part != core:
        cause = f" with a part for torch of another version ({part})"
    return fail(name, f"{core}{cause} cannot be imported: {trainer.engine_error}", install)


def _engine_fits(trainer: Interpreter, core: str) -> Record:
    """A Transformer Engine that can be imported, against CUDA and Megatron-Core."""
    name, versions = "Transformer Engine", trainer.versions
    major = _pair(trainer.cuda or "0.0")[0]
    libraries = [n for n in (12, 13) if f"transformer-engine-cu{n}" in versions]
    if libraries and major not in libraries:
        return warn(
            name,
            f"{core} has its library for CUDA {libraries[0]}, but torch is built for CUDA {major}",
            f"pip install transformer-engine-cu{major}=={core}",
        )
    megatron = versions.get("megatron-core")
    is_old = megatron is not None and Version(megatron) < Version("0.17")
    wanted = ENGINE_OF_0_16 if is_old else ENGINE
    if not wanted.contains(core, prereleases=True):
        return warn(
            name,
            f"{core} is outside the range that goes with Megatron-Core {megatron} ({wanted})",
            f"pip install --no-build-isolation 'transformer-engine[pytorch]{wanted}'",
        )
    return ok(name, f"{core}, imported beside torch {trainer.torch}")


def check_triton(trainer: Interpreter) -> Record:
    """Triton, which computes the LM head on a GPU."""
    version = trainer.versions.get("triton")
    if not trainer.gpus:
        return ok("Triton", f"{version or 'not installed'} (not used without a GPU)")
    if version is None or not TRITON.contains(version, prereleases=True):
        return warn(
            "Triton",
            f"{version or 'not installed'}: the LM head is computed in plain torch, which is slow",
            f"pip install 'triton{TRITON}' (torch 2.8 brings it)",
        )
    return ok("Triton", version)


def check_installation(trainer: Interpreter) -> Record:
    """Whether what this package itself asks for is there, in versions that it takes."""
    if DISTRIBUTION not in trainer.versions:
        return ok("installation", "not by pip: what this package asks for was not looked at")
    wrong = []
    count = 0
    for wanted in _requirements(trainer, DISTRIBUTION):
        count += 1
        have = trainer.versions.get(_canonical(wanted.name))
        if have is None:
            wrong.append(f"{wanted.name} is not installed")
        elif not wanted.specifier.contains(have, prereleases=True):
            wrong.append(f"{wanted.name} {have} is not {wanted.specifier}")
    if wrong:
        return fail("installation", "; ".join(wrong), "install this package again (docs/gpu.md)")
    return ok("installation", f"the {count} packages that it asks for are there")


def check_requirements(name: str, interpreter: Interpreter) -> Record:
    """Whether the packages looked at ask each other for versions that are not there."""
    unmet = []
    for package in interpreter.requires:
        if package == DISTRIBUTION:
            continue
        for wanted in _requirements(interpreter, package):
            have = interpreter.versions.get(_canonical(wanted.name))
            if have is not None and not wanted.specifier.contains(have, prereleases=True):
                unmet.append(
                    f"{package} {interpreter.versions[package]} asks for {wanted.name}"
                    f"{wanted.specifier}, {have} is installed"
                )
    if unmet:
        return warn(name, "; ".join(unmet), "pip check; install versions that fit")
    return ok(name, "the packages looked at fit each other")


def _requirements(interpreter: Interpreter, package: str) -> list[Requirement]:
    """What a package asks for in that interpreter, extras left out."""
    environment = {
        "python_version": ".".join(interpreter.python.split(".")[:2]),
        "python_full_version": interpreter.python,
        "extra": "",
    }
    requirements = []
    for text in interpreter.requires[package]:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:  # of an old setuptools: pip would not read it either
            continue
        if requirement.marker is None or requirement.marker.evaluate(environment):
            requirements.append(requirement)
    return requirements


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def check_extras(trainer: Interpreter, needs: Needs | None) -> list[Record]:
    """Packages that only some runs need."""
    wandb = trainer.versions.get("wandb")
    if needs is not None and needs.wandb and wandb is None:
        first = fail(
            "wandb",
            "not installed, but log.wandb_project is set",
            "pip install 'wandb>=0.19', or unset log.wandb_project",
        )
    else:
        first = ok("wandb", wandb or "not installed (for log.wandb_project alone)")
    modelopt = trainer.versions.get("nvidia-modelopt")
    apex = trainer.versions.get("apex")
    return [
        first,
        ok("modelopt", modelopt or "not installed (for `convert quantize` alone)"),
        ok("apex", apex or "not installed (not needed)"),
    ]


def _in_range(
    name: str, version: str | None, wanted: SpecifierSet, package: str | None = None
) -> Record:
    package = package or name.lower()
    if version is None:
        return fail(name, "not installed", f"pip install '{package}{wanted}'")
    if not wanted.contains(version, prereleases=True):
        return fail(name, f"{version} is outside {wanted}", f"install {package}{wanted}")
    return ok(name, version)


def _pair(version: str) -> tuple[int, int]:
    major, _, minor = version.partition(".")
    return int(major), int(minor.partition(".")[0] or 0)
