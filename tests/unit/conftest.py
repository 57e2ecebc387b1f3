"""A small model and what conversion makes of it, for tests that damage one of them."""

import pytest

from checkpoints_conv.hf_to_megatron import hf_to_megatron
from tests.support.conversion import make_tree
from tests.support.hf_models import make_model


@pytest.fixture(params=("qwen3", "qwen3_moe"))
def family(request):
    return request.param


@pytest.fixture
def original(family, tmp_path):
    """A small untied model that a test may damage."""
    return make_tree(make_model(tmp_path / "hf", family, tied=False, num_hidden_layers=2))


@pytest.fixture
def converted(original, tmp_path):
    hf_to_megatron(original, tmp_path / "megatron")
    return tmp_path / "megatron"
