"""The nucleus by Triton kernels, in Triton's interpreter, against plain torch in fp64 and against the torch head."""

import functools

import pytest
import torch

from megatron_policysplit.vocab_parallel import fused_loss, score
from tests.dist.test_nucleus import HIDDEN, TOKENS, curved, plain_entropy, plain_nucleus
from tests.support.dist import run_distributed
from tests.support.interpreted_triton import interpreted_kernels
from tests.support.vocabulary import (
    assert_same_bits_everywhere,
    counted_collectives,
    exact_head,
    head_of,
    outcome,
    random,
    ranks,
    rows_of,
    run_checks,
)

CHUNK = 17  # of TOKENS: two whole chunks and a ragged one
SIZES = (1, 5, 131)  # of one column over two ranks the second has padding alone
TILE = 512  # logits that are searched at a time: several tiles of rows a chunk at the largest size
MASSES = (0.3, 0.8)


def inputs(vocab, dtype=torch.float32):
    """hidden [T, H], weight [V, H], targets, temperatures 0.6 and 1 in turn.

    Multiples of 2^-4 of few bits, so that logits are exact in fp32 however they are summed, and in bf16 operands: equal
    columns have equal logits, and of so coarse ones there are many. Every fifth row of hidden states is 0: all its
    logits are equal.
    """
    hidden, weight = random(TOKENS, HIDDEN, seed=1, scale=1.0), random(vocab, HIDDEN, seed=2, scale=2.0)
    hidden[::5] = 0
    hidden, weight = (torch.round(values * 16) / 16 for values in (hidden, weight))
    weight[vocab - 1] = weight[0]
    targets = torch.randint(0, vocab, (TOKENS,), generator=torch.Generator().manual_seed(3))
    assert torch.equal(hidden.bfloat16().float(), hidden) and torch.equal(weight.bfloat16().float(), weight)
    return hidden.to(dtype), weight.to(dtype), targets, torch.tensor([0.6, 1.0]).repeat(TOKENS // 2)


def by_kernels(weight, chunk=CHUNK):
    return head_of(weight, chunk, TILE, triton=True)


def check_the_nucleus_is_found():
    """Its columns and thresholds exactly, ties and flat rows included, its entropy, and the collectives it costs."""
    for dtype in (torch.float32, torch.bfloat16):
        for vocab in SIZES if dtype == torch.float32 else SIZES[-1:]:
            hidden, weight, targets, temperature = inputs(vocab, dtype)
            logits = hidden.double() @ weight.double().t()
            for mass in MASSES:
                kept = plain_nucleus(logits, temperature, mass)
                head = by_kernels(weight)
                with counted_collectives() as calls:
                    found = score(head, hidden, targets, temperature, nucleus=mass).nucleus
                assert torch.equal(logits >= found.threshold[:, None], kept)
                expected = plain_entropy(logits, temperature, kept)
                torch.testing.assert_close(found.entropy.double(), expected, rtol=1e-5, atol=1e-5)
                assert_same_bits_everywhere(*found.__dict__.values())
                by_torch = score(head_of(weight, CHUNK), hidden, targets, temperature, nucleus=mass).nucleus
                assert torch.equal(found.threshold, by_torch.threshold)
                # Rows of a tile: their own offers, and the statistics of all rows at the end.
                tiles = sum(len(list(head.shard.tiles(n, len(head.weight)))) for n in (17, 17, 6))
                assert len(calls) >= (tiles + 1) * (ranks() > 1) and (ranks() > 1 or not calls)


def check_all_of_the_mass_is_the_whole_vocabulary():
    """Up to columns whose probability is lost beside 1 in fp32."""
    for vocab in SIZES:
        hidden, weight, targets, temperature = inputs(vocab)
        got = score(by_kernels(weight), hidden, targets, temperature, nucleus=1.0)
        torch.testing.assert_close(got.nucleus.entropy, got.entropy, rtol=1e-5, atol=1e-5)


def check_the_first_candidates_are_too_few():
    from megatron_policysplit.vocab_parallel import nucleus

    hidden, weight, targets, temperature = inputs(131)
    nucleus.CANDIDATES, before = 2, nucleus.CANDIDATES
    try:
        found = score(by_kernels(weight), hidden, targets, temperature, nucleus=0.8).nucleus
    finally:
        nucleus.CANDIDATES = before
    kept = plain_nucleus(hidden.double() @ weight.double().t(), temperature, 0.8)
    assert torch.equal(hidden.double() @ weight.double().t() >= found.threshold[:, None], kept)


def check_extreme_logits():
    """One column 1e4 above the others, and a common shift of 1e4."""
    hidden, weight, targets, temperature = inputs(131)
    logits = hidden @ weight.t()
    logits[0, 3] += 1e4
    logits[1:] += 1e4
    head, states = exact_head(logits, 7)
    head = head_of(logits.t(), 7, TILE, triton=True)
    found = score(head, states.detach(), targets, temperature, nucleus=0.8).nucleus
    kept = plain_nucleus(logits.double(), temperature, 0.8)
    assert torch.equal(logits >= found.threshold[:, None], kept) and kept[0].sum() == 1 and found.entropy[0] == 0
    expected = plain_entropy(logits.double(), temperature, kept)
    torch.testing.assert_close(found.entropy.double(), expected, rtol=1e-5, atol=1e-5)


def check_gradients():
    """Of a loss of log-prob, entropy and nucleus, with thresholds of other weights, against autograd in fp64."""
    for vocab in SIZES:
        hidden, weight, targets, temperature = inputs(vocab)
        earlier = (hidden.roll(1, 1), weight, targets, temperature)
        thresholds = score(by_kernels(weight), *earlier[:1], *earlier[2:], nucleus=0.8).nucleus.threshold
        leaves = [values.double().requires_grad_() for values in (hidden, weight)]
        logits = leaves[0] @ leaves[1].t()
        log_p = (logits / temperature[:, None]).log_softmax(-1)
        inside = logits.detach() >= thresholds[:, None]
        # A nucleus that no logit reaches any more has no entropy and no gradient.
        some = inside.any(1)
        entropy = torch.zeros(TOKENS).double()
        entropy[some] = plain_entropy(logits[some], temperature[some], inside[some])
        own = (log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1))
        truth = curved(slice(None), *own, entropy)
        truth.backward()
        for chunk in (CHUNK, TOKENS):
            head, leaf = by_kernels(weight, chunk), hidden.clone().requires_grad_()
            got = fused_loss(head, leaf, targets, temperature, curved, thresholds)
            got.loss.backward()
            torch.testing.assert_close(got.loss.double(), truth.detach(), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(leaf.grad.double(), leaves[0].grad, rtol=1e-4, atol=1e-4)
            mine, expected = rows_of(head, vocab, leaves[1].grad)
            torch.testing.assert_close(mine.double(), expected, rtol=1e-4, atol=1e-4)
            assert_same_bits_everywhere(got.loss.detach()[None], got.logprobs, leaf.grad)


def check_bits():
    """Log-probs and entropies are those without a nucleus, in scoring and in training: the first ratio is 1."""
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight, targets, temperature = inputs(131, dtype)
        head = by_kernels(weight)
        alone = score(head, hidden, targets, temperature)
        found = score(head, hidden, targets, temperature, nucleus=0.8)
        leaf = hidden.clone().requires_grad_()
        seen = []

        def loss(span, logprobs, entropy, nucleus, seen=seen):
            seen.append(nucleus.detach())
            return curved(span, logprobs, entropy, nucleus)

        with counted_collectives() as calls:
            trained = fused_loss(head, leaf, targets, temperature, loss, found.nucleus.threshold)
        assert calls == ([("all_gather", 6 * n) for n in (17, 17, 6)] if ranks() > 1 else [])
        for name in ("logprobs", "entropy"):
            assert torch.equal(getattr(alone, name), getattr(found, name))
            assert torch.equal(getattr(alone, name), getattr(trained, name))
        torch.testing.assert_close(torch.cat(seen), found.nucleus.entropy, rtol=1e-5, atol=1e-5)


def check_an_empty_nucleus():
    """Logits may have left a threshold that was found some steps ago."""
    hidden, weight, targets, temperature = inputs(131)
    leaf = hidden.requires_grad_()
    loss = fused_loss(
        by_kernels(weight), leaf, targets, temperature, lambda s, lp, h, n: n.sum(), torch.full((TOKENS,), 1e6)
    ).loss
    loss.backward()
    assert loss == 0 and (leaf.grad == 0).all()


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


@pytest.fixture(scope="module")
def kernels():
    with interpreted_kernels() as module:
        yield module


@pytest.mark.parametrize("name", CHECKS)
def test_on_one_rank(kernels, name):
    CHECKS[name]()


def interpreted_checks(rank):
    with interpreted_kernels():
        return run_checks(rank, CHECKS)


@functools.cache
def failures():
    return run_distributed(interpreted_checks, 2)


@pytest.mark.parametrize("name", CHECKS)
def test_on_two_ranks(name):
    for rank, results in enumerate(failures()):
        assert results[name] is None, f"rank {rank}:\n{results[name]}"


def test_a_nucleus_that_the_gradients_kernel_sees_and_the_sums_did_not(kernels):
    """Rounding may lift a logit over a threshold in one kernel and not in another; nothing becomes infinite."""
    from megatron_policysplit.vocab_parallel.nucleus import MergedNucleus, NucleusSlopes

    hidden, weight, targets, temperature = inputs(131)
    ones, minus_infinity = torch.ones(TOKENS), torch.full((TOKENS,), -torch.inf)
    top, total, moment, _ = kernels.reduce_head(hidden, weight, targets, temperature, 131)
    rows = (top, total.log(), total.log() - moment / total, ones, None)
    empty = NucleusSlopes(top - 1, MergedNucleus(minus_infinity, 0 * ones), ones)
    with_empty = kernels.head_gradient(hidden, weight, targets, temperature, 131, *rows, empty)
    assert torch.equal(with_empty, kernels.head_gradient(hidden, weight, targets, temperature, 131, *rows))


def test_without_columns_or_tokens(kernels):
    hidden, weight, _, temperature = inputs(5)
    assert kernels.head_logits(hidden, weight, 0).shape == (TOKENS, 5)
    assert kernels.head_logits(hidden[:0], weight, 5).shape == (0, 5)
    assert torch.equal(
        kernels.reduce_head_nucleus(hidden, weight, temperature, temperature, temperature, 0), torch.zeros(2, TOKENS)
    )
    none = temperature[:0]
    assert kernels.reduce_head_nucleus(hidden[:0], weight, none, none, none, 5).shape == (2, 0)


def test_what_does_not_fit_is_refused(kernels):
    hidden, weight, _, temperature = inputs(5)
    for call in (
        lambda: kernels.head_logits(hidden, weight.bfloat16(), 5),
        lambda: kernels.reduce_head_nucleus(hidden, weight.bfloat16(), *[temperature] * 3, 5),
    ):
        with pytest.raises(ValueError, match="do not fit an LM head"):
            call()
