"""Comparison of a torch_dist checkpoint with a Hugging Face directory, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from checkpoints_conv.dtypes import SAFETENSORS
from checkpoints_conv.errors import ModelError
from checkpoints_conv.hf_to_megatron import COMPANIONS
from checkpoints_conv.megatron_reader import MegatronCheckpoint
from checkpoints_conv.progress import Progress, silent
from checkpoints_conv.reader import SafetensorsReader, check_safetensors, read_hf_config


@dataclass(frozen=True)
class Verified:
    """How many tensors `verify` has compared and found equal."""

    tensors: int
    cast: int  # how many of them are stored in another dtype than the original's


def verify(hf: str | Path, megatron: str | Path, *, progress: Progress = silent) -> Verified:
    """Compare every tensor of a torch_dist checkpoint with a Hugging Face directory's.

    A tensor stored in another dtype must be the original cast to it. config.json is `hf`'s; that of
    a converted checkpoint must say the same but for the dtype. Raises ModelError naming the key of
    config.json that differs, or the tensors and their largest difference, besides the errors of
    `check_safetensors` and `MegatronCheckpoint`.
    """
    import torch

    headers = check_safetensors(hf)
    checkpoint = MegatronCheckpoint(megatron, hf)
    check_config(megatron, hf)
    differing: dict[str, str] = {}
    compared, cast = set(), set()
    parameters = [*checkpoint.parameters, *checkpoint.copies]
    with (
        SafetensorsReader(hf) as reader,
        progress(sum(map(checkpoint.nbytes, parameters))) as advance,
    ):
        for parameter in parameters:
            for name, stored in checkpoint.hf_tensors(parameter):
                original = reader.get(name).to(stored.dtype)
                compared.add(name)
                if checkpoint.dtype(parameter) != SAFETENSORS[headers[name].dtype]:
                    cast.add(name)
                # Bytes, not values: NaN differs from itself, and -0 equals 0.
                if not torch.equal(
                    original.contiguous().view(torch.uint8), stored.contiguous().view(torch.uint8)
                ):
                    largest = (original.double() - stored.double()).abs().max().item()
                    differing[name] = f"{name} (by up to {largest:.3g})"
                advance(stored.nbytes)
    if differing:
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        examples = ", ".join(list(differing.values())[:5])
        raise ModelError(
            f"{len(differing)} of {len(compared)} tensors of {megatron} differ from {hf}: "
            f"{examples}{more}"
        )
    return Verified(len(compared), len(cast))


def check_config(megatron: str | Path, hf: str | Path) -> None:
    """Raise ModelError unless a converted checkpoint holds the config.json of `hf`.

    They may differ in the dtype. A training checkpoint holds none, and passes.
    """
    companions = Path(megatron) / COMPANIONS
    if not companions.is_dir():
        return
    converted, original = read_hf_config(companions), read_hf_config(hf)
    for key in sorted(converted.keys() | original.keys()):
        value, expected = converted.get(key), original.get(key)
        if key not in ("dtype", "torch_dtype") and value != expected:
            raise ModelError(
                f"config.json: {key}={value!r} in {companions} but {expected!r} in {hf}; convert "
                "again from the directory that is meant"
            )
