"""Vocabulary-parallel statistics against plain torch on the unsharded logits, in real process groups."""

import torch

from megatron_policysplit.vocab_parallel import VocabularyShard, pair_statistics, token_statistics
from tests.support.vocabulary import (
    SIZES,
    TOKENS,
    Sharded,
    as_tests,
    assert_same_bits_everywhere,
    counted_collectives,
    extreme_logits,
    extreme_pair,
    gathered,
    mine,
    mixed_temperatures,
    plain_kl,
    plain_statistics,
    random,
    random_targets,
    ranks,
    shard_of,
)


def kl_divergence(a, b, temperature_a, temperature_b, shard):
    """Both ways; the targets do not matter."""
    both = pair_statistics(a, b, torch.zeros(len(a), dtype=torch.int64), temperature_a, temperature_b, shard)
    return both.kl_ab, both.kl_ba


def check_statistics():
    for vocab in SIZES:
        full, targets = random(TOKENS, vocab, seed=vocab), random_targets(vocab)
        for temperature in (torch.ones(TOKENS), mixed_temperatures()):
            logprobs, entropy = token_statistics(mine(full), targets, temperature, shard_of(vocab))
            assert logprobs.dtype == entropy.dtype == torch.float32
            expected = plain_statistics(full, targets, temperature)
            torch.testing.assert_close(logprobs.double(), expected[0], rtol=1e-6, atol=2e-6)
            torch.testing.assert_close(entropy.double(), expected[1], rtol=1e-6, atol=2e-6)
            assert_same_bits_everywhere(logprobs.detach(), entropy.detach())


def check_gradients():
    """Weighted sum of both outputs; padding columns get no gradient."""
    for vocab in SIZES:
        full, targets = random(TOKENS, vocab, seed=vocab, dtype=torch.float64), random_targets(vocab)
        by_logprob, by_entropy = random(2, TOKENS, seed=5, dtype=torch.float64)
        for temperature in (torch.ones(TOKENS), mixed_temperatures()):
            local = mine(full)
            logprobs, entropy = token_statistics(local, targets, temperature, shard_of(vocab))
            assert logprobs.dtype == torch.float64
            (logprobs * by_logprob + entropy * by_entropy).sum().backward()
            plain = full.clone().requires_grad_()
            logprobs, entropy = plain_statistics(plain, targets, temperature)
            (logprobs * by_logprob + entropy * by_entropy).sum().backward()
            grad, padding = gathered(local.grad, vocab)
            torch.testing.assert_close(grad, plain.grad, rtol=1e-10, atol=1e-12)
            assert (padding == 0).all()


def check_gradcheck():
    temperature, targets = mixed_temperatures()[:3], torch.tensor([0, 4, 2])
    full = random(3, 5, seed=3, scale=1.0, dtype=torch.float64).requires_grad_()

    def statistics(full):
        return token_statistics(Sharded.apply(full, 1), targets, temperature, shard_of(5))

    assert torch.autograd.gradcheck(statistics, (full,))


def check_extreme_logits():
    """Logits 1e4 apart: nothing overflows, and values and gradients stay those of fp64."""
    for vocab in SIZES:
        full, targets = extreme_logits(vocab), random_targets(vocab)
        temperature = mixed_temperatures()
        local = mine(full)
        logprobs, entropy = token_statistics(local, targets, temperature, shard_of(vocab))
        (logprobs + entropy).sum().backward()
        plain = full.double().requires_grad_()
        expected = plain_statistics(plain, targets, temperature)
        sum(expected).sum().backward()
        torch.testing.assert_close(logprobs.double(), expected[0], rtol=1e-6, atol=2e-6)
        torch.testing.assert_close(entropy.double(), expected[1], rtol=1e-6, atol=2e-6)
        assert entropy[0].item() == 0.0 and logprobs[0].item() == 0.0
        grad, padding = gathered(local.grad, vocab)
        torch.testing.assert_close(grad.double(), plain.grad, rtol=1e-5, atol=2e-6)
        assert (padding == 0).all()
        assert_same_bits_everywhere(logprobs.detach(), entropy.detach())


def check_kl():
    for vocab in SIZES:
        a = random(TOKENS, vocab, seed=vocab)
        b = a + random(TOKENS, vocab, seed=vocab + 1, scale=0.3)
        for temperature_a, temperature_b in (
            (torch.ones(TOKENS), torch.ones(TOKENS)),
            (mixed_temperatures(), mixed_temperatures(flip=True)),
        ):
            there, back = kl_divergence(mine(a), mine(b), temperature_a, temperature_b, shard_of(vocab))
            assert there.dtype == back.dtype == torch.float32
            expected_there = plain_kl(a, b, temperature_a, temperature_b)
            expected_back = plain_kl(b, a, temperature_b, temperature_a)
            torch.testing.assert_close(there.double(), expected_there, rtol=1e-5, atol=2e-6)
            torch.testing.assert_close(back.double(), expected_back, rtol=1e-5, atol=2e-6)
            assert_same_bits_everywhere(there, back)


