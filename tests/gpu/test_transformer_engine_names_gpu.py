"""Models of Transformer Engine's own layers: the names, shapes and stored keys that the mapping tables say.

With POLICYSPLIT_CAPTURE=FILE.json the lists that were found are written there, with the versions they are of.
"""

import importlib.metadata
import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch

from checkpoints_conv import read_hf_config
from checkpoints_conv.hf_to_megatron import hf_to_megatron
from tests.support.dist import run_distributed
from tests.support.hf_models import FAMILIES, make_model
from tests.support.megatron_models import capture, expected_capture

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine"),
]


@pytest.fixture(scope="module")
def captured():
    """The lists by family, filled by the tests."""
    models = {}
    yield models
    if file := os.environ.get("POLICYSPLIT_CAPTURE"):
        versions = {name: importlib.metadata.version(name) for name in ("transformer-engine", "megatron-core")}
        Path(file).write_text(json.dumps({"versions": versions, "models": models}, indent=1) + "\n")


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_have_the_names_shapes_and_keys_of_the_tables(tmp_path, captured, family):
    path = make_model(tmp_path / family, family, tied=False, num_hidden_layers=2)
    hf_to_megatron(path, f"{path}-megatron", dtype="bfloat16", allow_downcast=True)
    (captured[family],) = run_distributed(capture, 1, str(path))
    assert captured[family] == expected_capture(read_hf_config(path))
