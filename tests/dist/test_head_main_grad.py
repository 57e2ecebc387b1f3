"""The LM head's weight gradient in Megatron's main_grad: under its real DDP, in bf16, straight and by a buffer."""

import functools
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_policysplit.vocab_parallel import chunk_pass, fused_loss, weight_gradient
from megatron_policysplit.vocab_parallel.weight_gradient import add_product
from tests.support.dist import run_distributed
from tests.support.head_inputs import inputs
from tests.support.hf_models import make_model
from tests.support.training_cases import SEED, Case, update_batch
from tests.support.training_cases import VOCAB as SIZE_OF_VOCABULARY
from tests.support.vocabulary import head_of, plain_statistics

VOCAB, HIDDEN, TOKENS, CHUNK, BATCHES = 37, 6, 40, 16, 3
RANKS = 2  # replicas


def token_loss(span, logprobs, entropy):
    return (torch.exp(0.3 * logprobs) - 0.2 * entropy**2).sum()


def batches(rank):
    """Ids of a micro-batch's tokens and their targets, `BATCHES` of a replica."""
    random = torch.Generator().manual_seed(rank)
    return [torch.randint(0, VOCAB, (2, TOKENS), generator=random) for _ in range(BATCHES)]


def weights():
    """Embedding and head, [VOCAB, HIDDEN] each, of values that bf16 has."""
    random = torch.Generator().manual_seed(9)
    return (torch.randn(2, VOCAB, HIDDEN, generator=random)).bfloat16()


class TwoEnds(torch.nn.Module):
    """An embedding and a head, perhaps tied, and nothing between them."""

    def __init__(self, tied, dtype):
        super().__init__()
        embedding, head = (torch.nn.Parameter(weight.to(dtype)) for weight in weights())
        self.embedding = embedding
        self.head = embedding if tied else head

    def forward(self, ids):
        return torch.nn.functional.embedding(ids, self.embedding)


# --- in every process ----------------------------------------------------------------------------------


class CreatedShapes(TorchDispatchMode):
    """The shapes of the tensors that operations return in storage of their own."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.shapes += [tuple(t.shape) for t in made if t.untyped_storage().data_ptr() not in given]
        return result


def train(layout, tied, dtype, at_once):
    """main_grad of both parameters after some micro-batches, and how many tensors of the head's shape a loss made."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer import TransformerConfig

    from megatron_policysplit.vocab_parallel import Head, VocabularyShard

    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=1, calculate_per_token_loss=True, bf16=dtype == torch.bfloat16
    )
    module = TwoEnds(tied, dtype)
    ddp = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), module)
    ddp.zero_grad_buffer()
    head = Head(module.head, VocabularyShard.of(VOCAB, VOCAB, 0, None), CHUNK)
    created = 0
    for ids, targets in batches(layout.rank):
        hidden = ddp(ids)
        with CreatedShapes() as watch:
            loss = fused_loss(head, hidden, targets, torch.ones(TOKENS), token_loss, at_once=at_once).loss
        created += watch.shapes.count((VOCAB, HIDDEN))
        loss.backward()
        assert all(parameter.grad is None for parameter in module.parameters())
        assert not any(parameter.grad_added_to_main_grad for parameter in module.parameters())
    ddp.finish_grad_sync()
    return {name: parameter.main_grad.clone() for name, parameter in module.named_parameters()}, created


def run(rank):
    from megatron_policysplit.actor.parallel import initialize
    from megatron_policysplit.config import ParallelConfig

    layout = initialize(ParallelConfig(data=RANKS), seed=1, timeout_seconds=60)
    chunk_pass.SLICE_ROWS = weight_gradient.SLICE_ROWS = 11  # a slice shall not have the whole weight's shape
    return {
        (tied, dtype, at_once): train(layout, tied, dtype, at_once)
        for tied in (False, True)
        for dtype in (torch.float32, torch.bfloat16)
        for at_once in (False, True)
    }


# --- what they must be ---------------------------------------------------------------------------------


