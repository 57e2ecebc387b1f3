"""Environment variables that make a start fail or a run slow."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_policysplit.config import Config
from megatron_policysplit.config.engine_checks import check_actor_allocator
from megatron_policysplit.distributed.rank_variables import rank_place
from megatron_policysplit.doctor.finding import FAIL, OK, WARN, Finding
from megatron_policysplit.errors import ConfigError

_SHOWN = ("CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "OMP_NUM_THREADS")
_LIBRARIES = ("nccl", "cuda", "cudnn")


def check_variables(
    environ: Mapping[str, str], config: Config | None, has_gpu: bool
) -> list[Finding]:
    """Launchers' variables, the allocator's, and those of CUDA's libraries."""
    name, findings = "variables", []
    try:
        place = rank_place(environ)
    except ConfigError as error:
        findings.append(Finding(name, FAIL, str(error)))
    else:
        if place is not None:
            value = f"this process is rank {place.rank} of {place.world_size}"
            remedy = "unset RANK and its like if no launcher set them for this"
            findings.append(Finding(name, WARN, value, remedy))
    if config is not None:
        try:
            check_actor_allocator(config, environ)
        except ConfigError as error:
            findings.append(Finding(name, FAIL, str(error)))
    libraries = environ.get("LD_LIBRARY_PATH", "")
    if has_gpu and any(word in libraries.lower() for word in _LIBRARIES):
        value = f"LD_LIBRARY_PATH={libraries} may hide the CUDA and NCCL that torch brings"
        findings.append(Finding(name, WARN, value, "unset it if torch does not need it"))
    shown = [f"{variable}={environ[variable]}" for variable in _SHOWN if variable in environ]
    shown += [f"{key}={value}" for key, value in environ.items() if key.startswith("NCCL_")]
    findings.append(Finding(name, OK, ", ".join(shown) or "none that matter"))
    return findings
