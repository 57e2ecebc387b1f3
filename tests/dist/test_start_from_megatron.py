"""A run that starts from a torch_dist checkpoint has that checkpoint's weights, at any layout."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_conv.hf_to_megatron import hf_to_megatron
from checkpoints_conv.megatron_to_hf import megatron_to_hf
from tests.support.conversion import tensors_of
from tests.support.dist import run_distributed
from tests.support.hf_models import make_model

VOCAB = 131  # odd, so that tensor parallelism pads it


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "hf", "qwen3", tied=False, vocab=VOCAB)


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2)])
def test_the_actor_starts_with_the_weights_of_the_checkpoint(model, tmp_path, tensor, pipeline):
    """A converted one at one layout, changed and saved; the training checkpoint at the other, exported."""
    converted = tmp_path / "converted"
    hf_to_megatron(model, converted)
    ranks = tensor * pipeline
    run_distributed(start_change_save, ranks, str(model), str(converted), str(tmp_path / "run"), tensor, pipeline)
    trained = tmp_path / "run" / "checkpoints" / "step_000003"
    file = tmp_path / "exported.safetensors"
    run_distributed(start_export, ranks, str(model), str(trained), pipeline, tensor, str(file))
    megatron_to_hf(trained, tmp_path / "back", hf=model)
    original, changed, found = tensors_of(model), tensors_of(tmp_path / "back"), load_file(file)
    assert set(found) == set(original) == set(changed)
    for name, tensor in found.items():
        assert torch.equal(tensor, original[name] * 2) and torch.equal(tensor, changed[name]), name


def actor_of(model, megatron, tensor, pipeline):
    from checkpoints_conv import read_hf_config
    from megatron_policysplit.actor.parallel import initialize
    from megatron_policysplit.actor.actor import Actor
    from megatron_policysplit.config import Config, ParallelConfig

    config = Config()
    config.model.path, config.model.megatron, config.model.dtype = model, megatron, "float32"
    config.parallel = ParallelConfig(tensor=tensor, pipeline=pipeline, data=1)
    return Actor(config, read_hf_config(model), initialize(config.parallel, seed=1, timeout_seconds=60))


def start_change_save(rank, model, converted, run, tensor, pipeline):
    from megatron_policysplit.actor import checkpoint
    from megatron_policysplit.actor.weights import load_weights

    actor = actor_of(model, converted, tensor, pipeline)
    started = [parameter.detach().clone() for parameter in actor.model.parameters()]
    load_weights(actor.model, model)
    for parameter, value in zip(actor.model.parameters(), started, strict=True):
        assert torch.equal(parameter, value)
        parameter.data.mul_(2)
    checkpoint.save(actor, checkpoint.TrainerState(step=3), Path(run) / "checkpoints", keep=1)


def start_export(rank, model, megatron, tensor, pipeline, file):
    from megatron_policysplit.actor.weights import export_weights

    actor = actor_of(model, megatron, tensor, pipeline)
    weights = dict(export_weights(actor.model, actor.hf_config, "leader"))
    if weights:
        save_file(weights, file)
