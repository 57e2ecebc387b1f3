"""`policysplit doctor`: checks of this machine, and of the nodes beside it."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from megatron_policysplit.cli.options import Overrides
from megatron_policysplit.errors import DONE, FAILED, ConfigError


def doctor(
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="CONFIG",
            help="YAML file of a run that is to start here; without one, sizes are not compared.",
            show_default=False,
        ),
    ] = None,
    overrides: Overrides = None,
    nodes: Annotated[
        bool,
        typer.Option("--nodes", help="All nodes of the Slurm allocation, which srun asks, too."),
    ] = False,
    hosts: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="Nodes by name, whether they resolve and can be reached; without Slurm.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="A list of name, status, value, remedy, and no text.")
    ] = False,
) -> None:
    """Check this machine before a run: versions, GPUs, memory, limits, names, ports, run.dir,
    environment. A line each with OK, WARN or FAIL, and what to do.

    Writes nothing but a probe in run.dir, which is removed, and takes no GPU memory that stays.

    Exit codes: 0 nothing is a FAIL, 1 something is; 2 the command line is wrong.
    """
    from megatron_policysplit.doctor.examine import examine, question_of
    from megatron_policysplit.doctor.record import as_json as json_of
    from megatron_policysplit.doctor.record import counted, has_failed, line_of

    names = [name.strip() for name in (hosts or "").split(",") if name.strip()]
    if hosts is not None and not names:
        raise ConfigError(f"--hosts {hosts!r} names no node; give names with commas between them")
    if names and nodes:
        raise ConfigError("--nodes asks those of the allocation; give it or --hosts, not both")
    arguments = [] if config is None else [config, *(overrides or [])]
    question, records = question_of(arguments, names, nodes, os.environ)
    if not as_json:
        for record in records:
            print(line_of(record), flush=True)
    for record in examine(question):
        records.append(record)
        if not as_json:
            print(line_of(record), flush=True)
    print(json_of(records) if as_json else counted(records))
    raise typer.Exit(FAILED if has_failed(records) else DONE)
