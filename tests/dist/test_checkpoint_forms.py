"""Checkpoints that another optimizer, other layers or another kind of device saved.

Adam is torch's, or a stand-in with the rules of Transformer Engine's; the optimizer plain or distributed; weights in
float32, or in bfloat16 with master weights.
"""

import contextlib
import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support import fused_adam
from tests.support.dist import run_distributed
from tests.support.hf_models import make_model
from tests.support.training_cases import CASES, SEED, VOCAB, update_batch

ADAMS = {"torch": contextlib.nullcontext, "fused": fused_adam.installed}
FORMS = list(product(ADAMS, (False, True)))  # Adam, distributed
LAYOUTS = [(1, 1, 2, 1), (2, 1, 1, 1)]  # TP, PP, DP, EP
(CASE,) = [case for case in CASES if case.name == "distributed_optimizer"]


def layout_of(shape):
    from megatron_policysplit.actor.parallel import initialize
    from megatron_policysplit.config import ParallelConfig

    tensor, pipeline, data, expert = shape
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline, data=data, expert=expert, sequence=tensor > 1)
    return initialize(parallel, seed=1, timeout_seconds=60)


def make_actor(layout, path, distributed, dtype):
    from checkpoints_conv import read_hf_config
    from megatron_policysplit.actor.actor import Actor

    case = replace(CASE, settings={**CASE.settings, "train.distributed_optimizer": distributed})
    config = case.config(path)
    config.model.dtype = dtype
    return Actor(config, read_hf_config(path), layout)


def train(actor, batch):
    rows = CASE.rows(batch) if actor.layout.is_leader else []
    placed = actor.place(rows, CASE.live(rows, actor.config), seed=SEED + batch)
    update_batch(actor, placed, CASE.builder(rows, actor.log_probs(placed), placed, actor.config))


def exported(actor):
    from megatron_policysplit.actor.weights import export_weights

    weights = export_weights(actor.model, actor.hf_config, "every_rank")
    return {name: tensor.detach().float().numpy().copy() for name, tensor in weights}


def place(root, adam, distributed, dtype):
    return Path(root) / f"{adam}-{distributed}-{dtype}"


def save_all(rank, shape, path, root, dtypes):
    """In every form: a batch trained, a checkpoint saved, another batch trained. The weights at both points."""
    from megatron_policysplit.actor import checkpoint

    layout, weights = layout_of(shape), {}
    for (adam, distributed), dtype in product(FORMS, dtypes):
        with ADAMS[adam]():
            actor = make_actor(layout, path, distributed, dtype)
            train(actor, 0)
            state = checkpoint.TrainerState(step=1, optimizer_steps=actor.optimizer.steps_taken)
            checkpoint.save(actor, state, place(root, adam, distributed, dtype), keep=1)
            saved = exported(actor)
            train(actor, 1)
            weights[adam, distributed, dtype] = saved, exported(actor)
    return weights


def load_all(rank, shape, path, root, dtypes, forms):
    """Every checkpoint in every form of `forms`, and the batch after it."""
    from megatron_policysplit.actor import checkpoint

    layout, weights = layout_of(shape), {}
    for (adam, distributed), dtype, (source, was_distributed) in product(forms, dtypes, FORMS):
        with ADAMS[adam]():
            actor = make_actor(layout, path, distributed, dtype)
            file = checkpoint.checkpoint_path(place(root, source, was_distributed, dtype), 1)
            checkpoint.load(actor, file)
            loaded = exported(actor)
            train(actor, 1)
            weights[source, was_distributed, dtype, adam, distributed] = loaded, exported(actor)
    return weights


