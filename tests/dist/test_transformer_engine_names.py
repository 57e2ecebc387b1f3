"""Names, shapes and stored keys of Transformer Engine's layers, by Megatron-Core's own code around stand-ins for them.

Models are built from Megatron-Core's Transformer Engine spec in processes where, before Megatron-Core
looks for it, `transformer_engine` is `tests/support/fake_transformer_engine.py`; they are loaded,
exported and saved without a GPU.
"""

import pytest
import torch

from checkpoints_conv import read_hf_config
from checkpoints_conv.hf_to_megatron import hf_to_megatron
from checkpoints_conv.megatron_reader import MegatronCheckpoint
from checkpoints_conv.megatron_to_hf import megatron_to_hf
from checkpoints_conv.stored import extra_state_keys
from tests.support.conversion import assert_same_model, tensors_of
from tests.support.dist import run_distributed
from tests.support.hf_models import FAMILIES, make_model
from tests.support.megatron_models import (
    Shape,
    assert_same_parameters,
    capture,
    expected_capture,
    expected_parameters,
    expected_tensors,
    load_as_stock_megatron_does,
    loaded_model,
    nan_model,
    save_as_stock_megatron_does,
    start,
    stored_by,
)

MODELS = [(family, tied) for family in FAMILIES for tied in (False, True)]
MOE = "qwen3_moe"
SHAPES = [Shape(), Shape(tensor=2), Shape(pipeline=2), Shape(expert=2), Shape(tensor=2, expert=2)]
VOCAB = 131


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Hugging Face directories by (family, tied); beside each, -megatron: converted."""
    root = tmp_path_factory.mktemp("models")
    paths = {}
    for family, tied in MODELS:
        path = make_model(root / f"{family}-{tied}", family, tied=tied, vocab=VOCAB, num_hidden_layers=2)
        hf_to_megatron(path, f"{path}-megatron")
        paths[family, tied] = str(path)
    return paths


@pytest.fixture(scope="module")
def around_stand_ins(models, tmp_path_factory):
    """What `inspect` gives, by shape, and `capture`: each the answers of its world, or its error."""
    root = tmp_path_factory.mktemp("saved")
    worlds = {"capture": (capture, 1, models[MOE, False])}
    for shape in SHAPES:
        directory = root / str(shape)
        directory.mkdir()
        worlds[str(shape)] = (inspect, shape.world, chosen(models, shape), shape, str(directory))
    (outcomes,) = run_distributed(run_worlds, 1, worlds, start="spawn", timeout_seconds=240)
    return outcomes | {"root": root}


def chosen(models, shape):
    return [path for (family, _), path in models.items() if shape.expert == 1 or family == MOE]


def run_worlds(rank, worlds):
    """Each world as forks of this process, the only one that imports Megatron-Core around the stand-ins."""
    from tests.support import fake_transformer_engine

    fake_transformer_engine.install()
    from tests.support import preload  # noqa: F401

    return {name: answers_or_error(*world) for name, world in worlds.items()}


def answers_or_error(function, world_size, *args):
    try:
        return run_distributed(function, world_size, *args, start="fork")
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tables_and_stored_keys_are_those_of_the_layer_specs(models, around_stand_ins, tmp_path, shape):
    ranks = around_stand_ins[str(shape)]
    assert isinstance(ranks, list), ranks
    directory = around_stand_ins["root"] / str(shape)
    for number, path in enumerate(chosen(models, shape)):
        hf_config = read_hf_config(path)
        stored = [rank[number] for rank in ranks]
        tensors = {key: size for rank in stored for key, size in rank.tensors.items()}
        assert tensors == expected_tensors(hf_config, shape.tensor, copies=False)
        assert set().union(*(rank.extra_states for rank in stored)) == set(extra_state_keys(hf_config))
        saved = directory / f"saved-{number}"
        assert not MegatronCheckpoint(saved, path).copies
        megatron_to_hf(saved, tmp_path / f"back-{number}", hf=path)
        assert_same_model(path, tmp_path / f"back-{number}")


def inspect(rank, paths, shape, directory):
    """What each model would store on this rank, after all else that is said about it has been checked."""
    from tests.support import fake_transformer_engine

    layout = start(shape)
    from megatron.core import parallel_state

    from checkpoints_conv import find_architecture
    from megatron_policysplit.actor.megatron_weights import load_megatron_weights
    from megatron_policysplit.actor.weights import export_weights, global_parameters

    stored = []
    for number, path in enumerate(paths):
        hf_config = read_hf_config(path)
        model = loaded_model(path, torch.float32, transformer_engine=True)
        assert isinstance(model.decoder.layers[0].self_attention.linear_qkv, fake_transformer_engine.LayerNormLinear)
        named = global_parameters(model, find_architecture(hf_config).sizes(hf_config))
        expert_rank = parallel_state.get_expert_model_parallel_rank()
        assert {name: tuple(parameter.shape) for name, parameter in named.items()} == expected_parameters(
            hf_config, shape, layout.pipeline_rank, expert_rank
        )
        for load in (load_as_stock_megatron_does, load_megatron_weights):
            converted = nan_model(path, torch.float32, transformer_engine=True)
            load(converted, f"{path}-megatron")
            assert assert_same_parameters(converted, model) == len(named)
        files = tensors_of(path)
        exported = dict(export_weights(model, hf_config, "every_rank"))
        assert set(exported) == set(files)
        assert all(torch.equal(tensor, files[name]) for name, tensor in exported.items())
        stored.append(stored_by(model))
        save_as_stock_megatron_does(model, f"{directory}/saved-{number}")
    return stored


def test_a_capture_of_the_layers_is_what_the_tables_say(models, around_stand_ins):
    """What tests/gpu does with Transformer Engine itself."""
    assert isinstance(around_stand_ins["capture"], list), around_stand_ins["capture"]
    (captured,) = around_stand_ins["capture"]
    assert captured == expected_capture(read_hf_config(models[MOE, False]))
    assert captured["parameters"]["decoder.layers.1.mlp.experts.linear_fc1.weight7"] == [80, 64]
    assert captured["stored"]["decoder.layers.mlp.experts.experts.linear_fc1.weight"] == [2, 8, 80, 64]
    assert "decoder.layers.mlp.experts.experts.linear_fc2._extra_state/shard_1.7_2.8" in captured["extra_states"]


def test_layers_of_megatron_itself_find_what_they_look_for(models):
    """Those of Megatron-Core's local spec, unchanged; they keep the norm before experts under another key.

    The actor's, which are the same, store what Transformer Engine's do, so that checkpoints load with either.
    """
    (found,) = run_distributed(load_into_local_layers, 1, list(models.values()))
    for (family, _), path, (stored, actor) in zip(models, models.values(), found, strict=True):
        hf_config = read_hf_config(path)
        assert actor.tensors == expected_tensors(hf_config, 1, copies=False)
        assert actor.extra_states == stored.extra_states
        converted = expected_tensors(hf_config, 1, copies=True)
        assert stored.tensors.items() <= converted.items()
        assert stored.extra_states < set(extra_state_keys(hf_config))
        unused = set(converted) - set(stored.tensors)
        assert unused == ({"decoder.layers.pre_mlp_layernorm.weight"} if family == MOE else set())


def load_into_local_layers(rank, paths):
    start()
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from megatron_policysplit.actor import model as actor_model

    expected = [loaded_model(path, torch.float32) for path in paths]
    actor_model._local_spec = lambda config: get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    stored = []
    for path, wanted in zip(paths, expected, strict=True):
        stock = nan_model(path, torch.float32)
        load_as_stock_megatron_does(stock, f"{path}-megatron")
        assert_same_parameters(stock, wanted)
        stored.append((stored_by(stock), stored_by(wanted)))
    return stored
