"""What the command lines share: usage lines, exit codes, one sentence instead of a traceback."""

from __future__ import annotations

import os
import sys

import typer
from typer.core import TyperCommand

from megatron_policysplit.errors import BAD_INPUT, UserError


class Command(TyperCommand):
    """Usage lines without the braces that Typer puts around arguments which must be given."""

    def collect_usage_pieces(self, ctx) -> list[str]:
        return [
            piece.translate({ord("{"): None, ord("}"): None})
            for piece in super().collect_usage_pieces(ctx)
        ]


def run_app(commands: typer.Typer) -> None:
    """Run a command; a UserError is one line on stderr and exit code 2."""
    local_rank = _local_rank()  # as given; `train` fills gaps
    try:
        commands()
    except UserError as error:
        sys.exit(_report(error, local_rank))


def _local_rank() -> str:
    return os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))


def _report(error: UserError, local_rank: str) -> int:
    """Print it and return the exit code.

    Of several ranks the first of every node prints it: what is missing may be missing on that node
    alone.
    """
    rank = os.environ.get("RANK", "0")
    if rank == "0" or local_rank == "0":
        print(f"{'' if rank == '0' else f'rank {rank}: '}error: {error}", file=sys.stderr)
    return BAD_INPUT