def assert_goes_on(saved, loaded, what):
    """The same weights after the load; after a batch more the same change, which a wrong step count cannot give."""
    (before, after), (resumed, later) = saved, loaded
    dtype = what[2]
    for name, weights in before.items():
        assert np.array_equal(resumed[name], weights), (what, name)
        moved, error = after[name] - weights, later[name] - after[name]
        # A weight in bfloat16 may round to its other neighbour where float32 differs in the last bit.
        bound = 1e-3 if dtype == "float32" else 0.05
        assert np.linalg.norm(error) <= bound * np.linalg.norm(moved) + 1e-6, (what, name)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return str(
        make_model(tmp_path_factory.mktemp("model") / "qwen3", "qwen3", tied=True, vocab=VOCAB, num_hidden_layers=2)
    )


@pytest.fixture(scope="module")
def checkpoints(path, tmp_path_factory):
    """Where they are, and the weights of every form. Saved by two replicas."""
    root = str(tmp_path_factory.mktemp("checkpoints"))
    dtypes = ("float32", "bfloat16")
    return root, run_distributed(save_all, 2, LAYOUTS[0], path, root, dtypes, timeout_seconds=240)[0]


@pytest.mark.parametrize("shape", LAYOUTS, ids=str)
def test_any_optimizer_goes_on_from_any_other(checkpoints, path, shape):
    """Also at another layout, where float32 alone is compared, and one present form of each Adam."""
    root, saved = checkpoints
    same = shape == LAYOUTS[0]
    dtypes, forms = (("float32", "bfloat16"), FORMS) if same else (("float32",), [("torch", True), ("fused", False)])
    for loaded in run_distributed(load_all, 2, shape, path, root, dtypes, forms, timeout_seconds=240):
        assert len(loaded) == len(dtypes) * len(forms) * len(FORMS)
        for what, weights in loaded.items():
            assert_goes_on(saved[what[:3]], weights, what)


def test_the_comparison_sees_a_lost_step_count(checkpoints, path, monkeypatch):
    root, saved = checkpoints
    loaded = run_distributed(load_without_steps, 2, LAYOUTS[0], path, root)[0]
    for what, weights in loaded.items():
        with pytest.raises(AssertionError):
            assert_goes_on(saved[what], weights, what)


def load_without_steps(rank, shape, path, root):
    from megatron_policysplit.actor import checkpoint, optimizer

    layout, weights = layout_of(shape), {}
    for adam in ADAMS:
        with ADAMS[adam]():
            actor = make_actor(layout, path, False, "float32")
            checkpoint.load(actor, checkpoint.checkpoint_path(place(root, adam, False, "float32"), 1))
            optimizer._set_steps(actor.optimizer.megatron.chained_optimizers[0].optimizer, 0)
            loaded = exported(actor)
            train(actor, 1)
            weights[adam, False, "float32"] = loaded, exported(actor)
    return weights


def test_experts_and_their_second_optimizer(tmp_path):
    """Expert parallelism 2 to 1 and back, between the two Adams."""
    moe = str(make_model(tmp_path / "moe", "qwen3_moe", tied=False, vocab=VOCAB, num_hidden_layers=2))
    for before, after in (((1, 1, 2, 2), (1, 1, 1, 1)), ((1, 1, 1, 1), (1, 1, 2, 2))):
        root = str(tmp_path / str(before))
        saved = run_distributed(save_all, before[2], before, moe, root, ("float32",), timeout_seconds=240)[0]
        forms = [("torch", False), ("fused", True)]
        for loaded in run_distributed(load_all, after[2], after, moe, root, ("float32",), forms, timeout_seconds=240):
            for what, weights in loaded.items():
                assert_goes_on(saved[what[:3]], weights, what)


# --- other layers, older checkpoints, other devices --------------------------------------------------


