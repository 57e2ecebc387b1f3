"""`policysplit doctor`: examine this machine before a run starts on it."""

from __future__ import annotations

import json
import socket
import sys
from typing import Annotated

import typer

from megatron_policysplit.errors import DONE, FAILED, UserError


def doctor(
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="[CONFIG]",
            help="YAML file of the run that is to start here; without it, what every run needs.",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keys to set otherwise.")
    ] = None,
    nodes: Annotated[
        bool, typer.Option("--nodes", help="Ask all nodes of this Slurm job too, by srun.")
    ] = False,
    hosts: Annotated[
        str | None,
        typer.Option(help="Names of other nodes, with commas: do they resolve and answer?"),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the findings as JSON, alone on stdout.")
    ] = False,
    one_line: Annotated[
        bool, typer.Option("--one-line", help="With --json: one object on one line.", hidden=True)
    ] = False,
) -> None:
    """Examine this machine: versions, GPUs, memory, limits, names, ports, run.dir.

    A line for each check: OK, WARN (a run starts and may go wrong) or FAIL (none will start), and
    what to do. Exit code 1 if anything is FAIL.
    """
    from megatron_policysplit.config.load import load_config
    from megatron_policysplit.doctor.examine import examine
    from megatron_policysplit.doctor.finding import FAIL, Finding

    findings, loaded = [], None

    def tell(finding: Finding) -> None:
        findings.append(finding)
        if not as_json:
            print(finding, flush=True)

    if config is not None:
        try:
            loaded = load_config(config, overrides or [])
        except UserError as error:
            tell(Finding("configuration", FAIL, str(error)))
    named = [host.strip() for host in (hosts or "").split(",") if host.strip()]
    for finding in examine(loaded, hosts=named, asks_nodes=nodes):
        tell(finding)
    failed = sum(finding.status == FAIL for finding in findings)
    if as_json:
        records = [finding.record() for finding in findings]
        if one_line:
            print(json.dumps({"host": socket.gethostname(), "findings": records}))
        else:
            print(json.dumps(records, indent=2))
    elif failed:
        print(f"{failed} of {len(findings)} would stop a run", file=sys.stderr)
    raise typer.Exit(FAILED if failed else DONE)
