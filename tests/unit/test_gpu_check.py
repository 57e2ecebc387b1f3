"""The runner of `make gpu-check`, with checks that pass, fail, hang, die and are skipped, and a real one."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.gpu_check import __main__ as program
from benchmarks.gpu_check.checks import CHECKS
from benchmarks.gpu_check.runner import FAIL, PASS, SKIP, Check, Options, Result, run_check, run_checks, summary
from tests.support.e2e import ROOT

STAND_INS = """
import os, signal, subprocess, sys, time
from benchmarks.gpu_check.runner import Skip

def good(options): return {"tokens/s": 7, "directory": options.directory}
def wrong(options): assert 1 == 2, "one is not two"
def broken(options): import no_such_module
def without(options): raise Skip("there is no GPU")
def killed(options):
    print("last words", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
def hangs(options):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(child.pid, flush=True)
    time.sleep(600)
def leaves(options):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    return {"pid": child.pid}
"""


@pytest.fixture
def environ(tmp_path):
    (tmp_path / "stand_ins.py").write_text(STAND_INS)
    return dict(os.environ) | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}


@pytest.fixture
def run(tmp_path, environ):
    def call(name, seconds=60.0):
        check = Check(name, "a stand-in", f"stand_ins:{name}", seconds)
        return run_check(check, Options(str(tmp_path / "checks" / name)), environ)

    return call


def gone(pid):
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_a_check_that_passes(run, tmp_path):
    result = run("good")
    assert (result.status, result.reason) == (PASS, "")
    assert result.values == {"tokens/s": 7, "directory": str(tmp_path / "checks" / "good")}


@pytest.mark.parametrize(
    "name, status, reason",
    [
        ("wrong", FAIL, "AssertionError: one is not two"),
        ("broken", FAIL, "ModuleNotFoundError: No module named 'no_such_module'"),
        ("without", SKIP, "there is no GPU"),
    ],
)
def test_a_check_that_does_not(run, name, status, reason):
    result = run(name)
    assert (result.status, result.reason, result.values) == (status, reason, {})


def test_a_check_that_dies(run, tmp_path):
    log = tmp_path / "checks" / "killed" / "output.log"
    assert run("killed").reason == f"ended by SIGSEGV: last words ({log})"


def test_a_check_that_hangs_ends_with_what_it_started(run, tmp_path):
    result = run("hangs", seconds=5)
    log = tmp_path / "checks" / "hangs" / "output.log"
    child = int(log.read_text())
    assert (result.status, result.reason) == (FAIL, f"took longer than 5 s: {child} ({log})")
    assert gone(child)


def test_nothing_outlives_a_check_that_passes(run):
    assert gone(run("leaves").values["pid"])


def test_checks_go_on_after_a_failure(tmp_path, environ):
    names, told = ("wrong", "without", "good"), []
    checks = [Check(name, "a stand-in", f"stand_ins:{name}", 60) for name in names]
    results = run_checks(checks, tmp_path / "all", environ=environ, tell=told.append)
    assert [result.status for result in results] == [FAIL, SKIP, PASS]
    assert [line.split()[:2] for line in told] == [[FAIL, "wrong"], [SKIP, "without"], [PASS, "good"]]
    assert summary(results) == "1 passed, 1 failed, 1 skipped: wrong failed"


def test_a_line():
    assert str(Result("fp8", PASS, "", 3.25, {"error": "0.03"})) == f"PASS  {'fp8':<26}    3.2 s  error 0.03"


def test_the_table_of_checks():
    import importlib

    assert len({check.name for check in CHECKS}) == len(CHECKS)
    for check in CHECKS:
        module, function = check.function.split(":")
        assert callable(getattr(importlib.import_module(module), function)), check.name


def test_which_checks_run():
    assert [check.name for check in program.chosen(["fp8", "head"], ["head"])] == ["fp8"]
    with pytest.raises(SystemExit, match="there is no check fp16; there are head, train_local, "):
        program.chosen(["fp16"], [])


def test_the_command(tmp_path):
    """On a machine without a GPU; its report, and what it says about one that is needed."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu_check",
        "--only",
        "bandwidth",
        "fp8",
        "--json",
        str(tmp_path / "r"),
    ]
    environ = dict(os.environ) | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "--directory", str(tmp_path / "d")], cwd=ROOT, env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "1 passed, 0 failed, 1 skipped"
    report = json.loads(Path(tmp_path / "r").read_text())
    fp8, bandwidth = report["checks"]
    assert (fp8["name"], fp8["status"], fp8["reason"]) == ("fp8", SKIP, "there is no GPU")
    assert bandwidth["status"] == PASS and bandwidth["values"]["device"] == "CPU"
    assert report["versions"]["torch"] and report["date"]
