"""Types of the arguments and options of `policysplit convert`: names, help texts and checks."""

from __future__ import annotations

import enum
import re
from pathlib import Path
from typing import Annotated

import typer

from megatron_policysplit.cli.app import expand_option

UNITS = {  # bytes
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}


class Dtype(enum.Enum):
    """Values of --dtype."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Fp8Format(enum.Enum):
    """Values of --format."""

    fp8 = "fp8"
    fp8_block = "fp8-block"


def parse_size(text: str) -> int:
    """Bytes of `5GB` (decimal) or `5GiB` (binary). Raises typer.BadParameter."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in UNITS:
        raise typer.BadParameter(f"{text!r} is not a size; write 5GB, 500MB or 2GiB")
    size = int(float(match[1]) * UNITS[match[2].upper()])
    if size < 1:
        raise typer.BadParameter(f"{text!r} is no room for a tensor; write 5GB, 500MB or 2GiB")
    return size


HfDir = Annotated[
    Path,
    typer.Option(
        "--hf",
        metavar="DIR",
        callback=expand_option,
        help="Directory of a Hugging Face model.",
    ),
]
HfOfMegatron = Annotated[
    Path | None,
    typer.Option(
        "--hf",
        metavar="DIR",
        callback=expand_option,
        help="Where config.json, tokenizer and chat template come from. Default: hf/ of a "
        "converted checkpoint, model.path of the run for a training checkpoint.",
    ),
]
MegatronDir = Annotated[
    Path,
    typer.Option(
        "--megatron",
        metavar="DIR",
        callback=expand_option,
        help="A torch_dist checkpoint: converted, or checkpoints/step_NNNNNN of a run, saved at "
        "any TP x PP x EP.",
    ),
]
Out = Annotated[
    Path,
    typer.Option(
        "--out",
        metavar="DIR",
        callback=expand_option,
        help="Where to write; must not exist or be empty.",
    ),
]
ToDtype = Annotated[
    Dtype | None, typer.Option("--dtype", help="Cast to this type. Default: as it is.")
]
AllowDowncast = Annotated[bool, typer.Option("--allow-downcast", help="Let --dtype round.")]
