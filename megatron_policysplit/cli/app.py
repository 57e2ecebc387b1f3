"""What the command lines share: usage lines, exit codes, errors as one sentence."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import typer
from typer.core import TyperCommand

from megatron_policysplit.distributed.rank_variables import RankPlace, rank_place
from megatron_policysplit.errors import BAD_INPUT, FAILED, UserError, WriteError
from megatron_policysplit.logs.streams import end_with_console

AnyPath = TypeVar("AnyPath", str, Path, None)


class Command(TyperCommand):
    """Usage lines without the braces that Typer puts around arguments which must be given."""

    def collect_usage_pieces(self, ctx) -> list[str]:
        return [
            piece.translate({ord("{"): None, ord("}"): None})
            for piece in super().collect_usage_pieces(ctx)
        ]


def expand_option(param: typer.CallbackParam, value: AnyPath) -> AnyPath:
    """A path with the home directory for a leading `~`, which no shell expands in `--model=~/m`.

    Raises ConfigError for the home directory of nobody.
    """
    if value is None:
        return None
    from megatron_policysplit.config.keys import expand_user

    return type(value)(expand_user(str(value), param.opts[0]))


def run_app(commands: typer.Typer) -> None:
    """Run a command; a UserError is one line on stderr and exit code 2, or 1 for a WriteError.

    Where the reader of standard output has ended, the command ends without a word, as programs do.
    """
    end_with_console()
    try:
        try:
            commands()
        finally:
            # Here, where the loss of the output is handled; Python would flush when it is too late.
            sys.stdout.flush()
    except UserError as error:
        sys.exit(report_error(error, None))


@contextmanager
def errors_of_ranks() -> Iterator[None]:
    """In a command that runs as ranks: only the first rank of every node prints a UserError.

    A file may be missing on one node alone. Wherever the variables do not say that this process is
    a rank, it prints. Ends the command with exit code 2.
    """
    place = None
    try:
        # Read before the command: `train` fills in the variables that were not set.
        place = rank_place(os.environ)
        yield
    except UserError as error:
        raise typer.Exit(report_error(error, place)) from error


def report_error(error: UserError, place: RankPlace | None) -> int:
    """Print the error to stderr and return the exit code. place: which rank this is; None if none.

    The first rank of every node prints it.
    """
    if place is None or place.first_of_node:
        prefix = "" if place is None else place.prefix
        print(f"{prefix}error: {error}", file=sys.stderr)
    return FAILED if isinstance(error, WriteError) else BAD_INPUT
