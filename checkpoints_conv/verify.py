"""Whether a torch_dist checkpoint holds the weights of a Hugging Face directory, bit for bit."""

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
    """tensors: compared, all equal. cast: how many of them are stored in another dtype than the
    original's.
    """

    tensors: int
    cast: int


def verify(hf: str | Path, megatron: str | Path, *, progress: Progress = silent) -> Verified:
    """Compare every tensor; one stored in another dtype must be the original cast to it.

    The model is that of `hf`'s config.json; a converted checkpoint's own must say the same but for
    the dtype. Raises ModelError naming the key of config.json that differs, or the tensors and
    their largest difference, besides the errors of `check_safetensors` and `MegatronCheckpoint`.
    """
    import torch

    found = check_safetensors(hf)
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
                if checkpoint.dtype(parameter) != SAFETENSORS[found[name].dtype]:
                    cast.add(name)
                if not torch.equal(
                    original.contiguous().view(torch.uint8), stored.contiguous().view(torch.uint8)
                ):
                    largest = (original.double() - stored.double()).abs().max().item()
                    differing[name] = f"{name} (by up to {largest:.3g})"
                advance(stored.nbytes)
    if differing:
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        named = ", ".join(list(differing.values())[:5])
        raise ModelError(
            f"{len(differing)} of {len(compared)} tensors of {megatron} differ from {hf}: "
            f"{named}{more}"
        )
    return Verified(len(compared), len(cast))


def check_config(megatron: str | Path, hf: str | Path) -> None:
    """Raise ModelError unless the config.json that a converted checkpoint holds says what that of
    `hf` does.

    They may differ in the dtype. A training checkpoint holds none, and passes.
    """
    companions = Path(megatron) / COMPANIONS
    if not companions.is_dir():
        return
    ours, theirs = read_hf_config(companions), read_hf_config(hf)
    for key in sorted(ours.keys() | theirs.keys()):
        if key not in ("dtype", "torch_dtype") and ours.get(key) != theirs.get(key):
            raise ModelError(
                f"config.json: {key}={ours.get(key)!r} in {companions} but {theirs.get(key)!r} in "
                f"{hf}; convert again from the directory that is meant"
            )
