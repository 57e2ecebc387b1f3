"""What the command lines share: usage lines, exit codes, errors as one sentence."""

from __future__ import annotations

import os
import sys

import typer
from typer.core import TyperCommand

from megatron_policysplit.errors import BAD_INPUT, FAILED, UserError, WriteError
from megatron_policysplit.logs.streams import end_with_console


class Command(TyperCommand):
    """Usage lines without the braces that Typer puts around arguments which must be given."""

    def collect_usage_pieces(self, ctx) -> list[str]:
        return [
            piece.translate({ord("{"): None, ord("}"): None})
            for piece in super().collect_usage_pieces(ctx)
        ]


def run_app(commands: typer.Typer) -> None:
    """Run a command; a UserError is one line on stderr and exit code 2, or 1 for a WriteError.

    Where the reader of standard output has ended, the command ends without a word, as programs do.
    """
    end_with_console()
    # Read before the command: `train` fills in the variables that were not set.
    rank_of_node = local_rank()
    try:
        try:
            commands()
        finally:
            # Here, where the loss of the output is handled; Python would flush when it is too late.
            sys.stdout.flush()
    except UserError as error:
        sys.exit(report_error(error, rank_of_node))


def local_rank() -> str:
    """This process's rank on its node, as torchrun or srun set it; "0" where neither did."""
    return os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))


def report_error(error: UserError, rank_of_node: str) -> int:
    """Print the error to stderr and return the exit code.

    The first rank of every node prints it, because a file may be missing on one node alone.
    """
    rank = os.environ.get("RANK", "0")
    if rank == "0" or rank_of_node == "0":
        print(f"{'' if rank == '0' else f'rank {rank}: '}error: {error}", file=sys.stderr)
    return FAILED if isinstance(error, WriteError) else BAD_INPUT
