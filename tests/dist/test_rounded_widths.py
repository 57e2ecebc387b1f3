"""Micro-batches whose width is rounded, as on a GPU: more padding, the same numbers, and the bound is kept."""

import pytest
import torch

from tests.support.dist import run_distributed
from tests.support.hf_models import make_model
from tests.support.training_cases import SEED, VOCAB, Case, update_batch

BOUND = 70


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return str(make_model(tmp_path_factory.mktemp("model") / "qwen3", "qwen3", tied=True, vocab=VOCAB,
                          num_hidden_layers=2))  # fmt: skip


def run(rank, path, multiple, sequence):
    """Shapes of the micro-batches, log-probs of the rows and loss of a step; multiple: None leaves the CPU's own."""
    from checkpoints_conv import read_hf_config
    from megatron_policysplit.actor import placed_batch
    from megatron_policysplit.actor.actor import Actor
    from megatron_policysplit.actor.parallel import initialize
    from megatron_policysplit.config import ParallelConfig

    if multiple is not None:
        placed_batch.width_multiple = lambda: multiple
    layout = initialize(ParallelConfig(tensor=2, sequence=sequence), seed=1, timeout_seconds=60)
    case = Case("widths", settings={"train.max_tokens_per_micro_batch": BOUND})
    actor = Actor(case.config(path), read_hf_config(path), layout)
    rows = case.rows(0) if layout.is_leader else []
    placed = actor.place(rows, case.live(rows, actor.config), seed=SEED)
    shapes = [tuple(batch.tokens.shape) for batch in placed.scored()]
    old = actor.log_probs(placed)
    update = update_batch(actor, placed, case.builder(rows, old, placed, actor.config))
    return shapes, [row.logprobs for row in old], update.loss, update.grad_norm


@pytest.mark.parametrize("sequence", [False, True])
def test_rounded_widths_change_no_number(path, sequence):
    plain, *_ = run_distributed(run, 2, path, None, sequence)
    rounded, *_ = run_distributed(run, 2, path, 9, sequence)
    multiple = 18 if sequence else 9  # sequence parallelism wants an even number
    assert all(width % multiple == 0 for _, width in rounded[0])
    assert any(width % 9 for _, width in plain[0]), "on the CPU itself nothing is rounded"
    assert all(height * width <= BOUND or height == 1 for height, width in plain[0] + rounded[0])
    assert sum(height for height, _ in rounded[0]) == sum(height for height, _ in plain[0])
    for found, expected in zip(rounded[1], plain[1], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert rounded[2:] == pytest.approx(plain[2:], rel=1e-4)
