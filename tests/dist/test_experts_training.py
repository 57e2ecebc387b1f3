"""The whole training step of a mixture of experts: the same at every layout, and the same as plain torch; and resumed.

Each layout runs all cases in one set of processes. Cases, actor and reference are those of `test_training_step.py`.
"""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.dist.test_training_step import (
    RELATIVE,
    assert_same_training,
    assert_statistics,
    exported,
    first_ratios,
    run_case,
)
from tests.support.dist import run_distributed
from tests.support.hf_models import make_model
from tests.support.training_cases import CASES, SEED, VOCAB, update_batch
from tests.support.training_outcomes import as_numpy, hf_model, run_reference

LAYOUTS = [(1, 1, 1, 1), (1, 1, 2, 1), (1, 1, 2, 2), (2, 1, 1, 1), (1, 2, 2, 2), (2, 1, 2, 2)]  # TP, PP, DP, EP
NAMES = ("paper_two_steps", "kl_and_entropy", "one_live", "none_live", "distributed_optimizer")
BY_NAME = {case.name: replace(case, model="qwen3_moe") for case in CASES if case.name in NAMES}
CHECKPOINTED = BY_NAME["distributed_optimizer"]


def layout_of(shape):
    from megatron_policysplit.actor.parallel import initialize
    from megatron_policysplit.config import ParallelConfig

    tensor, pipeline, data, expert = shape
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline, data=data, expert=expert, sequence=tensor > 1)
    return initialize(parallel, seed=1, timeout_seconds=60)


def run_cases(rank, shape, path):
    layout = layout_of(shape)
    outcomes = {name: run_case(case, path, layout) for name, case in BY_NAME.items()}
    return outcomes | {"bfloat16": first_ratios(BY_NAME["paper_two_steps"], path, layout)}


# --- the reference -----------------------------------------------------------------------------------


def by_expert(weights):
    """transformers' parameters, which hold all experts of a layer in one, under the names in its files."""
    split = {}
    for name, weight in weights.items():
        if not name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            split[name] = weight
            continue
        experts, part = name.rsplit(".", 1)
        for number, matrix in enumerate(weight):
            if part == "down_proj":
                split[f"{experts}.{number}.down_proj.weight"] = matrix
            else:
                gate, up = np.split(matrix, 2)
                split[f"{experts}.{number}.gate_proj.weight"], split[f"{experts}.{number}.up_proj.weight"] = gate, up
    return split


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return str(make_model(root / "moe", "qwen3_moe", tied=False, vocab=VOCAB, num_hidden_layers=2))


@pytest.fixture(scope="module")
def initial(path):
    return by_expert({name: as_numpy(weight) for name, weight in hf_model(path).state_dict().items()})


@pytest.fixture(scope="module")
def reference(path):
    def run(name):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        outcome = run_reference(BY_NAME[name], path)
        torch.set_num_threads(threads)
        return replace(outcome, weights=by_expert(outcome.weights))

    return functools.cache(run)


@pytest.fixture(scope="module")
def outcomes(path):
    """layout -> every rank's outcomes by case."""
    return functools.cache(
        lambda shape: run_distributed(run_cases, int(np.prod(shape[:3])), shape, path, timeout_seconds=240)
    )


# --- tests -------------------------------------------------------------------------------------------

every_layout = pytest.mark.parametrize("shape", LAYOUTS, ids=lambda shape: "tp{}-pp{}-dp{}-ep{}".format(*shape))
every_case = pytest.mark.parametrize("name", NAMES)


@every_layout
def test_first_ratio_is_exactly_one_in_bfloat16(outcomes, shape):
    assert [results["bfloat16"] for results in outcomes(shape)] == [[0.0] * 3] * len(outcomes(shape))


