"""The initial policy in real process groups: its log-probs are those of an actor that never trained, bit for bit."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from checkpoints_conv.hf_to_megatron import hf_to_megatron
from tests.support.dist import run_distributed
from tests.support.hf_models import make_model
from tests.support.training_cases import SEED, VOCAB, Case, update_batch

CHUNK_BYTES = 1000  # no multiple of anything: weights lie across chunks, some across many


@dataclass(frozen=True)
class Setup:
    name: str
    shape: tuple[int, int, int]  # TP, PP, DP
    settings: dict = field(default_factory=dict, hash=False)
    from_megatron: bool = False


SETUPS = [
    Setup("tp2-fp32", (2, 1, 1)),
    Setup("dp2-bf16-sharded", (1, 1, 2), {"train.distributed_optimizer": True, "model.dtype": "bfloat16"}),
    Setup("pp2-bf16", (1, 2, 1), {"model.dtype": "bfloat16"}),
    Setup("megatron", (1, 1, 1), from_megatron=True),
]


# --- in every process --------------------------------------------------------------------------------


def run(rank, setup, path, megatron, run_dir):
    from checkpoints_conv import read_hf_config
    from megatron_policysplit.actor import checkpoint
    from megatron_policysplit.actor.actor import Actor
    from megatron_policysplit.actor.parallel import initialize
    from megatron_policysplit.actor.reference import ReferenceWeights
    from megatron_policysplit.config import ParallelConfig

    tensor, pipeline, data = setup.shape
    layout = initialize(ParallelConfig(tensor=tensor, pipeline=pipeline, data=data), seed=1, timeout_seconds=60)

    def actor(kl_coef):
        case = Case(setup.name, settings={"algorithm.kl_coef": kl_coef, **setup.settings})
        config = case.config(path)
        config.model.megatron = megatron
        return case, Actor(config, read_hf_config(path), layout)

    (case, untrained), (_, trained) = actor(0.0), actor(0.3)
    assert untrained.reference is None, "without the KL there is no copy"
    initial = weights(trained)
    trained.reference = ReferenceWeights(trained.model, chunk_bytes=CHUNK_BYTES)
    for batch in range(2):
        rows, placed = placed_batch(trained, case, layout, batch)
        expected = [row.logprobs for row in untrained.log_probs(placed)]
        before = weights(trained)
        old = trained.log_probs(placed)
        reference = trained.reference_log_probs(placed)
        assert same(reference, expected)
        assert same(weights(trained), before), "and the current weights are back, bit for bit"
        assert same(trained.reference_log_probs(placed), expected), "a second time too"
        if layout.is_leader:  # others have no log-probs
            assert same([row.logprobs for row in old], expected) == (batch == 0), "training moves the policy alone"
        update_batch(trained, placed, case.builder(rows, old, placed, trained.config, reference))
    check_an_error(trained, placed)
    check_memory(trained)

    state = checkpoint.TrainerState(step=2, optimizer_steps=trained.optimizer.steps_taken)
    checkpoint.save(trained, state, Path(run_dir), keep=1)
    _, resumed = actor(0.3)
    assert checkpoint.load(resumed, Path(run_dir) / "step_000002").step == 2
    assert same(weights(resumed), weights(trained)) and not same(weights(resumed), initial)
    assert same(resumed.reference_log_probs(placed), expected), "a resumed run has the reference of the first start"
    if megatron is not None:  # whose weights are not those of model.path
        assert not same(expected, hf_log_probs(case, path, layout, placed))
    return sum(map(len, expected))


def placed_batch(actor, case, layout, batch):
    rows = case.rows(batch) if layout.is_leader else []
    return rows, actor.place(rows, case.live(rows, actor.config), seed=SEED + batch)


def hf_log_probs(case, path, layout, placed):
    from checkpoints_conv import read_hf_config
    from megatron_policysplit.actor.actor import Actor

    return [row.logprobs for row in Actor(case.config(path), read_hf_config(path), layout).log_probs(placed)]


def weights(actor):
    return [parameter.detach().clone() for parameter in actor.model.parameters()]


def same(found, expected):
    import torch

    return len(found) == len(expected) and all(map(torch.equal, found, expected))


def check_an_error(actor, placed):
    """The current weights come back, too, where the pass under the reference fails."""

    def fail(batches, **options):
        assert not same(weights(actor), before), "the initial weights are in place by now"
        raise ArithmeticError

    before, log_probs = weights(actor), actor.scorer.log_probs
    actor.scorer.log_probs = fail
    with pytest.raises(ArithmeticError):
        actor.reference_log_probs(placed)
    actor.scorer.log_probs = log_probs
    assert same(weights(actor), before)


def check_memory(actor):
    """A copy of the weights and a chunk for the exchange, allocated once."""
    host = actor.reference._host
    total = sum(parameter.numel() * parameter.element_size() for parameter in actor.model.parameters())
    chunks = [*host.chunks, host._spare]
    assert total <= len(host.chunks) * CHUNK_BYTES < total + CHUNK_BYTES
    places = {chunk.data_ptr() for chunk in chunks}
    with actor.reference.in_place():
        pass
    assert {chunk.data_ptr() for chunk in [*host.chunks, host._spare]} == places and len(places) == len(chunks)


# --- in this process ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return str(make_model(tmp_path_factory.mktemp("model") / "qwen3", "qwen3", tied=True, vocab=VOCAB,
                          num_hidden_layers=2))  # fmt: skip


@pytest.fixture(scope="module")
def megatron(path, tmp_path_factory):
    """A torch_dist checkpoint of other weights than those of `path`."""
    root = tmp_path_factory.mktemp("megatron")
    other = make_model(root / "hf", "qwen3", tied=True, vocab=VOCAB, num_hidden_layers=2)
    tensors = load_file(other / "model.safetensors")
    save_file({name: value * 1.25 for name, value in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    hf_to_megatron(other, root / "converted")
    return str(root / "converted")


@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: setup.name)
def test_the_reference_is_the_initial_policy(setup, path, megatron, tmp_path):
    world = setup.shape[0] * setup.shape[1] * setup.shape[2]
    start = megatron if setup.from_megatron else None
    tokens = run_distributed(run, world, setup, path, start, str(tmp_path), timeout_seconds=240)
    assert max(tokens) > 100
