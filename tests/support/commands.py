"""Commands as users run them: in this process, or in ones that have imported torch before they start."""

import os
import runpy
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence

from tests.support.dist import Surroundings, forking_context


def invoke(*arguments: object) -> str:
    """Standard output of a `policysplit` command that succeeds, in this process; its error is raised."""
    from typer.testing import CliRunner

    from megatron_policysplit.cli import main as cli

    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def run_module(
    module: str, arguments: Sequence[str], environ: Mapping[str, str] = os.environ
) -> subprocess.CompletedProcess[str]:
    """What `python -W ignore -m MODULE ARGUMENTS` prints, and its exit code.

    Not for what depends on the start of the interpreter: its time, imports, standard input.
    """
    return _run(_main_of_module, (module, *arguments), environ)


def run_code(code: str) -> subprocess.CompletedProcess[str]:
    """What `python -c CODE` prints, and its exit code; atexit's functions are not called."""
    return _run(_exec, (code,), os.environ)


def _run(function: Callable, arguments: Sequence[str], environ: Mapping[str, str]):
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        surroundings = Surroundings.of(environ, stdout.fileno(), stderr.fileno())
        process = forking_context().Process(target=function, args=(surroundings, *arguments))
        process.start()
        process.join()
        printed = []
        for file in (stdout, stderr):
            file.seek(0)
            printed.append(file.read())
    return subprocess.CompletedProcess(arguments, process.exitcode, *printed)


def _main_of_module(surroundings: Surroundings, module: str, *arguments: str) -> None:
    surroundings.take_over()
    warnings.simplefilter("ignore")
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _exec(surroundings: Surroundings, code: str) -> None:
    surroundings.take_over()
    exec(code, {"__name__": "__main__"})
