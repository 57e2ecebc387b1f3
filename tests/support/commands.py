"""Commands as users run them, in processes that have imported torch before they start."""

import os
import runpy
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence

from tests.support.dist import Surroundings, Variables, forking_context


def run_module(
    module: str, arguments: Sequence[str], environ: Variables = os.environ
) -> subprocess.CompletedProcess[str]:
    """What `python -W ignore -m MODULE ARGUMENTS` prints, and its exit code.

    Not for what depends on the start of the interpreter: its time, imports, standard input.
    """
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        surroundings = Surroundings.of_this_process(environ, stdout, stderr)
        process = forking_context().Process(target=_main, args=(surroundings, module, arguments))
        process.start()
        process.join()
        printed = []
        for file in (stdout, stderr):
            file.seek(0)
            printed.append(file.read())
    return subprocess.CompletedProcess([module, *arguments], process.exitcode, *printed)


def _main(surroundings: Surroundings, module: str, arguments: Sequence[str]) -> None:
    surroundings.take_over()
    warnings.simplefilter("ignore")
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