@every_layout
@every_case
def test_step_equals_plain_torch(outcomes, reference, initial, shape, name):
    expected, case = reference(name), BY_NAME[name]
    for found in (results[name] for results in outcomes(shape)):
        np.testing.assert_allclose(found.loss, expected.loss, rtol=RELATIVE, atol=1e-6)
        np.testing.assert_allclose(found.grad_norm, expected.grad_norm, rtol=RELATIVE, atol=1e-7)
        assert found.bad_steps == [0] * case.batches and found.first_ratio_off_one == [0.0] * case.batches
        # Ours come in the order of the table.
        ours = {tensor: found.weights[tensor] for tensor in expected.weights}
        assert len(ours) == len(found.weights)
        assert_same_training(ours, expected.weights, initial)
        if found.plans[0] is not None:
            assert_statistics(found.statistics[0], expected.statistics[0], case.config(""), 1e-5)


def test_cases_cover_what_they_should(outcomes, reference, initial):
    """A replica has empty micro-batches, in training and in scoring; experts and routers have learnt something."""
    plans = [results[name].plans for results in outcomes((1, 1, 2, 2)) for name in NAMES]
    steps = [step for by_batch in plans for plan in by_batch for step in plan.micro_batches]
    for kind in ("train", "score_only"):
        parts = [[getattr(share, kind) for share in step] for step in steps]
        assert all(len({len(part) for part in step}) == 1 for step in parts)
        assert any([] in part for step in parts for part in step)
    moved = [name for name, weight in reference("paper_two_steps").weights.items() if (weight != initial[name]).any()]
    assert any("mlp.gate.weight" in name for name in moved) and any("experts.7.up_proj" in name for name in moved)


@pytest.mark.parametrize("distributed", [True, False], ids=["distributed_optimizer", "whole_optimizer"])
@pytest.mark.parametrize(
    ("shapes"), [((1, 1, 2, 2), (1, 1, 1, 1)), ((1, 1, 1, 1), (1, 1, 2, 2))], ids=["to_one", "to_two"]
)
def test_a_checkpoint_loads_at_another_expert_parallel_size(path, tmp_path, shapes, distributed):
    """Also at its own; the batch after it trains alike."""
    before, after = shapes
    saved = run_distributed(save_after_a_batch, before[2], before, path, str(tmp_path), distributed)
    for shape in (before, after) if distributed else (after,):
        for loaded in run_distributed(load_and_go_on, shape[2], shape, path, str(tmp_path), distributed):
            for name, weight in saved[0]["saved"].items():
                assert np.array_equal(loaded["saved"][name], weight), name
            for name, weight in saved[0]["later"].items():
                np.testing.assert_allclose(loaded["later"][name], weight, rtol=RELATIVE, atol=1e-5, err_msg=name)


def save_after_a_batch(rank, shape, path, directory, distributed):
    from pathlib import Path

    from megatron_policysplit.actor import checkpoint

    actor, case = fresh_actor(shape, path, distributed)
    train(actor, case, 0)
    state = checkpoint.TrainerState(step=1, optimizer_steps=actor.optimizer.steps_taken)
    checkpoint.save(actor, state, Path(directory), keep=1)
    weights = exported(actor)
    train(actor, case, 1)
    return {"saved": weights, "later": exported(actor)}


def load_and_go_on(rank, shape, path, directory, distributed):
    from pathlib import Path

    from megatron_policysplit.actor import checkpoint

    actor, case = fresh_actor(shape, path, distributed)
    checkpoint.load(actor, checkpoint.checkpoint_path(Path(directory), 1))
    weights = exported(actor)
    train(actor, case, 1)
    return {"saved": weights, "later": exported(actor)}


def fresh_actor(shape, path, distributed):
    from checkpoints_conv import read_hf_config
    from megatron_policysplit.actor.actor import Actor

    layout = layout_of(shape)
    case = replace(CHECKPOINTED, settings={**CHECKPOINTED.settings, "train.distributed_optimizer": distributed})
    return Actor(case.config(path), read_hf_config(path), layout), case


def train(actor, case, batch):
    rows = case.rows(batch) if actor.layout.is_leader else []
    placed = actor.place(rows, case.live(rows, actor.config), seed=SEED + batch)
    update_batch(actor, placed, case.builder(rows, actor.log_probs(placed), placed, actor.config))
