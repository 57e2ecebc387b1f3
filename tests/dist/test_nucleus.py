"""The nucleus and its entropy over a sharded vocabulary against plain torch on all logits, in real process groups."""

import torch

from megatron_policysplit.vocab_parallel import score, fused_loss, nucleus
from tests.support.vocabulary import (
    SIZES,
    Anew,
    as_tests,
    assert_same_bits_everywhere,
    counted_collectives,
    head_of,
    random,
    ranks,
    rows_of,
    sharded_head,
)

TOKENS, HIDDEN = 40, 6
CHUNKS = (1, 7, TOKENS)
MASSES = (0.1, 0.8, 0.99, 1.0)


def inputs(vocab, dtype=torch.float32):
    """hidden [T, H], weight [V, H], targets, temperatures 0.6 and 1 in turn. Two columns are always equal.

    Multiples of 2^-10, so that logits in float64 are exact and equal columns have equal ones, in whatever order a
    processor's matrix product sums.
    """
    hidden, weight = random(TOKENS, HIDDEN, seed=1, scale=1.0, dtype=dtype), random(vocab, HIDDEN, seed=2, dtype=dtype)
    hidden[::5] *= 0.01  # nearly flat: a nucleus of most columns
    hidden, weight = (torch.round(values * 1024) / 1024 for values in (hidden, weight))
    weight[vocab - 1] = weight[0]
    targets = torch.randint(0, vocab, (TOKENS,), generator=torch.Generator().manual_seed(3))
    return hidden, weight, targets, torch.tensor([0.6, 1.0]).repeat(TOKENS // 2)


def plain_nucleus(logits, temperature, mass):
    """[T, V] bool, token by token: the most likely columns until they hold the mass, and what equals the last."""
    kept = torch.zeros_like(logits, dtype=torch.bool)
    for row, (z, t) in enumerate(zip(logits, temperature.tolist(), strict=True)):
        p, total = (z / t).softmax(-1), 0.0
        for column in z.argsort(descending=True).tolist():
            if total >= mass and z[column] < smallest:
                break
            kept[row, column] = True
            smallest, total = (z[column] if total < mass else smallest), total + p[column].item()
    return kept


def plain_entropy(logits, temperature, kept):
    log_q = (logits / temperature[:, None]).masked_fill(~kept, -torch.inf).log_softmax(-1)
    log_q = log_q.masked_fill(~kept, 0.0)
    return -(kept * log_q.exp() * log_q).sum(-1)


def exact(hidden, weight):
    """Logits in fp64 of what a head of fp32 weights computes in fp32, ties kept."""
    return (hidden @ weight.t()).double()


def check_the_nucleus_is_found():
    """Its columns exactly, its entropy, at every mass and chunk; also where the first candidates are too few."""
    for candidates in (nucleus.CANDIDATES, 2):
        nucleus.CANDIDATES, before = candidates, nucleus.CANDIDATES
        try:
            for vocab in SIZES:
                hidden, weight, targets, temperature = inputs(vocab, torch.float64)
                logits = hidden @ weight.t()
                for mass in MASSES[:3]:
                    kept = plain_nucleus(logits, temperature, mass)
                    assert mass < 0.5 or 1 < kept.sum(1).float().mean() < vocab
                    for chunk in CHUNKS:
                        found = score(head_of(weight, chunk), hidden, targets, temperature, nucleus=mass).nucleus
                        assert torch.equal(logits >= found.threshold[:, None], kept)
                        torch.testing.assert_close(found.entropy, plain_entropy(logits, temperature, kept))
                        assert_same_bits_everywhere(found.threshold, found.entropy)
        finally:
            nucleus.CANDIDATES = before


def check_all_of_the_mass_is_the_whole_vocabulary():
    for vocab in SIZES:
        hidden, weight, targets, temperature = inputs(vocab, torch.float64)
        got = score(head_of(weight, 7), hidden[::5], targets[::5], temperature[::5], nucleus=1.0)
        torch.testing.assert_close(got.nucleus.entropy, got.entropy, rtol=1e-9, atol=1e-9)


def check_extreme_logits():
    """One column 1e4 above the others, and a common shift of 1e4."""
    hidden, weight, targets, temperature = inputs(131)
    logits = exact(hidden, weight).float()
    logits[0, 3] += 1e4
    logits[1:] += 1e4
    head, states = head_of(logits.t().contiguous(), 7), torch.eye(TOKENS)
    found = score(head, states, targets, temperature, nucleus=0.8).nucleus
    kept = plain_nucleus(logits.double(), temperature, 0.8)
    assert torch.equal(logits >= found.threshold[:, None], kept) and kept[0].sum() == 1
    torch.testing.assert_close(
        found.entropy.double(), plain_entropy(logits.double(), temperature, kept), rtol=1e-5, atol=1e-5
    )
    assert found.entropy[0] == 0


def curved(span, logprobs, entropy, inner):
    """A loss that is linear in nothing, different for every token, and of all three."""
    factor = torch.linspace(0.5, 1.5, TOKENS, dtype=logprobs.dtype)[span]
    return (factor * (torch.exp(0.3 * logprobs) - 0.2 * entropy**2 + 0.7 * (inner - 0.4) ** 2)).sum()


def check_gradients():
    for vocab in SIZES:
        hidden, weight, targets, temperature = inputs(vocab, torch.float64)
        thresholds = score(head_of(weight, 7), hidden, targets, temperature, nucleus=0.8).nucleus.threshold
        plain_hidden, plain_weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logits = plain_hidden @ plain_weight.t()
        log_p = (logits / temperature[:, None]).log_softmax(-1)
        kept = plain_nucleus(logits.detach(), temperature, 0.8)
        own = (log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1))
        truth = curved(slice(None), *own, plain_entropy(logits, temperature, kept))
        truth.backward()
        for chunk in CHUNKS:
            head, leaf = head_of(weight, chunk), hidden.clone().requires_grad_()
            got = fused_loss(head, leaf, targets, temperature, curved, thresholds)
            got.loss.backward()
            torch.testing.assert_close(got.loss, truth.detach())
            torch.testing.assert_close(leaf.grad, plain_hidden.grad, rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(*rows_of(head, vocab, plain_weight.grad), rtol=1e-9, atol=1e-10)
            assert_same_bits_everywhere(got.loss.detach()[None], got.logprobs, leaf.grad)


def check_gradcheck():
    hidden, weight, targets, temperature = inputs(5, torch.float64)
    hidden, targets, temperature = hidden[:4], targets[:4], temperature[:4]
    thresholds = score(head_of(weight, 3), hidden, targets, temperature, nucleus=0.7).nucleus.threshold

    def loss(hidden, weight):
        head = sharded_head(weight, 3)
        return fused_loss(head, hidden, targets, temperature, lambda s, lp, h, n: (n**2 + 0.1 * lp).sum(), thresholds)[0]

    leaves = hidden.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda *given: Anew.apply(loss, *given), leaves)


