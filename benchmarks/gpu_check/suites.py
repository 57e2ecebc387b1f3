"""Checks that are tests of tests/gpu."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu_check.runner import Options


class _Counter:
    """A plugin of pytest that counts how tests end."""

    def __init__(self) -> None:
        self.passed, self.failed = 0, []

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            self.failed.append(report.nodeid.rpartition("::")[2])
        elif report.when == "call" and report.passed:
            self.passed += 1


def _run(name: str) -> dict[str, Any]:
    """Run a file of tests/gpu; raises AssertionError naming the tests that fail."""
    import pytest

    counter = _Counter()
    arguments = ["-p", "no:cacheprovider", "-m", "gpu", f"tests/gpu/test_{name}.py"]
    code = pytest.main(arguments, plugins=[counter])
    assert not counter.failed, f"{len(counter.failed)} failed: {', '.join(counter.failed)}"
    assert code == 0 and counter.passed, f"pytest ended with {int(code)}, {counter.passed} passed"
    return {"tests": counter.passed}


def head(options: Options) -> dict[str, Any]:
    return _run("triton_head_gpu")


def actor(options: Options) -> dict[str, Any]:
    return _run("actor_on_gpu")


def offload(options: Options) -> dict[str, Any]:
    return _run("colocated_memory")


def layer_names(options: Options) -> dict[str, Any]:
    return _run("transformer_engine_names_gpu")
