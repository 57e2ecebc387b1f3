"""The actor's whole step in real process groups: the same at every layout, and the same as plain torch.

Each layout runs all cases in one set of processes. The reference (`tests/reference/plain_step.py`) runs in
fp64, one row at a time.
"""

import functools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from megatron_policysplit.rows.plan import Plan, make_plan
from megatron_policysplit.algorithms.signals import RowSettings, scored_rows
from tests.reference import plain_step
from tests.support.dist import run_distributed
from tests.support.hf_models import make_model
from tests.support.training_cases import CASES, SEED, VOCAB, update_batch
from tests.support.training_outcomes import Outcome, as_numpy, hf_model, partition, run_reference

LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (1, 1, 2), (2, 1, 1, "sequence"), (2, 2, 1, "sequence")]
BY_NAME = {case.name: case for case in CASES}
FAMILIES = {"qwen3": True, "llama": False}  # family: tied head
RELATIVE = 1e-4


# --- the actor, in every process ---------------------------------------------------------------------


def run_cases(rank, shape, paths):
    from megatron_policysplit.actor.parallel import initialize
    from megatron_policysplit.config import ParallelConfig

    tensor, pipeline, data, *sequence = shape  # ranks of tensor, pipeline and data parallelism
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline, data=data, sequence=bool(sequence))
    layout = initialize(parallel, seed=1, timeout_seconds=60)
    outcomes = {case.name: run_case(case, paths[case.model], layout) for case in CASES}
    outcomes["bfloat16"] = first_ratios(BY_NAME["paper_two_steps"], paths["qwen3"], layout)
    outcomes["nan"] = run_case(BY_NAME["grpo"], paths["qwen3"], layout, poison=True)
    return outcomes


def run_case(case, path, layout, poison=False):
    """With `poison`, each update is tried first with one NaN advantage; `bad_steps` is then what that gave."""
    from checkpoints_conv import read_hf_config
    from megatron_policysplit.actor.actor import Actor

    config = case.config(path)
    actor = Actor(config, read_hf_config(path), layout)
    outcome = Outcome([], [], [], [], [], [], [], {}, 0)
    for batch in range(case.batches):
        rows = case.rows(batch) if layout.is_leader else []
        live = case.live(rows, config)
        scored = scored_rows(rows, live, case.algorithm, RowSettings.of(config))
        # The second batch is compared with the engine, which must change nothing.
        compared = [batch == 1 and row.on_policy and not there for row, there in zip(rows, scored, strict=True)]
        placed = actor.place(rows, live, seed=SEED + batch, scored=scored, compared=compared)
        old = actor.log_probs(placed)
        reference = actor.reference_log_probs(placed) if config.algorithm.kl_coef > 0 else None
        if poison:
            builder = case.builder(rows, old, placed, config, reference)
            outcome.bad_steps.append(poisoned_update(actor, placed, builder, live))
        update = update_batch(actor, placed, case.builder(rows, old, placed, config, reference))
        outcome.loss.append(update.loss)
        outcome.grad_norm.append(update.grad_norm)
        outcome.first_ratio_off_one.append(update.first_ratio_off_one)
        if not poison:
            outcome.bad_steps.append(update.bad_steps)
        outcome.statistics.append(
            [
                (as_numpy(s.logprobs), as_numpy(s.entropy), {k: as_numpy(v) for k, v in s.kl.items()}, s.prompt_logprob)
                if there or apart
                else None
                for s, there, apart in zip(old, scored, compared, strict=True)
            ]
        )
        outcome.advantages.append(advantages_by_row(case, rows, old, placed, config))
        outcome.plans.append(placed.plan)
    outcome.weights = exported(actor)
    outcome.steps_taken = actor.optimizer.steps_taken
    return outcome


def first_ratios(case, path, layout):
    """The distance of the first ratio from 1 in every batch, trained in bfloat16."""
    from checkpoints_conv import read_hf_config
    from megatron_policysplit.actor.actor import Actor

    config = case.config(path)
    config.model.dtype = "bfloat16"
    actor, distances = Actor(config, read_hf_config(path), layout), []
    for batch in range(3):
        rows = case.rows(batch) if layout.is_leader else []
        placed = actor.place(rows, case.live(rows, config), seed=SEED + batch)
        old = actor.log_probs(placed)
        distances.append(update_batch(actor, placed, case.builder(rows, old, placed, config)).first_ratio_off_one)
    return distances


def advantages_by_row(case, rows, old, placed, config):
    """Of every row of the batch, by the statistics before its first optimizer step; [] without a plan."""
    if placed.plan is None:
        return []
    whole = Plan([list(range(len(rows)))], placed.plan.micro_batches[:1])
    signals = case.builder(rows, old, replace(placed, plan=whole), config).for_step(0)
    return [as_numpy(signals[row].advantages) for row in range(len(rows))]


class Poisoned:
    """A builder's signals in which one token of row `row` has a NaN advantage."""

    def __init__(self, builder, row):
        self.builder, self.row = builder, row

    def for_step(self, step, current=None):
        signals = self.builder.for_step(step, current)
        if self.row in signals:
            signals[self.row].advantages[0] = float("nan")
        return signals