def check_kl_of_extreme_logits():
    for vocab in SIZES:
        a, b = extreme_pair(vocab)
        ones = torch.ones(TOKENS)
        there, back = kl_divergence(mine(a), mine(b), ones, ones, shard_of(vocab))
        torch.testing.assert_close(there.double(), plain_kl(a, b, ones, ones), rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(back.double(), plain_kl(b, a, ones, ones), rtol=1e-5, atol=2e-6)
        assert_same_bits_everywhere(there, back)


def check_kl_of_equal_logits():
    """Exactly zero, whatever the temperature and the scale."""
    for vocab in SIZES:
        for scale in (3.0, 1e4):
            logits, temperature = random(TOKENS, vocab, seed=2, scale=scale), mixed_temperatures()
            for kl in kl_divergence(mine(logits), mine(logits), temperature, temperature, shard_of(vocab)):
                assert (kl == 0).all()


def check_bfloat16_logits():
    """Statistics of bf16 logits are those of the same numbers in fp32; the gradient comes back in bf16."""
    full, targets = random(TOKENS, 131, seed=4, dtype=torch.bfloat16), random_targets(131)
    local = mine(full)
    logprobs, entropy = token_statistics(local, targets, torch.ones(TOKENS), shard_of(131))
    assert logprobs.dtype == entropy.dtype == torch.float32
    in_fp32 = token_statistics(mine(full.float()), targets, torch.ones(TOKENS), shard_of(131))
    assert torch.equal(logprobs, in_fp32[0]) and torch.equal(entropy, in_fp32[1])
    logprobs.sum().backward()
    assert local.grad.dtype == torch.bfloat16


def check_pair_statistics():
    """One call gives what two of `token_statistics` give, bit for bit, and the KL."""
    a, b, targets = random(TOKENS, 131, seed=1), random(TOKENS, 131, seed=2), random_targets(131)
    t_a, t_b = mixed_temperatures(), mixed_temperatures(flip=True)
    both = pair_statistics(mine(a), mine(b), targets, t_a, t_b, shard_of(131))
    for own, logits, temperature in ((both[:2], a, t_a), (both[2:4], b, t_b)):
        alone = token_statistics(mine(logits), targets, temperature, shard_of(131))
        assert all(torch.equal(x, y) for x, y in zip(own, alone, strict=True))
    assert_same_bits_everywhere(*(value.detach() for value in both))


def check_pair_gradcheck():
    t_a, t_b, targets = mixed_temperatures()[:3], mixed_temperatures(flip=True)[:3], torch.tensor([0, 4, 2])
    a, b = (random(3, 5, seed=seed, scale=1.0, dtype=torch.float64).requires_grad_() for seed in (3, 4))

    def statistics(a, b):
        return pair_statistics(Sharded.apply(a, 1), Sharded.apply(b, 1), targets, t_a, t_b, shard_of(5))

    assert torch.autograd.gradcheck(statistics, (a, b))


def check_collectives():
    """One all-gather a call if the vocabulary is sharded, of 4 (pair: 14) floats a token; none in backward."""
    full, targets, temperature = random(TOKENS, 131, seed=6), random_targets(131), torch.ones(TOKENS)
    local = mine(full)
    sharded = ranks() > 1
    with counted_collectives() as calls:
        logprobs, entropy = token_statistics(local, targets, temperature, shard_of(131))
        assert calls == ([("all_gather", 4 * TOKENS)] if sharded else [])
        calls.clear()
        (logprobs + entropy).sum().backward()
        assert calls == []
        both = pair_statistics(local, local, targets, temperature, temperature, shard_of(131))
        assert calls == ([("all_gather", 14 * TOKENS)] if sharded else [])
        calls.clear()
        sum(value.sum() for value in both).backward()
        assert calls == []


test_on_one_rank, test_on_sharded_vocabulary = as_tests(
    check_statistics,
    check_gradients,
    check_gradcheck,
    check_extreme_logits,
    check_kl,
    check_kl_of_extreme_logits,
    check_kl_of_equal_logits,
    check_bfloat16_logits,
    check_pair_statistics,
    check_pair_gradcheck,
    check_collectives,
)


def test_shards_cover_the_vocabulary_once():
    for vocab in range(1, 20):
        for tensor in (1, 2, 4):
            columns = -(-vocab // tensor)
            shards = [VocabularyShard.of(vocab, columns, rank, None) for rank in range(tensor)]
            ids = [id for shard in shards for id in range(shard.start, shard.start + shard.columns)]
            assert ids == list(range(vocab))
    assert VocabularyShard.of(5, 2, 3, None).columns == 0