def check_an_empty_nucleus():
    """Logits may have left a threshold that was found some steps ago."""
    hidden, weight, targets, temperature = inputs(131)
    seen = []

    def inner(span, logprobs, entropy, nucleus):
        seen.append(nucleus.detach())
        return nucleus.sum()

    leaf = hidden.requires_grad_()
    fused_loss(head_of(weight, 7), leaf, targets, temperature, inner, torch.full((TOKENS,), 1e6)).loss.backward()
    assert (torch.cat(seen) == 0).all() and (leaf.grad == 0).all()


def check_bits_and_collectives():
    """Log-probs and entropies have the bits that they have without; a nucleus that is not asked for costs nothing."""
    hidden, weight, targets, temperature = inputs(131)
    head, sharded = head_of(weight, TOKENS), ranks() > 1
    with counted_collectives() as calls:
        alone = score(head, hidden, targets, temperature)
        assert alone.nucleus is None and calls == ([("all_gather", 4 * TOKENS)] if sharded else [])
        calls.clear()
        got = score(head, hidden, targets, temperature, nucleus=0.5)
        assert {name for name, _ in calls} == ({"all_gather"} if sharded else set()) and len(calls) >= 2 * sharded
        assert torch.equal(got.logprobs, alone.logprobs) and torch.equal(got.entropy, alone.entropy)
        calls.clear()
        leaf = hidden.requires_grad_()
        with_nucleus = fused_loss(head, leaf, targets, temperature, curved, got.nucleus.threshold)
        assert calls == ([("all_gather", 6 * TOKENS)] if sharded else [])
        calls.clear()
        without = fused_loss(head, leaf, targets, temperature, lambda span, lp, h: (lp + h).sum())
        assert calls == ([("all_gather", 4 * TOKENS)] if sharded else [])
    for name in ("logprobs", "entropy"):
        assert torch.equal(getattr(with_nucleus, name), getattr(got, name))
        assert torch.equal(getattr(with_nucleus, name), getattr(without, name))


test_on_one_rank, test_on_sharded_vocabulary = as_tests(
    check_the_nucleus_is_found,
    check_all_of_the_mass_is_the_whole_vocabulary,
    check_extreme_logits,
    check_gradients,
    check_gradcheck,
    check_an_empty_nucleus,
    check_bits_and_collectives,
)
