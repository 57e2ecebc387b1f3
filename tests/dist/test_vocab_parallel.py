"""Vocabulary-parallel statistics against plain torch on the unsharded logits, in real process groups."""

import functools
import traceback

import pytest
import torch
import torch.distributed as dist

from megatron_policysplit.vocab_parallel import VocabularyShard, kl_divergence, token_statistics
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


def mixed_temperatures(flip=False):
    """0.6 and 1.0 in turn, as micro-batches that hold rows of both modes have them."""
    return torch.tensor([0.6 if (token % 2 == 0) != flip else 1.0 for token in range(TOKENS)])


def shard_of(vocab):
    return VocabularyShard.of(vocab, -(-vocab // ranks()), rank(), group())


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


# --- checks, run by every rank -----------------------------------------------------------------------


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


class _Sharded(torch.autograd.Function):
    """full [T, V], the same on all ranks -> this rank's shard; backward sums over the ranks."""

    @staticmethod
    def forward(ctx, full):
        ctx.vocab = full.shape[1]
        return mine(full).detach()

    @staticmethod
    def backward(ctx, grad):
        return gathered(grad, ctx.vocab)[0].clone()


def check_gradcheck():
    temperature, targets = mixed_temperatures()[:3], torch.tensor([0, 4, 2])
    full = random(3, 5, seed=3, scale=1.0, dtype=torch.float64).requires_grad_()

    def statistics(full):
        return token_statistics(_Sharded.apply(full), targets, temperature, shard_of(5))

    assert torch.autograd.gradcheck(statistics, (full,))


def check_extreme_logits():
    """Logits 1e4 apart: nothing overflows, and values and gradients stay those of fp64."""
    for vocab in SIZES:
        full, targets = random(TOKENS, vocab, seed=vocab), random_targets(vocab)
        full[0, 0] += 1e4  # the target is certain
        full[1, 0] += 1e4  # the target is hopeless
        full[2] -= 1e4  # a common shift changes nothing
        full[3] += 1e4
        full[4, : vocab // 2] -= 1e4  # whole shards far below
        full[5, 1] = full[5, 4] = 1e4  # a tie of two columns that TP=4 puts on different ranks
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
            assert there.dtype == back.dtype == torch.float32 and not there.requires_grad
            expected_there = plain_kl(a, b, temperature_a, temperature_b)
            expected_back = plain_kl(b, a, temperature_b, temperature_a)
            torch.testing.assert_close(there.double(), expected_there, rtol=1e-5, atol=2e-6)
            torch.testing.assert_close(back.double(), expected_back, rtol=1e-5, atol=2e-6)
            assert_same_bits_everywhere(there, back)


def check_kl_of_extreme_logits():
    for vocab in SIZES:
        a = random(TOKENS, vocab, seed=vocab)
        b = a + random(TOKENS, vocab, seed=vocab + 1, scale=0.3)
        a[0, 0] += 1e4  # certain under a, one of many under b: one way is 1e4 nats and more
        b[1, 0] += 1e4
        a[2] += 1e4  # a shift between the two changes no probability: the KL stays small and must stay right
        b[3] -= 1e4
        a[4, : vocab // 2] -= 1e4
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


def check_collectives():
    """One all-gather a call if the vocabulary is sharded, of 4 (KL: 6) floats a token; none in backward."""
    names = ("all_gather", "all_reduce", "all_gather_into_tensor", "broadcast", "reduce_scatter_tensor", "all_to_all")
    calls = []
    originals = {name: getattr(dist, name) for name in names}

    def counted(name, *args, **kwargs):
        numel = args[1].numel() if name == "all_gather" else None
        calls.append((name, numel))
        return originals[name](*args, **kwargs)

    full, targets, temperature = random(TOKENS, 131, seed=6), random_targets(131), torch.ones(TOKENS)
    local = mine(full)
    for name in names:
        setattr(dist, name, functools.partial(counted, name))
    try:
        logprobs, entropy = token_statistics(local, targets, temperature, shard_of(131))
        forward, calls = calls, []
        (logprobs + entropy).sum().backward()
        backward, calls = calls, []
        kl_divergence(local, local, temperature, temperature, shard_of(131))
    finally:
        for name in names:
            setattr(dist, name, originals[name])
    sharded = ranks() > 1
    assert forward == ([("all_gather", 4 * TOKENS)] if sharded else [])
    assert backward == []
    assert calls == ([("all_gather", 6 * TOKENS)] if sharded else [])


CHECKS = {
    check.__name__.removeprefix("check_"): check
    for check in (
        check_statistics,
        check_gradients,
        check_gradcheck,
        check_extreme_logits,
        check_kl,
        check_kl_of_extreme_logits,
        check_kl_of_equal_logits,
        check_bfloat16_logits,
        check_collectives,
    )
}


def run_checks(rank):
    """Every check in one process group; its traceback if it failed. All ranks see the same numbers."""
    from datetime import timedelta

    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    try:
        return {name: outcome(check) for name, check in CHECKS.items()}
    finally:
        dist.destroy_process_group()


def outcome(check):
    try:
        check()
    except Exception:
        return traceback.format_exc()
    return None


@functools.cache
def failures(tensor):
    """Check name -> traceback or None on every rank."""
    return run_distributed(run_checks, tensor)


@pytest.mark.parametrize("name", CHECKS)
def test_on_one_rank(name):
    CHECKS[name]()


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("tensor", (2, 4))
def test_on_sharded_vocabulary(tensor, name):
    for rank, results in enumerate(failures(tensor)):
        assert results[name] is None, f"rank {rank} of {tensor}:\n{results[name]}"


def test_shards_cover_the_vocabulary_once():
    for vocab in range(1, 20):
        for tensor in (1, 2, 4):
            columns = -(-vocab // tensor)
            shards = [VocabularyShard.of(vocab, columns, rank, None) for rank in range(tensor)]
            ids = [id for shard in shards for id in range(shard.start, shard.start + shard.columns)]
            assert ids == list(range(vocab))
    assert VocabularyShard.of(5, 2, 3, None).columns == 0
