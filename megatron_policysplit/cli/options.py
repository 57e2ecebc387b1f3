"""Types of the command line's arguments and options: their names, help texts and checks."""

from __future__ import annotations

import enum
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

import typer

from megatron_policysplit.cli.app import expand_option
from megatron_policysplit.config.keys import LARGEST_INTEGER, LARGEST_NUMBER, LARGEST_SEED
from megatron_policysplit.errors import ConfigError


class Modes(enum.Enum):
    """Values of --mode."""

    both = "both"
    normal = "normal"
    high_entropy = "high_entropy"


class Precision(enum.Enum):
    """Values of --dtype."""

    float32 = "float32"
    bfloat16 = "bfloat16"


def finite(value: float) -> float:
    """The value. Raises typer.BadParameter for nan and infinity, which `min` lets pass."""
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


def _check_top_k(value: int) -> int:
    """The value. Raises typer.BadParameter for 0, which lies between -1 (all) and 1."""
    if value == 0:
        raise typer.BadParameter("0 keeps no token; use -1 to keep all, or at least 1")
    return value


ConfigPath = Annotated[
    str, typer.Argument(metavar="CONFIG", help="YAML file; see docs/configuration.md.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Keys that win over the file.", show_default=False),
]
ModelDir = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="DIR",
        callback=expand_option,
        help="Directory of a Hugging Face model.",
    ),
]
ModeChoice = Annotated[
    Modes,
    typer.Option(
        "--mode", help="Which policy answers; both: those of modes.others in --config too."
    ),
]
Temperature = Annotated[
    float,
    typer.Option(
        metavar="X",
        min=1e-6,
        max=LARGEST_NUMBER,
        callback=finite,
        help="Sampling temperature of all modes.",
    ),
]
TopP = Annotated[
    float,
    typer.Option(
        metavar="X", min=1e-6, max=1.0, callback=finite, help="Nucleus mass of all modes."
    ),
]
TopK = Annotated[
    int,
    typer.Option(
        metavar="N",
        min=-1,
        max=LARGEST_INTEGER,
        callback=_check_top_k,
        help="Keep the N most likely tokens only; -1 keeps all.",
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        max=LARGEST_INTEGER,
        help="Longest response, end-of-sequence token included. Without it, 512 in generate and "
        "1024 in eval, or as many as the model has positions for behind the longest prompt.",
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        metavar="N", min=0, max=LARGEST_SEED, help="The same seed gives the same responses."
    ),
]
RunConfig = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="FILE",
        callback=expand_option,
        help="Prompts of all modes as in this YAML file, such as config.yaml of a run; only its "
        "modes.* are used. A chat template that writes the date gets today's, not the run's.",
    ),
]
Prompt = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="System prompt of the high-entropy mode instead of ours."),
]
PromptFile = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        callback=expand_option,
        help="Read the high-entropy prompt from this UTF-8 file.",
    ),
]
Dtype = Annotated[Precision, typer.Option(help="Precision of the model.")]
Device = Annotated[
    str, typer.Option(metavar="DEVICE", help="Where the model runs: cpu, cuda, cuda:1 ...")
]
JudgeKeys = Annotated[
    list[str] | None,
    typer.Option(
        "--judge",
        metavar="KEY=VALUE",
        help="Have a model score responses: a key of eval.judge in docs/configuration.md, such as "
        "url=http://host:port/v1 and model=NAME; once for each key.",
    ),
]
BatchSamples = Annotated[
    int,
    typer.Option(metavar="N", min=1, max=LARGEST_INTEGER, help="Responses generated together."),
]


def check_output(
    output: Path, inputs: Iterable[str | Path], is_older: Callable[[Path], bool]
) -> None:
    """Check, before the work starts, that its result can be written and replaces nothing of worth.

    Raises ConfigError if not: for an input of the command, and for any other file that is not an
    older result. What is no file (/dev/stdout, a pipe) may be written.

    inputs: files that the command reads; what does not exist is none. is_older: whether a file is a
    result of the same command.
    """
    directory = output.absolute().parent
    if not directory.is_dir():
        raise ConfigError(
            f"--output {output}: the directory {output.parent} does not exist; create it first"
        )
    if output.is_dir():
        raise ConfigError(f"--output {output} is a directory; give the name of a file")
    for name in map(Path, inputs):
        if name.exists() and output.exists() and os.path.samefile(name, output):
            raise ConfigError(
                f"--output {output} is {name}, which the command reads; give another file"
            )
    if output.exists() and not output.is_file():
        return
    # The result is written beside the file and renamed, so both must allow it.
    target = output.resolve()
    if not all(os.access(path, os.W_OK) for path in (target.parent, target) if path.exists()):
        raise ConfigError(f"--output {output} cannot be written: no permission; give another file")
    if output.exists() and output.stat().st_size > 0 and not is_older(output):
        raise ConfigError(
            f"--output {output} exists and is no older result of this command; give another file, "
            "or remove it"
        )
