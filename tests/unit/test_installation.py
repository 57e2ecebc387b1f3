"""The documented ways to install on machines with GPUs: what they pin fits together and is what the text says."""

import importlib.metadata
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "gpu.md").read_text()
PINS = dict(
    line.split("==")
    for line in (ROOT / "constraints-gpu.txt").read_text().splitlines()
    if "==" in line and line[0] != "#"
)


def requirements(extra):
    """What the package requires with an extra ("" for none) and not without it."""
    texts = [Requirement(text) for text in importlib.metadata.requires("megatron_policysplit")]
    if not extra:
        return [requirement for requirement in texts if requirement.marker is None]
    return [
        requirement
        for requirement in texts
        if requirement.marker is not None
        and requirement.marker.evaluate({"extra": extra, "python_version": "3.12"})
        and not requirement.marker.evaluate({"extra": "", "python_version": "3.12"})
    ]


def test_pins_are_what_the_package_takes():
    ranges = {requirement.name: requirement.specifier for requirement in requirements("") + requirements("gpu")}
    for name in ("torch", "triton", "megatron-core"):
        assert ranges[name].contains(PINS[name]), name


def test_the_parts_of_transformer_engine_are_of_one_release():
    parts = {version for name, version in PINS.items() if name.startswith("transformer-engine")}
    assert len(parts) == 1 and len([name for name in PINS if name.startswith("transformer-engine")]) == 3


def test_the_extra_asks_for_nothing_that_pip_compiles_against_a_torch_of_its_own():
    assert not [r.name for r in requirements("gpu") if "transformer" in r.name or r.name in ("apex", "flash-attn")]


@pytest.mark.parametrize(
    "text",
    ["torch {torch}", "Triton {triton}", "Megatron-Core {megatron-core}", "Transformer Engine {transformer-engine}"],
)
def test_the_text_names_the_pins(text):
    assert text.format(**PINS) in DOCS
    assert f"its release with torch {PINS['torch']} is {PINS['sglang']}" in DOCS


def test_the_list_for_an_image_is_complete():
    """All that the package requires, but for what an image of PyTorch has."""
    listed = re.search(r"pip install omegaconf.*?\n\n", DOCS, re.DOTALL)[0]
    for requirement in requirements(""):
        if requirement.name not in ("torch", "numpy", "jinja2", "megatron-core"):
            assert re.search(rf"[\s']{requirement.name}\b", listed), requirement.name
    assert "megatron-core>=0.17,<0.20" in DOCS