def poisoned_update(actor, placed, builder, live):
    """Number of bad steps of an update in which one token of one row has a NaN advantage."""
    before = exported(actor)
    poisoned = Poisoned(builder, live.index(True)) if live else builder
    update = update_batch(actor, placed, poisoned)
    after = exported(actor)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert actor.optimizer.steps_taken == 0
    return update.bad_steps


def exported(actor):
    from megatron_policysplit.actor.weights import export_weights

    return {name: as_numpy(tensor) for name, tensor in export_weights(actor.model, actor.hf_config, "every_rank")}


# --- fixtures ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny tensors: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        family: str(make_model(root / family, family, tied=tied, vocab=VOCAB, num_hidden_layers=2))
        for family, tied in FAMILIES.items()
    }


@pytest.fixture(scope="module")
def initial(paths):
    return {
        family: {name: as_numpy(w) for name, w in hf_model(path).state_dict().items()} for family, path in paths.items()
    }


@pytest.fixture(scope="module")
def reference(paths):
    return functools.cache(lambda name: run_reference(BY_NAME[name], paths[BY_NAME[name].model]))


@pytest.fixture(scope="module")
def outcomes(paths):
    """layout -> every rank's outcomes by case."""
    return functools.cache(
        lambda shape: run_distributed(run_cases, int(np.prod(shape[:3])), shape, paths, timeout_seconds=240)
    )


def leaders(outcomes, shape, name):
    """Outcomes of the ranks that hold the whole batch: one a replica."""
    found = [results[name] for results in outcomes(shape) if results[name].plans[0] is not None]
    assert len(found) == shape[2]
    return found


# --- tests -------------------------------------------------------------------------------------------

every_layout = pytest.mark.parametrize(
    "shape", LAYOUTS, ids=lambda shape: "tp{}-pp{}-dp{}".format(*shape) + "-sp" * (len(shape) > 3)
)
every_case = pytest.mark.parametrize("name", BY_NAME)


@every_layout
@every_case
def test_statistics_equal_transformers(outcomes, reference, shape, name):
    config = BY_NAME[name].config("")
    for outcome in leaders(outcomes, shape, name):
        # Later batches are scored with trained weights, and inherit their tolerance.
        assert_statistics(outcome.statistics[0], reference(name).statistics[0], config, 1e-5)
        assert_statistics(outcome.statistics[-1], reference(name).statistics[-1], config, 1e-3)


def assert_statistics(found, expected, config, tolerance):
    assert len(found) == len(expected)
    with_kl = sum(bool(kl) for _, _, kl, _ in filter(None, found))
    # "sample": one rollout of each of the 3 questions and 2 sampling modes, in both its rows
    wanted = {"all": len(found), "sample": 3 * 2 * 2, "none": 0}[config.log.kl_tokens]
    assert with_kl == (wanted if config.algorithm.name == "policy_split" else 0)
    for one, plain in zip(found, expected, strict=True):
        if one is None:
            continue
        (logprobs, entropy, kl, prompt), (plain_logprobs, plain_entropy, plain_kl, plain_prompt) = one, plain
        np.testing.assert_allclose(logprobs, plain_logprobs, rtol=0, atol=tolerance)
        np.testing.assert_allclose(entropy, plain_entropy, rtol=0, atol=tolerance)
        assert kl.keys() == plain_kl.keys() or not kl
        for name, values in kl.items():
            np.testing.assert_allclose(values, plain_kl[name], rtol=0, atol=tolerance)
        assert prompt == pytest.approx(plain_prompt, abs=tolerance) if plain_prompt is not None else prompt is None


@every_layout
@every_case
def test_advantages_equal_plain_torch(outcomes, reference, shape, name):
    """Advantages of groups whose rows were scored on another stage or on two replicas, too; 0 where masked."""
    rows = BY_NAME[name].rows(0)
    for outcome in leaders(outcomes, shape, name):
        for row, found, expected in zip(rows, outcome.advantages[0], reference(name).advantages[0], strict=True):
            mask = np.array(row.rollout.loss_mask, dtype=bool)
            np.testing.assert_allclose(found[mask], expected[mask], rtol=1e-4, atol=1e-5)
            assert (found[~mask] == 0).all()


@every_layout
@every_case
def test_loss_and_gradient_norm_equal_plain_torch(outcomes, reference, shape, name):
    for results in outcomes(shape):
        np.testing.assert_allclose(results[name].loss, reference(name).loss, rtol=RELATIVE, atol=1e-6)
        np.testing.assert_allclose(results[name].grad_norm, reference(name).grad_norm, rtol=RELATIVE, atol=1e-7)
        assert results[name].bad_steps == [0] * BY_NAME[name].batches


@every_layout
@every_case
def test_new_weights_equal_plain_torch(outcomes, reference, initial, shape, name):
    for results in outcomes(shape):
        assert_same_training(results[name].weights, reference(name).weights, initial[BY_NAME[name].model])


