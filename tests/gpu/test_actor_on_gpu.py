"""The actor on a CUDA device: the reference policy's memory, fused weight gradients, deterministic training."""

import importlib.util
import os

import pytest
import torch

from megatron_policysplit.distributed.environment import defaults
from tests.support.dist import run_distributed
from tests.support.hf_models import make_model
from tests.support.training_cases import SEED, VOCAB, Case, update_batch

MIB = 2**20

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
needs_transformer_engine = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine"
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """220 million parameters: large beside activations, head sizes as kernels want them."""
    sizes = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 14,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 64,
    }
    return str(make_model(tmp_path_factory.mktemp("model") / "qwen3", "qwen3", tied=True, vocab=VOCAB, **sizes))


def build(path, **settings):
    from checkpoints_conv import read_hf_config
    from megatron_policysplit.actor.actor import Actor
    from megatron_policysplit.actor.parallel import initialize
    from megatron_policysplit.config import ParallelConfig
    from megatron_policysplit.distributed.device import use_deterministic_kernels

    if settings.get("train.deterministic"):
        use_deterministic_kernels()
    layout = initialize(ParallelConfig(), seed=1)
    case = Case("gpu", settings={"algorithm.options.policy_split.eta": 0.5, "model.dtype": "bfloat16", **settings})
    return case, Actor(case.config(path), read_hf_config(path), layout)


def place(actor, case, batch=0):
    rows = case.rows(batch)
    return rows, actor.place(rows, case.live(rows, actor.config), seed=SEED + batch)


# --- reference policy --------------------------------------------------------------------------------


def peak_of(work):
    """What `work` gives, and the bytes that it allocated at most beyond those that were allocated before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = work()
    torch.cuda.synchronize()
    return found, torch.cuda.max_memory_allocated() - before


def score_under_the_reference(rank, path, kl_coef):
    case, actor = build(path, **{"algorithm.kl_coef": kl_coef})
    allocated = torch.cuda.memory_allocated()
    if kl_coef == 0:
        return allocated, None
    rows, placed = place(actor, case)
    actor.log_probs(placed)  # kernels and caches are made at the first pass
    old, peak = peak_of(lambda: actor.log_probs(placed))
    reference, reference_peak = peak_of(lambda: actor.reference_log_probs(placed))
    assert all(torch.equal(row.logprobs, other) for row, other in zip(old, reference, strict=True))
    update_batch(actor, placed, case.builder(rows, old, placed, actor.config, reference))
    before = [parameter.detach().clone() for parameter in actor.model.parameters()]
    again = actor.reference_log_probs(placed)
    assert all(map(torch.equal, again, reference)), "the initial policy does not move"
    assert all(map(torch.equal, before, actor.model.parameters())), "the weights are back, bit for bit"
    assert not all(torch.equal(a.logprobs, b) for a, b in zip(actor.log_probs(placed), reference, strict=True))
    assert all(chunk.is_pinned() for chunk in actor.reference._host.chunks)
    return allocated, reference_peak - peak


def test_the_reference_takes_no_memory_of_the_device(path):
    ((without, _),) = run_distributed(score_under_the_reference, 1, path, 0.0, timeout_seconds=280)
    ((allocated, growth),) = run_distributed(score_under_the_reference, 1, path, 0.3, timeout_seconds=280)
    assert abs(allocated - without) < MIB
    assert growth < MIB, "weights and reference change places without a copy on the device"


# --- gradients ---------------------------------------------------------------------------------------


def gradients(rank, path, fused):
    from megatron_policysplit.actor import model

    options = model.model_options
    model.model_options = lambda *arguments: {**options(*arguments), "gradient_accumulation_fusion": fused}
    case, actor = build(path)
    rows, placed = place(actor, case)
    assert len(placed.trained(0)) > 2
    builder = case.builder(rows, actor.log_probs(placed), placed, actor.config)
    sums = []
    actor.optimizer.step = lambda **unused: sums.extend(p.main_grad.cpu() for p in actor.model.parameters())
    actor.update(placed, 0, builder.for_step(0, None))
    added = [name for name, parameter in actor.model.named_parameters() if parameter.grad_added_to_main_grad]
    return sums, added


@needs_transformer_engine
def test_fused_weight_gradients_are_those_of_autograd(path):
    """To the precision of bf16, to which autograd's are rounded once a micro-batch."""
    ((plain, _),) = run_distributed(gradients, 1, path, False, timeout_seconds=280)
    ((fused, added),) = run_distributed(gradients, 1, path, True, timeout_seconds=280)
    assert sum("linear_fc1.weight" in name for name in added) == 14
    assert len(fused) == len(plain)
    for found, expected in zip(fused, plain, strict=True):
        assert found.isfinite().all() and expected.norm() > 0
        assert (found - expected).norm() < 2**-7 * expected.norm()


# --- determinism -------------------------------------------------------------------------------------


def train(rank, path):
    case, actor = build(path, **{"train.deterministic": True})
    for batch in range(2):
        rows, placed = place(actor, case, batch)
        old = actor.log_probs(placed)
        update = update_batch(actor, placed, case.builder(rows, old, placed, actor.config))
        assert update.first_ratio_off_one == 0
    return [parameter.detach().cpu() for parameter in actor.model.parameters()]


def test_deterministic_training_gives_the_same_bits_again(path):
    environ = os.environ | defaults(tensor=1, deterministic=True, capability=torch.cuda.get_device_capability())
    (first,), (second,) = (run_distributed(train, 1, path, environ=environ, timeout_seconds=280) for _ in range(2))
    assert all(map(torch.equal, first, second))
