"""Sharded vocabularies for tests: the unsharded truth in fp64, inputs alike on every rank, heads, collectives."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

from megatron_policysplit.vocab_parallel import TILE_ELEMENTS, Head, VocabularyShard
from tests.support.dist import run_distributed

SIZES = (5, 131, 128)  # 5 over 4 ranks: two columns a rank, and the last rank's shard is all padding
TOKENS = 7
GARBAGE = 1e6  # what stands in padding columns: a leak would win every maximum


# --- the unsharded truth -----------------------------------------------------------------------------


def plain_statistics(logits, targets, temperature):
    """Log-prob of the target and entropy, fp64."""
    log_p = (logits.double() / temperature.double()[:, None]).log_softmax(-1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def plain_kl(a, b, temperature_a, temperature_b):
    log_a = (a.double() / temperature_a.double()[:, None]).log_softmax(-1)
    log_b = (b.double() / temperature_b.double()[:, None]).log_softmax(-1)
    return (log_a.exp() * (log_a - log_b)).sum(-1)


# --- inputs, the same on every rank ------------------------------------------------------------------


def group():
    return dist.group.WORLD if dist.is_initialized() else None


def ranks():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def random(*shape, seed, scale=3.0, dtype=torch.float32):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def random_targets(vocab, seed=1):
    """Includes the first and the last id."""
    targets = torch.randint(0, vocab, (TOKENS,), generator=torch.Generator().manual_seed(seed))
    targets[0], targets[1] = 0, vocab - 1
    return targets


def extreme_logits(vocab):
    """[TOKENS, vocab] fp32, 1e4 apart; for `random_targets(vocab)`."""
    full = random(TOKENS, vocab, seed=vocab)
    full[0, 0] += 1e4  # the target is certain
    full[1, 0] += 1e4  # the target is hopeless
    full[2] -= 1e4  # a common shift changes nothing
    full[3] += 1e4
    full[4, : vocab // 2] -= 1e4  # whole shards far below
    full[5, 1] = full[5, 4] = 1e4  # a tie of two columns that TP=4 puts on different ranks
    return full


def extreme_pair(vocab):
    """Two policies' [TOKENS, vocab] fp32, 1e4 apart in themselves or from each other."""
    a = random(TOKENS, vocab, seed=vocab)
    b = a + random(TOKENS, vocab, seed=vocab + 1, scale=0.3)
    a[0, 0] += 1e4  # certain under a, one of many under b: one way is 1e4 nats and more
    b[1, 0] += 1e4
    a[2] += 1e4  # a shift between the two changes no probability: the KL stays small and must stay right
    b[3] -= 1e4
    a[4, : vocab // 2] -= 1e4
    return a, b


def mixed_temperatures(flip=False):
    """0.6 and 1.0 in turn, as micro-batches that hold rows of both modes have them."""
    return torch.tensor([0.6 if (token % 2 == 0) != flip else 1.0 for token in range(TOKENS)])


def shard_of(vocab, tile_elements=TILE_ELEMENTS):
    return VocabularyShard.of(vocab, -(-vocab // ranks()), rank(), group(), tile_elements)


def mine(full):
    """This rank's columns of full [T, V], padding filled with garbage; a leaf that wants a gradient."""
    columns = -(-full.shape[1] // ranks())
    padded = full.new_full((full.shape[0], columns * ranks()), GARBAGE)
    padded[:, : full.shape[1]] = full
    return padded[:, rank() * columns : (rank() + 1) * columns].clone().requires_grad_()


def gathered(local, vocab):
    """The ranks' [T, columns] as one [T, vocab], and their padding columns."""
    pieces = [torch.empty_like(local) for _ in range(ranks())]
    if ranks() > 1:
        dist.all_gather(pieces, local.contiguous())
    else:
        pieces = [local]
    full = torch.cat(pieces, 1)
    return full[:, :vocab], full[:, vocab:]


def assert_same_bits_everywhere(*tensors):
    for tensor in tensors:
        pieces = [torch.empty_like(tensor) for _ in range(ranks())]
        if ranks() > 1:
            dist.all_gather(pieces, tensor.contiguous())
            assert all(torch.equal(piece, tensor) for piece in pieces)


class Sharded(torch.autograd.Function):
    """full [T, V] or [V, H], the same on all ranks -> this rank's columns or rows; backward sums over the ranks."""

    @staticmethod
    def forward(ctx, full, dimension):
        ctx.size, ctx.dimension = full.shape[dimension], dimension
        return mine(full.transpose(dimension, 1) if dimension == 0 else full).detach().transpose(0, 1 - dimension)

    @staticmethod
    def backward(ctx, grad):
        by_column = grad.transpose(0, 1 - ctx.dimension)
        return gathered(by_column, ctx.size)[0].transpose(0, 1 - ctx.dimension).clone(), None


# --- heads -------------------------------------------------------------------------------------------


def head_of(weight, chunk, tile_elements=TILE_ELEMENTS, **options):
    """This rank's rows of a weight [V, H], as a leaf; garbage in the rows of padding. options: more of `Head`."""
    rows = mine(weight.t()).detach().t().contiguous().requires_grad_()
    return Head(rows, shard_of(len(weight), tile_elements), chunk, **options)


def sharded_head(weight, chunk):
    """The same, connected with the whole weight."""
    return Head(Sharded.apply(weight, 0), shard_of(len(weight)), chunk)


def rows_of(head, vocab, grad):
    """The true rows of this rank, of a gradient of the whole weight; padding must have 0 of its own."""
    start, columns = head.shard.start, head.shard.columns
    assert (head.weight.grad[columns:] == 0).all()
    return head.weight.grad[:columns], grad[start : start + columns]


def exact_head(logits, chunk):
    """A head, and hidden states of which each picks one of its columns: their product is logits [T, V] exactly."""
    hidden = torch.eye(len(logits))
    assert torch.equal(hidden @ logits, logits)
    return head_of(logits.t(), chunk), hidden.requires_grad_()


def assert_gradients(head, hidden, logits, by_logits, accuracy):
    """Of head and hidden states of `exact_head`, from the true d loss / d logits [T, V], fp64.

    The weight's are these, within accuracy [T]. The hidden states' are their product with the weight, whose terms may
    be thousands and cancel: within twice the accuracy of what the terms add up to without their signs.
    """
    got, expected = rows_of(head, logits.shape[1], by_logits.t())
    assert ((got - expected).abs() <= accuracy).all(), (got - expected).abs().max()
    error = hidden.grad - by_logits @ logits.double().t()
    terms = by_logits.abs() @ logits.double().abs().t()
    assert (error.abs() <= 2 * accuracy[:, None] * terms).all(), error.abs().max()


class Anew(torch.autograd.Function):
    """`function` of tensors, evaluated again for every backward: gradcheck goes backward more than once."""

    @staticmethod
    def forward(ctx, function, *tensors):
        ctx.function = function
        ctx.save_for_backward(*tensors)
        return function(*tensors).detach()

    @staticmethod
    def backward(ctx, scale):
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
            return None, *torch.autograd.grad(ctx.function(*leaves), leaves, scale)


# --- collectives and checks ---------------------------------------------------------------------------


@contextmanager
def counted_collectives() -> Iterator[list[tuple[str, int]]]:
    """What goes over any group meanwhile, in order: name and number of elements that this rank sends."""
    sent_argument = {"all_gather": 1, "all_gather_into_tensor": 1, "reduce_scatter_tensor": 1, "all_to_all_single": 1}
    names = ("all_gather", "all_reduce", "all_gather_into_tensor", "broadcast", "reduce_scatter_tensor", "all_to_all",
             "all_to_all_single", "send", "recv", "isend", "irecv", "batch_isend_irecv")  # fmt: skip
    originals, calls = {name: getattr(dist, name) for name in names}, []

    def counting(name: str) -> Callable:
        def call(*arguments, **keywords):
            sent = arguments[sent_argument.get(name, 0)]
            calls.append((name, sent.numel() if isinstance(sent, torch.Tensor) else -1))
            return originals[name](*arguments, **keywords)

        return call

    for name in names:
        setattr(dist, name, counting(name))
    try:
        yield calls
    finally:
        for name in names:
            setattr(dist, name, originals[name])


def run_checks(rank: int, checks: dict[str, Callable]) -> dict[str, str | None]:
    """Every check in one process group: check name -> its traceback if it failed."""
    from datetime import timedelta

    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    try:
        return {name: outcome(check) for name, check in checks.items()}
    finally:
        dist.destroy_process_group()


def outcome(check: Callable) -> str | None:
    try:
        check()
    except Exception:
        return traceback.format_exc()
    return None


def as_tests(*checks: Callable) -> tuple[Callable, Callable]:
    """`test_on_one_rank` and `test_on_sharded_vocabulary` of a module: every check in this process, and on every rank
    of groups of 2 and of 4, which are started once for all of a module's checks."""
    named = {check.__name__.removeprefix("check_"): check for check in checks}

    @functools.cache
    def failures(tensor: int) -> list[dict[str, str | None]]:
        return run_distributed(run_checks, tensor, named)

    @pytest.mark.parametrize("name", named)
    def test_on_one_rank(name):
        named[name]()

    @pytest.mark.parametrize("name", named)
    @pytest.mark.parametrize("tensor", (2, 4))
    def test_on_sharded_vocabulary(tensor, name):
        for rank, results in enumerate(failures(tensor)):
            assert results[name] is None, f"rank {rank} of {tensor}:\n{results[name]}"

    return test_on_one_rank, test_on_sharded_vocabulary