@functools.cache
def outcomes():
    return run_distributed(run, RANKS)


def reference(tied):
    """Gradients in fp64 by plain torch, of all replicas' micro-batches."""
    embedding, head = (weight.double().requires_grad_() for weight in weights())
    if tied:
        head = embedding
    for rank in range(RANKS):
        for ids, targets in batches(rank):
            logits = embedding[ids] @ head.t()
            token_loss(None, *plain_statistics(logits, targets, torch.ones(TOKENS))).backward()
    return {"embedding": embedding.grad} | ({} if tied else {"head": head.grad})


@pytest.mark.parametrize("at_once", [False, True], ids=["buffer", "at_once"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_main_grad_is_the_gradient(tied, dtype, at_once):
    expected = reference(tied)
    # In bf16 the gradients of logits and hidden states are rounded to 9 bits.
    bound = 1e-6 if dtype == torch.float32 else 4e-3
    for gradients, _ in (result[tied, dtype, at_once] for result in outcomes()):
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            assert gradient.dtype == torch.float32
            assert (gradient - expected[name]).norm() < bound * expected[name].norm(), name


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_in_32_bits_at_once_changes_no_bit(tied):
    for result in outcomes():
        buffered, at_once = (result[tied, torch.float32, at_once][0] for at_once in (False, True))
        assert all(torch.equal(buffered[name], at_once[name]) for name in buffered)


def test_at_once_needs_no_tensor_of_the_weights_size():
    for result in outcomes():
        assert result[False, torch.bfloat16, True][1] == 0
        assert result[False, torch.bfloat16, False][1] >= BATCHES  # it counts what it is to count


# --- in the actor, whose schedule calls backward -------------------------------------------------------


def train_both_ways(rank, shape, path):
    """Gradients in bf16 of one step by two actors; the second one's losses are not at once."""
    from checkpoints_conv import read_hf_config
    from megatron_policysplit.actor import actor as actors
    from megatron_policysplit.actor.parallel import initialize
    from megatron_policysplit.config import ParallelConfig

    tensor, pipeline = shape
    layout = initialize(ParallelConfig(tensor=tensor, pipeline=pipeline, data=1), seed=1, timeout_seconds=60)
    case = Case("bf16", settings={"model.dtype": "bfloat16", "train.head_chunk_tokens": 8})
    straight, found = actors.fused_loss, []
    for fused in (straight, lambda *arguments, at_once: straight(*arguments)):
        actors.fused_loss = fused
        actor = actors.Actor(case.config(path), read_hf_config(path), layout)
        rows = case.rows(0) if layout.is_leader else []
        placed = actor.place(rows, case.live(rows, actor.config), seed=SEED)
        old = actor.log_probs(placed)
        metrics = update_batch(actor, placed, case.builder(rows, old, placed, actor.config, None))
        assert metrics.first_ratio_off_one == 0
        found.append({name: parameter.main_grad.clone() for name, parameter in actor.model.named_parameters()})
    return found


@pytest.mark.parametrize("shape", [(2, 1), (1, 2)], ids=["tp2", "pp2"])
def test_both_ways_in_the_actor(tmp_path, shape):
    """A tied head, and on two stages the last one's copy of the embedding."""
    path = str(make_model(tmp_path / "qwen3", "qwen3", tied=True, vocab=SIZE_OF_VOCABULARY))
    for at_once, buffered in run_distributed(train_both_ways, 2, shape, path):
        for name, gradient in at_once.items():
            assert gradient.norm() > 0 and (gradient - buffered[name]).norm() < 1e-5 * gradient.norm(), name


# --- without DDP ---------------------------------------------------------------------------------------


def test_backward_with_another_factor_is_refused():
    hidden, weight, targets, temperature = inputs(VOCAB, torch.bfloat16)
    head = head_of(weight, CHUNK)
    head.weight.main_grad = torch.zeros(weight.shape)
    leaf = hidden.clone().requires_grad_()
    loss = fused_loss(head, leaf, targets, temperature.bfloat16(), token_loss, at_once=True).loss
    with pytest.raises(RuntimeError, match="in main_grad already, and backward wants it times 2.0"):
        (2 * loss).backward()


def test_without_main_grad_autograd_gets_the_gradient():
    hidden, weight, targets, temperature = inputs(VOCAB, torch.bfloat16)
    head = head_of(weight, CHUNK)
    (2 * fused_loss(head, hidden, targets, temperature, token_loss, at_once=True).loss).backward()
    plain = weight.double().requires_grad_()
    (2 * token_loss(None, *plain_statistics(hidden.double() @ plain.t(), targets, temperature))).backward()
    assert head.weight.grad.dtype == torch.bfloat16
    assert (head.weight.grad - plain.grad).norm() < 6e-3 * plain.grad.norm()


def factors():
    """grad_logits^T [N, T] and hidden states [T, M] in bf16; their product in fp64."""
    random = torch.Generator().manual_seed(0)
    a, b = torch.randn(300, 70, generator=random).bfloat16(), torch.randn(70, 5, generator=random).bfloat16()
    return a, b, a.double() @ b.double()


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@contextmanager
def addmm_of_a_gpu(monkeypatch):
    """torch.addmm and mm with `out_dtype` as torch 2.10 has it on a GPU; yields how often it was used."""
    used = []
    addmm, mm = torch.addmm, torch.mm

    def mixed_addmm(total, a, b, *, beta=1, out=None, out_dtype=None):
        if out_dtype is None:
            return addmm(total, a, b, beta=beta, out=out)
        assert a.dtype == b.dtype == torch.bfloat16 and out_dtype == torch.float32 == out.dtype
        assert total.dtype in (out_dtype, a.dtype)
        used.append("addmm")
        product = (a.double() @ b.double()).float()
        return out.copy_(product if beta == 0 else total * beta + product)

    def mixed_mm(a, b, *, out=None, out_dtype=None):
        if out_dtype is None:
            return mm(a, b, out=out)
        assert a.dtype == b.dtype == torch.bfloat16 and out_dtype == torch.float32 == out.dtype
        used.append("mm")
        return out.copy_((a.double() @ b.double()).float())

    with monkeypatch.context() as patch:
        patch.setattr(torch, "addmm", mixed_addmm)
        patch.setattr(torch, "mm", mixed_mm)
        yield used


@pytest.mark.parametrize("mixed", [False, True])
def test_products_are_not_rounded_to_16_bits(monkeypatch, mixed):
    a, b, product = factors()
    monkeypatch.setattr(weight_gradient, "SLICE_ROWS", 64)
    total = torch.full((300, 5), float("nan"))
    with addmm_of_a_gpu(monkeypatch) as used:
        add_product(total, a, b, 0, mixed)
        assert relative_error(total, product) < 1e-6
        add_product(total, a, b, 1, mixed)
    assert relative_error(total, 2 * product) < 1e-6
    assert relative_error((a @ b).double(), product) > 1e-3  # what rounding would cost
    assert used == (["addmm"] * 2 if mixed else [])


def test_a_head_with_mixed_products(monkeypatch):
    """Logits and weight gradient by `out_dtype`: the same as by widened operands, up to rounding."""
    hidden, weight, targets, temperature = inputs(VOCAB, torch.bfloat16)
    found = []
    for mixed in (False, True):
        head, leaf = head_of(weight, CHUNK, mixed_products=mixed), hidden.clone().requires_grad_()
        head.weight.main_grad = torch.zeros(weight.shape)
        with addmm_of_a_gpu(monkeypatch) as used:
            got = fused_loss(head, leaf, targets, temperature, token_loss, at_once=True)
            got.loss.backward()
        assert set(used) == ({"addmm", "mm"} if mixed else set())
        found.append((got.logprobs, got.entropy, head.weight.main_grad))
    for widened, by_out_dtype in zip(*found, strict=True):
        torch.testing.assert_close(by_out_dtype, widened, rtol=1e-3, atol=1e-4)
