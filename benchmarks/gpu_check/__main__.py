"""Shows on one GPU what no machine without one can show.

    python -m benchmarks.gpu_check [--only NAME ...] [--skip NAME ...] [--list] [--json FILE]
                                   [--directory DIR] [--sglang-python PYTHON]

Each check runs in a process of its own with a time limit, the most important one first, and prints
PASS, FAIL or SKIP with the reason; the others go on after a failure. The exit code is 1 if any
failed. Without a GPU it runs what means something there. What the checks write stays in --directory
(a temporary one if it is not given).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from dataclasses import asdict
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.gpu_check.checks import CHECKS
from benchmarks.gpu_check.runner import FAIL, run_checks, summary

_PACKAGES = ("torch", "triton", "megatron-core", "transformer-engine", "transformers", "sglang")


def chosen(only: list[str], skip: list[str]) -> list:
    """The checks to run, in their order. Raises SystemExit for a name that is none's."""
    names = [check.name for check in CHECKS]
    for name in [*only, *skip]:
        if name not in names:
            raise SystemExit(f"error: there is no check {name}; there are {', '.join(names)}")
    return [c for c in CHECKS if (not only or c.name in only) and c.name not in skip]


def versions() -> dict[str, str]:
    """What is installed, by name."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--skip", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--list", action="store_true", help="print the checks and end")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there")
    parser.add_argument("--directory", type=Path, help="what checks write stays there")
    parser.add_argument("--sglang-python", help="interpreter of an environment with SGLang")
    given = parser.parse_args(arguments)
    checks = chosen(given.only, given.skip)
    if given.list:
        for check in checks:
            print(f"{check.name:<26} {check.seconds:4g} s at most  {check.shows}")
        return 0
    directory = given.directory or Path(tempfile.mkdtemp(prefix="policysplit-gpu-check-"))
    # One cache for all: compiling and tuning the LM head's kernels is paid once.
    environ = dict(os.environ) | {"TRITON_CACHE_DIR": str(directory / "triton")}
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.getcwd(), environ.get("PYTHONPATH")]))
    results = run_checks(
        checks,
        directory,
        environ=environ,
        sglang_python=given.sglang_python,
        tell=lambda line: print(line, flush=True),
    )
    print(summary(results))
    if given.json is not None:
        report = {
            "date": date.today().isoformat(),
            "machine": platform.platform(),
            "versions": versions(),
            "checks": [asdict(result) for result in results],
        }
        given.json.write_text(json.dumps(report, indent=2) + "\n")
    return int(any(result.status == FAIL for result in results))


if __name__ == "__main__":
    sys.exit(main())
