"""The command line: the application and the commands about runs.

Commands import what they need when they run, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from megatron_policysplit import __version__
from megatron_policysplit.cli import convert
from megatron_policysplit.cli.app import Command, errors_of_ranks, expand_option, run_app
from megatron_policysplit.cli.doctor import doctor
from megatron_policysplit.cli.model_commands import evaluate, generate
from megatron_policysplit.cli.options import ConfigPath, Overrides, check_output
from megatron_policysplit.errors import STOPPED, ConfigError
from megatron_policysplit.logs.streams import outlive_console

app = typer.Typer(
    help="Policy Split reinforcement learning of language models on Megatron-Core.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(
    convert.app,
    name="convert",
    short_help="Hugging Face to Megatron-Core and back; verify, inspect.",
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"policysplit {__version__}")
        raise typer.Exit()


@app.callback()
def policysplit(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


@app.command(cls=Command)
def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train, or go on with the run in run.dir.

    Starts the local ranks itself where the layout has more than one and neither torchrun nor srun
    has started them.

    Exit codes: 0 done; 1 failed; 2 bad input, nothing was started; 75 stopped by SIGTERM or SIGINT
    with its state saved, and the same command goes on.
    """
    outlive_console()
    with _exit_on_signals(), errors_of_ranks():
        code = run_training([config, *(overrides or [])])
    raise typer.Exit(code)


@app.command(cls=Command)
def serve(config: ConfigPath, overrides: Overrides = None) -> None:
    """Start SGLang servers here, for runs on other nodes.

    Such a run names them in rollout.addresses.

    Prints the address of each once it has generated a token, watches them, and ends them all on
    SIGTERM or SIGINT.
    """
    from megatron_policysplit.config.checks import check_config
    from megatron_policysplit.config.load import load_config

    outlive_console()
    with _exit_on_signals():
        run_config = load_config(config, overrides or [])
        check_config(run_config)
        from megatron_policysplit.serving.serve import serve as run_servers

        code = run_servers(run_config)
    raise typer.Exit(code)


def run_training(argv: list[str]) -> int:
    """Check the input, then train in this process or in local ranks.

    argv: the configuration file, then overrides `key=value`. Returns the exit code (see `train`).
    Raises a UserError for bad input. A rank that torchrun or srun started does not return.
    """
    from megatron_policysplit.config.load import load_config, world_size
    from megatron_policysplit.distributed.launch import free_port, launch, rank_environment
    from megatron_policysplit.distributed.rank_variables import check_world, started_environment
    from megatron_policysplit.training.preflight import preflight
    from megatron_policysplit.training.run_dir import locked_run_dir, prepare_run_dir, run_lock

    # The variables of torchrun or srun; None where neither started this process.
    rank_variables = started_environment(os.environ)
    os.environ.update(rank_variables or {})
    config = load_config(argv[0], argv[1:])
    if rank_variables:
        check_world(config, rank_variables)
    # One rank of a world that torchrun or srun started holds the run directory, and tries the
    # reward, for all.
    is_first = rank_variables is None or rank_variables["RANK"] == "0"
    if is_first:
        run_lock(config).check()
    summary = preflight(config, tries_reward=is_first)
    with ExitStack() as held:
        inherited = []
        if is_first:
            lock = held.enter_context(locked_run_dir(config))
            inherited = [lock.descriptor]
            for line in summary.lines(config):
                print(line, flush=True)
            prepare_run_dir(config)
        if not rank_variables and world_size(config) > 1:
            return launch(argv, world_size(config), inherited=inherited)
        os.environ.update(rank_variables or rank_environment(0, 1, free_port()))
        from megatron_policysplit.training import worker

        code = worker.main(argv)
    if rank_variables:
        worker.leave(code)  # without exit handlers, which a peer that is gone would block
    return code


@contextmanager
def _exit_on_signals() -> Iterator[None]:
    """Let SIGTERM and SIGINT end this process with exit code 75.

    Only until the ranks install their own handlers, which save first.
    """
    before = {
        number: signal.signal(number, _exit_stopped) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit_stopped(number: int, frame) -> None:
    sys.exit(STOPPED)


# Registered here, between `serve` and `report`: --help lists commands in this order.
app.command(cls=Command)(generate)
app.command("eval", cls=Command, short_help="Measure a model's accuracy and variety in its modes.")(
    evaluate
)


@app.command(cls=Command, short_help="Write one HTML page about one run or several.")
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run directories.")],
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html",
            callback=expand_option,
            help="Default: report.html in the (first) run.",
        ),
    ] = None,
) -> None:
    """Write one self-contained HTML page about one run, or about several side by side."""
    from megatron_policysplit.reports.page import is_page
    from megatron_policysplit.reports.run_report import write_report

    # A run is called by its directory's name, or by its path where two names are the same.
    names = [run.resolve().name for run in runs]
    runs_by_name = {
        name if names.count(name) == 1 else str(run): run
        for name, run in zip(names, runs, strict=True)
    }
    target = output or runs[0] / "report.html"
    # Without either the run itself is missing, and write_report says so.
    if output is not None or runs[0].is_dir():
        check_output(target, [], is_page)
    write_report(runs_by_name, target)
    print(target)


@app.command(
    cls=Command, short_help="Train several methods over several seeds, and report on them together."
)
def study(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="YAML file; see docs/study.md.")],
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Start nothing; report on what there is.")
    ] = False,
) -> None:
    """Train every method with every seed, what is finished never again, and write one report of
    all.

    Exit codes: as of `train`; 1 where a run failed, the others having gone on.
    """
    from megatron_policysplit.study.config import load_study

    outlive_console()
    from megatron_policysplit.study.report import check_report_files, write_study_report

    definition, code = load_study(study), 0
    check_report_files(definition)
    if not report_only:
        from megatron_policysplit.study.runner import run_study

        code = run_study(definition, say=partial(print, flush=True))
    for path in write_study_report(definition):
        print(path)
    raise typer.Exit(code)


@app.command("config", cls=Command, short_help="Check a configuration; print it and all prompts.")
def show_config(config: ConfigPath, overrides: Overrides = None) -> None:
    """Check all that `train` checks before it starts, and print the resolved configuration, every
    mode's prompt of the first question, and what `train` prints at its start.

    Writes nothing and starts nothing. Of the first 1,000 questions the prompts are built, too.
    """
    from megatron_policysplit.config.load import load_config, to_yaml
    from megatron_policysplit.training.preflight import preflight

    run_config = load_config(config, overrides or [])
    summary = preflight(run_config)
    from megatron_policysplit.training.prompt_check import check_prompts
    from megatron_policysplit.training.run_dir import run_lock

    prompts = check_prompts(run_config)
    print(to_yaml(run_config), end="")
    for mode, text in prompts.first.items():
        print(f"\n--- {mode.value} prompt of the first question ---\n{text}")
    print("\n--- train would start ---")
    for line in replace(summary, warnings=[]).lines(run_config):
        print(line)
    print(prompts.line(run_config.data))
    for warning in summary.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    # Last, for it may wait for a sign of life from another machine.
    try:
        run_lock(run_config).check()
    except ConfigError as error:
        print(f"warning: {error}", file=sys.stderr)


app.command(cls=Command, short_help="Check this machine, and nodes, before a run.")(doctor)


def main() -> None:
    """Entry point of `policysplit`."""
    run_app(app)


if __name__ == "__main__":
    main()
