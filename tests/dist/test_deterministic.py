"""train.deterministic: when torch may take which kernels, and that it changes no number on the CPU."""

import pytest
import torch

from tests.support.dist import run_distributed
from tests.support.hf_models import make_model
from tests.support.training_cases import SEED, VOCAB, Case, update_batch


def switches():
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def train(rank, path, tensor, deterministic):
    """Log-probs, updates and new weights of two batches; torch's switches in score, forward, backward and after."""
    from checkpoints_conv import read_hf_config
    from megatron_policysplit.actor.actor import Actor
    from megatron_policysplit.actor.parallel import initialize
    from megatron_policysplit.config import ParallelConfig
    from megatron_policysplit.distributed.device import use_deterministic_kernels

    settings = {"train.deterministic": deterministic, "algorithm.kl_coef": 0.1}
    case = Case("deterministic", settings={"algorithm.options.policy_split.eta": 0.5, **settings})
    layout = initialize(ParallelConfig(tensor=tensor, sequence=tensor > 1), seed=1, timeout_seconds=60)
    if deterministic:
        use_deterministic_kernels()
    actor = Actor(case.config(path), read_hf_config(path), layout)
    seen, loss = {}, actor._loss
    actor._loss = lambda *arguments: (seen.update(forward=switches()), loss(*arguments))[1]
    actor.model.embedding.register_full_backward_hook(lambda *unused: seen.update(backward=switches()))
    numbers = []
    for batch in range(2):
        rows = case.rows(batch) if layout.is_leader else []
        placed = actor.place(rows, case.live(rows, actor.config), seed=SEED + batch)
        old, reference = actor.log_probs(placed), actor.reference_log_probs(placed)
        seen["score"] = switches()
        update = update_batch(actor, placed, case.builder(rows, old, placed, actor.config, reference))
        numbers.append(([(row.logprobs.tolist(), row.entropy.tolist()) for row in old], update))
    seen["after"] = switches()
    return numbers, [parameter.detach().clone() for parameter in actor.model.parameters()], seen


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("wanted", [False, True])
def test_megatron_is_told_on_a_gpu(monkeypatch, gpu, wanted):
    from megatron_policysplit.actor import megatron_on_cpu

    monkeypatch.setattr(megatron_on_cpu, "on_cpu", lambda: not gpu)
    assert megatron_on_cpu.model_options(False, wanted)["deterministic_mode"] == (gpu and wanted)


@pytest.mark.parametrize(("family", "tensor"), [("qwen3", 2), ("qwen3_moe", 1)])
def test_no_number_changes_on_the_cpu(tmp_path, family, tensor):
    path = str(make_model(tmp_path / family, family, tied=True, vocab=VOCAB, num_hidden_layers=2))
    without, with_it = (run_distributed(train, tensor, path, tensor, wanted) for wanted in (False, True))
    for (numbers, weights, seen), (expected_numbers, expected_weights, plain) in zip(with_it, without, strict=True):
        assert numbers == expected_numbers
        assert all(map(torch.equal, weights, expected_weights))
        assert set(plain.values()) == {(False, False)}
        warns, raises = (True, True), (True, False)
        assert seen == {"score": warns, "forward": raises, "backward": raises, "after": warns}


def test_an_error_leaves_the_switch_as_it_was():
    (before, inside, after) = run_distributed(fail, 1)[0]
    assert before == after == (True, True) and inside == (True, False)


def fail(rank):
    from megatron_policysplit.distributed.device import deterministic_only, use_deterministic_kernels

    use_deterministic_kernels()
    assert not torch.utils.deterministic.fill_uninitialized_memory
    before, inside = switches(), None
    with pytest.raises(ZeroDivisionError), deterministic_only(True):
        inside = switches()
        raise ZeroDivisionError
    with deterministic_only(False):
        assert switches() == before
    return before, inside, switches()
