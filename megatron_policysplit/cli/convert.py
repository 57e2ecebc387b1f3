"""The commands of `policysplit convert`, which `python -m checkpoints_conv` has, too."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_policysplit.cli.app import (
    Command,
    errors_of_ranks,
    expand_option,
    report_error,
    run_app,
)
from megatron_policysplit.cli.convert_options import (
    AllowDowncast,
    Fp8Format,
    HfDir,
    HfOfMegatron,
    MegatronDir,
    Out,
    ToDtype,
    parse_size,
)
from megatron_policysplit.distributed.rank_variables import (
    RankPlace,
    rank_place,
    started_environment,
)
from megatron_policysplit.distributed.stop_signal import StopRequested
from megatron_policysplit.errors import DONE, FAILED, STOPPED, ConfigError, UserError

if TYPE_CHECKING:
    from checkpoints_conv.ranks import Ranks

app = typer.Typer(
    help="Convert checkpoints between Hugging Face and Megatron-Core, and check them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command(
    "hf-to-megatron", cls=Command, short_help="Hugging Face directory to Megatron-Core checkpoint."
)
def hf_to_megatron(
    hf: HfDir, out: Out, dtype: ToDtype = None, allow_downcast: AllowDowncast = False
) -> None:
    """Write a Hugging Face model as a torch_dist checkpoint that Megatron-Core loads at any TP x PP
    x EP.

    Needs no GPU and the memory of one tensor. Several processes started by torchrun share the work.
    Exit code 2: bad input; nothing is left at --out.
    """
    from checkpoints_conv.hf_to_megatron import hf_to_megatron as convert

    with _started_ranks() as ranks:
        name = None if dtype is None else dtype.value
        options = {"dtype": name, "allow_downcast": allow_downcast}
        convert(hf, out, **options, progress=_progress(ranks), ranks=ranks)
        _say(ranks, f"wrote {out}")


MaxShardSize = Annotated[
    str, typer.Option(metavar="SIZE", help="Largest file, such as 5GB, 500MB or 2GiB.")
]


@app.command(
    "megatron-to-hf", cls=Command, short_help="Megatron-Core checkpoint to Hugging Face directory."
)
def megatron_to_hf(
    megatron: MegatronDir,
    out: Out,
    hf: HfOfMegatron = None,
    dtype: ToDtype = None,
    max_shard_size: MaxShardSize = "5GB",
    allow_downcast: AllowDowncast = False,
) -> None:
    """Write the model of a torch_dist checkpoint, of whatever layout, as a complete Hugging Face
    directory.

    Optimizer state is not read. Needs no GPU and the memory of a few tensors. Several processes
    started by torchrun share the work. Exit code 2: bad input; nothing is left at --out.
    """
    from checkpoints_conv.megatron_to_hf import megatron_to_hf as convert

    shard_bytes = parse_size(max_shard_size)
    with _started_ranks() as ranks:
        name = None if dtype is None else dtype.value
        options = {"dtype": name, "max_shard_bytes": shard_bytes, "allow_downcast": allow_downcast}
        convert(megatron, out, hf=hf, **options, progress=_progress(ranks), ranks=ranks)
        _say(ranks, f"wrote {out}")


@app.command(
    "quantize", cls=Command, short_help="Hugging Face directory to FP8 for serving with SGLang."
)
def quantize(
    hf: HfDir,
    out: Out,
    form: Annotated[
        Fp8Format,
        typer.Option("--format", help="How weights and activations are scaled, see above."),
    ],
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            callback=expand_option,
            help="Questions (.jsonl or .parquet, as for training) to measure fp8's scales on.",
        ),
    ] = None,
    calibration_questions: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="At most so many of them, spread over the file. Default: 256."
        ),
    ] = None,
    high_entropy_prompt_file: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            callback=expand_option,
            help="The high-entropy prompt that the model was trained with. Default: our own.",
        ),
    ] = None,
    max_shard_size: MaxShardSize = "5GB",
) -> None:
    """Write a Hugging Face model in FP8, as a complete directory that SGLang serves.

    fp8: one scale a matrix, fixed scales of activations, measured by running the whole model on
    --calibration with the prompts of both modes. fp8-block: a scale for each 128 x 128 weights,
    activations scaled as they come; tensor by tensor, without calibration. Embedding, head, norms
    and routers of experts stay as they are. Needs nvidia-modelopt: pip install
    megatron_policysplit[quantize]. Exit code 2: bad input; nothing is left at --out.
    """
    from checkpoints_conv.progress import bar, token_bar
    from checkpoints_conv.quantize import quantize as convert
    from megatron_policysplit.config import ModesConfig

    calibration_options = [calibration, calibration_questions, high_entropy_prompt_file]
    if form is Fp8Format.fp8_block and calibration_options != [None, None, None]:
        raise ConfigError(
            "--format fp8-block scales activations as they come and is not calibrated; leave out "
            "--calibration and what belongs to it"
        )
    if form is Fp8Format.fp8 and calibration is None:
        raise ConfigError(
            "--format fp8 needs --calibration FILE with questions to measure activations on; "
            "--format fp8-block needs none"
        )
    _refuse_torchrun("quantize")

    # A function, because `quantize` calls it only after its own checks of the directories.
    def measure() -> Mapping[str, float]:
        from megatron_policysplit.cli.fp8_calibration import QUESTIONS, input_maxima

        modes = ModesConfig(high_entropy_prompt_file=high_entropy_prompt_file)
        count = calibration_questions or QUESTIONS
        return input_maxima(hf, calibration, modes, questions=count, progress=token_bar)

    maxima = measure if form is Fp8Format.fp8 else None
    size = parse_size(max_shard_size)
    written = convert(hf, out, form.value, input_maxima=maxima, max_shard_bytes=size, progress=bar)
    print(f"wrote {out}: {written.nbytes / 1e9:.2f} GB")
    if written.tensor_parallel is not None:
        print(f"SGLang can serve it with --tp-size {', '.join(map(str, written.tensor_parallel))}")


@app.command("verify", cls=Command, short_help="Compare the two, tensor by tensor.")
def verify(
    hf: HfDir,
    megatron: MegatronDir,
    logits: Annotated[
        bool,
        typer.Option(
            "--logits", help="Also build both models in float32 and compare their logits."
        ),
    ] = False,
) -> None:
    """Check that a torch_dist checkpoint holds the weights of a Hugging Face directory, bit for
    bit.

    With --logits Megatron-Core loads the checkpoint and computes logits, which must be those of
    transformers to 1e-4 of the largest. Exit code 2: they differ, or one of them is damaged.
    """
    from checkpoints_conv.progress import bar
    from checkpoints_conv.verify import verify as compare

    _refuse_torchrun("verify")
    verified = compare(hf, megatron, progress=bar)
    cast = f", {verified.cast} of them after a cast to the stored dtype" if verified.cast else ""
    print(f"{verified.tensors} tensors are equal{cast}")
    if logits:
        from megatron_policysplit.actor.logits import check_logits

        with _left_at_once():
            compared = check_logits(hf, megatron)
            print(
                f"logits differ by {compared.difference:.1e} at most (the largest is "
                f"{compared.largest:.1f})"
            )


@app.command("inspect", cls=Command, short_help="What is in a checkpoint, and whether it is whole.")
def inspect(
    directory: Annotated[Path, typer.Argument(metavar="DIR")], hf: HfOfMegatron = None
) -> None:
    """Say what a Hugging Face directory or a torch_dist checkpoint holds; exit code 2 unless it is
    whole.
    """
    from checkpoints_conv.describe import describe

    description = describe(directory, hf)
    width = max(map(len, description))
    for label, text in description.items():
        print(f"{label:{width}}  {text}")


@contextmanager
def _started_ranks() -> Iterator[Ranks]:
    """The ranks of this command: those that torchrun or srun started, else one.

    With several ranks the process ends with the body (`_left_at_once`).
    """
    from checkpoints_conv.ranks import Ranks

    place, variables = None, None
    with errors_of_ranks():
        place, variables = rank_place(os.environ), started_environment(os.environ)
    if place is None or place.world_size == 1:
        yield Ranks()
        return
    with _left_at_once(place):
        yield _joined_ranks(variables)


def _joined_ranks(variables: Mapping[str, str]) -> Ranks:
    """Meet the other ranks; until then SIGTERM and SIGINT end this one with exit code 75."""
    import torch.distributed as dist

    from checkpoints_conv.ranks import group_ranks
    from megatron_policysplit.distributed.rendezvous import meet
    from megatron_policysplit.distributed.stop_signal import StopSignal

    # Rank 0 has the whole model on the disk while the others wait, which takes longer than the
    # usual 30 minutes on slow ones. A rank that dies is noticed at once all the same: its
    # connections end.
    timeout = timedelta(days=1)
    stop, numbers = StopSignal(), (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    stop.install()
    environ = {**os.environ, **variables}
    store = meet(stop, timeout_seconds=timeout.total_seconds(), environ=environ)
    for number, handler in before.items():
        signal.signal(number, handler)
    rank, size = int(variables["RANK"]), int(variables["WORLD_SIZE"])
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
    return group_ranks()


@contextmanager
def _left_at_once(place: RankPlace | None = None) -> Iterator[None]:
    """Report the body's error, if any, and end this process without Python's finalization.

    place: which of several ranks this is.

    gloo's threads outlive destroy_process_group. The thread that ran the last collective releases
    its tensors only after the collective is over. They are Python objects too, so it needs the
    interpreter's lock for that. A thread that asks for the lock during finalization is unwound by
    pthread_exit, through C++ destructors that must not be unwound: std::terminate then kills a rank
    that had done its work.
    """
    code = FAILED
    try:
        yield
        code = DONE
    except UserError as error:
        code = report_error(error, place)
    except StopRequested:  # nothing had been written
        code = STOPPED
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _refuse_torchrun(command: str) -> None:
    """Raise ConfigError if this is one of several ranks of a command that runs as one process."""
    place = rank_place(os.environ)
    if place is not None and place.world_size > 1:
        raise ConfigError(
            f"{command} runs as one process, but this is rank {place.rank} of {place.world_size} "
            "(RANK and WORLD_SIZE, or SLURM_PROCID and SLURM_NTASKS); start it without torchrun or "
            "srun, or unset them if they are left over"
        )


def _progress(ranks: Ranks):
    """A progress bar on rank 0, which counts the tensors of that rank; none on other ranks."""
    from checkpoints_conv.progress import bar, silent

    return bar if ranks.rank == 0 else silent


def _say(ranks: Ranks, text: str) -> None:
    """Print on rank 0 only."""
    if ranks.rank == 0:
        print(text)


def main() -> None:
    """Entry point of `python -m checkpoints_conv`."""
    run_app(app)
