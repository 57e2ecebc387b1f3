"""`checkpoints_conv` without megatron_policysplit: its folder alone, in a directory of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.conversion import assert_same_model, make_tree
from tests.support.hf_models import make_model

PACKAGE = Path(__file__).resolve().parents[2] / "checkpoints_conv"
# Python runs it at start-up. The environment of the tests has both packages, which nobody may find here.
REFUSE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("megatron_policysplit", "megatron"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
"""
ROUND_TRIP = """
import importlib, pkgutil, sys
import checkpoints_conv

for module in pkgutil.iter_modules(checkpoints_conv.__path__):
    print(importlib.import_module("checkpoints_conv." + module.name).__file__)
from checkpoints_conv.hf_to_megatron import hf_to_megatron
from checkpoints_conv.megatron_to_hf import megatron_to_hf
from checkpoints_conv.verify import verify

hf_to_megatron("hf", "megatron")
verify("hf", "megatron")
megatron_to_hf("megatron", "back")
assert not {"megatron", "megatron_policysplit"} & set(sys.modules)
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A directory with a copy of the package."""
    directory = tmp_path_factory.mktemp("alone")
    shutil.copytree(PACKAGE, directory / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    (directory / "sitecustomize.py").write_text(REFUSE)
    return directory


def python(directory, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(directory)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)


def test_every_module_imports_and_every_bit_survives(alone):
    make_tree(make_model(alone / "hf", "qwen3_moe", tied=False, num_hidden_layers=2))
    result = python(alone, "-c", ROUND_TRIP)
    assert result.returncode == 0, result.stderr
    imported = {Path(file) for file in result.stdout.split()}
    assert imported == {file for file in (alone / PACKAGE.name).glob("*.py") if file.name != "__init__.py"}
    assert_same_model(alone / "hf", alone / "back")


@pytest.mark.parametrize("arguments", [(), ("--help",), ("inspect", "hf")])
def test_the_command_line_says_what_it_lacks(alone, arguments):
    result = python(alone, "-m", "checkpoints_conv", *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "error: the commands of python -m checkpoints_conv need megatron_policysplit, which is not installed; "
        "install it, or call checkpoints_conv.hf_to_megatron.hf_to_megatron and the like from Python\n"
    )