def resume_older(rank, shape, path, root):
    """A checkpoint that holds extra states, as earlier versions saved them, and what is said of its generators."""
    from unittest import mock

    from megatron_policysplit.actor import checkpoint
    from megatron_policysplit.distributed import device

    layout = layout_of(shape)
    actor = make_actor(layout, path, False, "float32")
    train(actor, 0)
    state = checkpoint.TrainerState(step=1, optimizer_steps=actor.optimizer.steps_taken)
    with mock.patch.object(checkpoint, "without_extra_states", dict):
        file = checkpoint.save(actor, state, Path(root), keep=1)
    again, said = make_actor(layout, path, False, "float32"), []
    torch.manual_seed(5)
    checkpoint.load(again, file, said.append)
    drawn = torch.rand(3)
    torch.manual_seed(1)
    # As if a GPU had saved it: the states of its generators have another length.
    file_of_rank = file / "rng_rank00000.safetensors"
    states = {**checkpoint.load_file(file_of_rank), "cuda": torch.zeros(16, dtype=torch.uint8)}
    states = {name: torch.zeros(16, dtype=torch.uint8) if "tracker" in name else s for name, s in states.items()}
    checkpoint.save_file(states, file_of_rank)
    meta = json.loads((file / "trainer.json").read_text())
    meta["files"].pop(file_of_rank.name)
    (file / "trainer.json").write_text(json.dumps(meta))
    before = torch.get_rng_state()
    checkpoint.load(again, file, said.append)
    untouched = torch.equal(torch.get_rng_state(), before)
    # Forgotten again: the layout is another one.
    meta["layout"]["tensor"] = 2
    (file / "trainer.json").write_text(json.dumps(meta))
    checkpoint.load(again, file, said.append)
    assert device.rng_states().keys() == {"cpu"}
    return drawn, untouched, said, sorted(checkpoint.read_metadata(file / ".metadata").state_dict_metadata)


def test_an_older_checkpoint_and_one_of_another_device(path, tmp_path):
    ((drawn, untouched, said, keys),) = run_distributed(resume_older, 1, (1, 1, 1, 1), path, str(tmp_path / "older"))
    assert any("_extra_state" in key for key in keys)
    torch.manual_seed(5)
    assert untouched and not torch.equal(drawn, torch.rand(3))  # what was saved came back
    fresh = "the actor's random generators begin anew: the checkpoint is of another "
    assert said == [None, f"{fresh}kind of device", f"{fresh}layout"]


def test_no_extra_state_is_saved(checkpoints):
    from checkpoints_conv.metadata import read_metadata

    root, _ = checkpoints
    for (adam, distributed), dtype in product(FORMS, ("float32", "bfloat16")):
        keys = read_metadata(place(root, adam, distributed, dtype) / "step_000001" / ".metadata").state_dict_metadata
        assert len(keys) > 10 and not [key for key in keys if "_extra_state" in key]


def load_around_stand_ins(rank, path, file):
    """The parameters of a model of Transformer Engine's layers that loaded what local layers saved."""
    from tests.support import fake_transformer_engine

    fake_transformer_engine.install()
    layout_of((1, 1, 1, 1))
    from megatron.core import dist_checkpointing

    from checkpoints_conv import read_hf_config
    from megatron_policysplit.actor.checkpoint import METADATA
    from megatron_policysplit.actor.megatron_weights import load_parameters, without_extra_states
    from megatron_policysplit.actor.weights import export_weights
    from tests.support.megatron_models import nan_model

    model = nan_model(path, torch.float32, transformer_engine=True)
    whole = model.sharded_state_dict(metadata=METADATA)
    asked = without_extra_states(whole)
    loaded = dist_checkpointing.load({"model": asked}, file)["model"]
    load_parameters(model, loaded, file)
    weights = dict(export_weights(model, read_hf_config(path), "every_rank"))
    return len(whole) - len(asked), {name: tensor.detach().numpy().copy() for name, tensor in weights.items()}


def test_layers_of_transformer_engine_load_what_local_layers_saved(checkpoints, path):
    root, saved = checkpoints
    file = str(place(root, "torch", False, "float32") / "step_000001")
    ((left_out, weights),) = run_distributed(load_around_stand_ins, 1, path, file, start="spawn")
    assert left_out > 4
    for name, weight in saved["torch", False, "float32"][0].items():
        assert np.array_equal(weights[name], weight), name
