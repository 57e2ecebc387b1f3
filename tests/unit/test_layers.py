"""Which layers `model.layers` means, and what is said where Transformer Engine cannot be had."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_policysplit.actor import layers
from megatron_policysplit.actor.layers import LayerChoice, choose_layers
from megatron_policysplit.distributed import device
from megatron_policysplit.errors import ConfigError
from tests.support.dist import run_distributed

ROOT = Path(__file__).parents[2]


@pytest.fixture
def machine(monkeypatch):
    def has(*, gpu: bool, problem: str | None) -> None:
        monkeypatch.setattr(layers, "gpu_count", lambda: int(gpu))
        monkeypatch.setattr(layers, "transformer_engine_problem", lambda: problem if gpu else "there is no GPU")

    return has


MISSING = "Transformer Engine is not installed"


@pytest.mark.parametrize(
    "wanted, gpu, problem, choice",
    [
        ("auto", False, None, LayerChoice(False, "model.layers=auto: there is no GPU")),
        ("auto", True, MISSING, LayerChoice(False, f"model.layers=auto: {MISSING}")),
        ("auto", True, None, LayerChoice(True, "model.layers=auto: it is installed and there is a GPU")),
        ("local", True, None, LayerChoice(False, "model.layers=local")),
        ("transformer_engine", True, None, LayerChoice(True, "model.layers=transformer_engine")),
    ],
)
def test_choice(machine, wanted, gpu, problem, choice):
    machine(gpu=gpu, problem=problem)
    assert choose_layers(wanted) == choice


def test_what_the_log_says():
    assert str(LayerChoice(True, "model.layers=transformer_engine")) == (
        "layers: Transformer Engine's (model.layers=transformer_engine)"
    )
    assert str(LayerChoice(False, "model.layers=auto: there is no GPU")) == (
        "layers: Megatron-Core's own (model.layers=auto: there is no GPU)"
    )


@pytest.mark.parametrize(
    "gpu, problem, said",
    [
        (False, None, "there is no GPU; its layers run on a GPU only"),
        (True, MISSING, f"{MISSING}; install it beside this torch (pip install --no-build-isolation "),
    ],
)
def test_transformer_engine_that_cannot_be_had(machine, gpu, problem, said):
    machine(gpu=gpu, problem=problem)
    with pytest.raises(ConfigError) as error:
        choose_layers("transformer_engine")
    assert str(error.value).startswith(f"model.layers=transformer_engine, but {said}")
    assert " set model.layers=auto or local (`policysplit doctor` " in str(error.value)


CORE = "transformer_engine/__init__.py"
TORCH_PART = "transformer_engine/pytorch/__init__.py"
METADATA = "transformer_engine_torch-2.11.0.dist-info/METADATA"


@pytest.mark.parametrize(
    "files, problem",
    [
        ({}, MISSING),
        ({CORE: "", TORCH_PART: "", METADATA: "Name: transformer_engine_torch\nVersion: 2.11.0\n"}, None),
        # The wheel of the core installs both folders, and its loader asks for the other distribution.
        (
            {CORE: "", TORCH_PART: "assert False, 'Could not find\\nthe library for torch.'"},
            "Transformer Engine's part for torch is not installed (Could not find the library for torch.)",
        ),
        (
            {
                CORE: "",
                TORCH_PART: "raise ImportError('undefined symbol: _ZN3c104cuda')",
                METADATA: "Name: transformer_engine_torch\nVersion: 2.11.0\n",
            },
            "Transformer Engine cannot be imported (undefined symbol: _ZN3c104cuda)",
        ),
    ],
    ids=["absent", "good", "core alone", "for another torch"],
)
def test_why_it_cannot_be_imported(tmp_path, files, problem):
    if METADATA not in files and importlib.util.find_spec("transformer_engine"):
        pytest.skip("Transformer Engine is installed here")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    script = "from megatron_policysplit.distributed import device; device.on_cpu = lambda: False; "
    script += "print(device.transformer_engine_problem())"
    done = subprocess.run(
        [sys.executable, "-c", script], env={"PYTHONPATH": f"{tmp_path}:{ROOT}"}, capture_output=True, text=True
    )
    assert done.stdout == f"{problem}\n", done.stderr


def agree(rank):
    from unittest import mock

    from megatron_policysplit.actor.parallel import initialize
    from megatron_policysplit.config import ParallelConfig

    layout = initialize(ParallelConfig(data=2), seed=0, timeout_seconds=60)
    with mock.patch.object(layers, "transformer_engine_problem", lambda: MISSING if rank == 1 else None):
        alike = layers.agree_on_layers("local", layout)
        with pytest.raises(ConfigError) as error:
            layers.agree_on_layers("auto", layout)
    return alike.transformer_engine, str(error.value)


def test_ranks_take_the_same_layers():
    said = f"rank 1 cannot have the layers of other ranks (model.layers=auto: {MISSING}); give all nodes the same"
    for transformer_engine, error in run_distributed(agree, 2):
        assert not transformer_engine and error.startswith(said)


def test_a_gpu_that_torch_cannot_use(monkeypatch):
    monkeypatch.setattr(device.Path, "exists", lambda path: str(path) == "/dev/nvidia0")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert device.unused_gpu() == (
        f"training on the CPU: this machine has an NVIDIA GPU, but torch {torch.__version__} is a build for CPUs; "
        "install one for CUDA (docs/gpu.md)"
    )
    monkeypatch.setattr(torch.version, "cuda", "13.0")  # a GPU that is hidden is meant to be
    assert device.unused_gpu() is None
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(device.Path, "exists", lambda path: False)
    assert device.unused_gpu() is None


@pytest.mark.parametrize(
    "chosen, said",
    [
        ({}, None),
        ({"use_flash_attention": True, "flash_attention_backend": "2.7.4"}, "FlashAttention 2.7.4"),
        ({"use_fused_attention": True, "fused_attention_backend": 1}, "cuDNN's fused attention (1)"),
        ({"use_unfused_attention": True}, "Transformer Engine's unfused attention, which holds all scores"),
    ],
)
def test_the_attention_that_transformer_engine_chose(monkeypatch, chosen, said):
    name = "transformer_engine.pytorch.attention.dot_product_attention.dot_product_attention"
    module = type(sys)(name)
    module._attention_backends = chosen
    monkeypatch.setitem(sys.modules, name, module)
    assert layers.transformer_engine_attention() == said