def assert_same_training(found, expected, start):
    """Weights to 1e-4 relative, and of each tensor the *change* to 1e-3, which a wrong gradient cannot pass."""
    assert list(found) == list(expected)
    for name, weights in found.items():
        np.testing.assert_allclose(weights, expected[name], rtol=RELATIVE, atol=1e-5, err_msg=name)
        moved, error = expected[name] - start[name], weights - expected[name]
        # The weights are fp32: each carries a rounding of 6e-8 of itself.
        assert np.linalg.norm(error) <= 1e-3 * np.linalg.norm(moved) + 1e-7 * np.linalg.norm(start[name]), name


@every_layout
@every_case
def test_every_layout_trains_alike(outcomes, initial, shape, name):
    alone = outcomes((1, 1, 1))[0][name]
    for results in outcomes(shape):
        np.testing.assert_allclose(results[name].loss, alone.loss, rtol=RELATIVE, atol=1e-6)
        np.testing.assert_allclose(results[name].grad_norm, alone.grad_norm, rtol=RELATIVE, atol=1e-7)
        assert_same_training(results[name].weights, alone.weights, initial[BY_NAME[name].model])
    for outcome in leaders(outcomes, shape, name):
        for found, expected in zip(outcome.advantages[0], alone.advantages[0], strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@every_layout
@every_case
def test_first_ratio_is_exactly_one(outcomes, shape, name):
    """Bit for bit, at the first optimizer step of every batch: scored and trained by the same computation.

    Not with the engine's log-probs, which these cases draw.
    """
    engine = BY_NAME[name].config("").algorithm.old_logprobs == "engine"
    for results in outcomes(shape):
        found = results[name].first_ratio_off_one
        assert min(found) > 0.1 if engine else found == [0.0] * BY_NAME[name].batches


@every_layout
def test_first_ratio_is_exactly_one_in_bfloat16(outcomes, shape):
    assert [results["bfloat16"] for results in outcomes(shape)] == [[0.0] * 3] * len(outcomes(shape))


@every_layout
def test_live_rows_are_left_out_of_scoring_where_the_engine_has_scored_them(outcomes, shape):
    """Under the prompt they were sampled with, but for one rollout of each question and mode, whose KL is logged."""
    case = BY_NAME["engine_logprobs"]
    for batch, rows in enumerate(map(case.rows, range(case.batches))):
        for outcome in leaders(outcomes, shape, "engine_logprobs"):
            for row, found in zip(rows, outcome.statistics[batch], strict=True):
                logged = row.rollout.sample == min(
                    other.rollout.sample for other in rows if other.rollout.key[:3] == row.rollout.key[:3]
                )
                dead = row.key.question == 1
                compared = batch == 1 and row.on_policy
                assert (found is not None) == (logged or compared or not (row.on_policy or dead))
    for outcome in leaders(outcomes, shape, "engine_logprobs_alone"):
        assert outcome.statistics[0] == [None] * len(outcome.statistics[0])


@every_layout
def test_nan_step_is_skipped_everywhere(outcomes, reference, initial, shape):
    """A NaN in one row of one replica: no rank's weights move, and the next step is as if it had not been."""
    for results in outcomes(shape):
        assert results["nan"].bad_steps == [1]
        assert results["nan"].steps_taken == 1
        assert_same_training(results["nan"].weights, reference("grpo").weights, initial["qwen3"])


@every_layout
def test_optimizer_steps_are_the_same_everywhere(outcomes, shape):
    for name, case in BY_NAME.items():
        config = case.config("")
        for outcome in leaders(outcomes, shape, name):
            for batch, plan in enumerate(outcome.plans):
                assert plan.steps == partition(case, config, case.rows(batch), batch)


def test_cases_cover_what_they_should(outcomes, reference):
    """Two replicas have unequal work, one of them none, groups are spread over both, and clipping happens."""
    plans = {name: leaders(outcomes, (1, 1, 2), name)[0].plans for name in BY_NAME}
    counts = {name: [[len(share.train) for share in step] for step in plans[name][0].micro_batches] for name in plans}
    assert any(len(set(step)) == 2 and min(step) > 0 for steps in counts.values() for step in steps)
    assert sorted(counts["one_live"][0])[0] == 0 < sorted(counts["one_live"][0])[1]
    assert counts["none_live"] == [[0, 0]]
    rows = BY_NAME["paper_two_steps"].rows(0)
    replicas_of = {}
    for step in plans["paper_two_steps"][0].micro_batches:
        for replica, part in enumerate(step):
            for index in sum(part.train + part.score_only, []):
                replicas_of.setdefault(rows[index].key.group, set()).add(replica)
    assert {0, 1} in replicas_of.values()
    assert reference("paper_two_steps").grad_norm[0] > BY_NAME["paper_two_steps"].settings["train.clip_grad"]
    assert {case.algorithm.config.loss_aggregation for case in CASES} == {
        "token_mean",
        "sequence_mean_token_mean",
        "sequence_mean_token_sum_norm",
    }
