"""The Triton kernels of the LM head, run by Triton's interpreter, against fp64 formulas on full logits."""

import pytest
import torch

from tests.support.interpreted_triton import interpreted_kernels

# Tokens, features, true columns, padded columns: blocks of the interpreter are 16 x 32 x 32.
SHAPES = [(1, 8, 5, 8), (5, 40, 70, 80), (17, 32, 64, 64), (33, 100, 131, 256), (16, 64, 1, 3)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def head():
    with interpreted_kernels() as kernels:
        yield kernels


def random_case(tokens, features, columns, padded, dtype=torch.float32, seed=0):
    """Hidden states, weight with wild padding, targets of which some are other shards', mixed temperatures."""
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, features, generator=random).to(dtype)
    weight = (torch.randn(padded, features, generator=random) * 3 / features**0.5).to(dtype)
    weight[columns:] = 100.0
    targets = torch.randint(-columns, 2 * columns + 1, (tokens,), generator=random)
    targets[0] = columns - 1
    temperature = torch.tensor([0.6, 1.0])[torch.randint(0, 2, (tokens,), generator=random)]
    return hidden, weight, targets, temperature


def full_logits(hidden, weight, columns):
    return hidden.double() @ weight[:columns].double().T


def expected_statistics(z, targets, temperature):
    highest = z.max(1).values
    x = (z - highest[:, None]) / temperature.double()[:, None]
    owned = (targets >= 0) & (targets < z.shape[1])
    at_target = z.gather(1, targets.clamp(0, z.shape[1] - 1)[:, None])[:, 0].where(owned, 0.0)
    return torch.stack([highest, x.exp().sum(1), (x.exp() * x).sum(1), at_target])


def expected_pair(z_a, z_b, temperature_a, temperature_b):
    x_a, x_b = (
        (z - z.max(1, keepdim=True).values) / temperature.double()[:, None]
        for z, temperature in ((z_a, temperature_a), (z_b, temperature_b))
    )
    sums_a = x_a.exp().sum(1), (x_a.exp() * (x_a - x_b)).sum(1)
    sums_b = x_b.exp().sum(1), (x_b.exp() * (x_b - x_a)).sum(1)
    return torch.stack([z_a.max(1).values, *sums_a, z_b.max(1).values, *sums_b])


def assert_close(actual, expected, tolerance=1e-5):
    assert actual.dtype == torch.float32
    assert torch.allclose(actual.double(), expected, rtol=tolerance, atol=tolerance), (actual - expected).abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_of_a_shard(head, shape, dtype):
    hidden, weight, targets, temperature = random_case(*shape, dtype=dtype)
    actual = head.reduce_head(hidden, weight, targets, temperature, shape[2])
    expected = expected_statistics(full_logits(hidden, weight, shape[2]), targets, temperature)
    assert_close(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_of_a_pair(head, shape, dtype):
    hidden, weight, _, temperature = random_case(*shape, dtype=dtype)
    other, _, _, other_temperature = random_case(*shape, dtype=dtype, seed=1)
    actual = head.reduce_head_pair(hidden, other, weight, temperature, other_temperature, shape[2])
    z_a, z_b = (full_logits(states, weight, shape[2]) for states in (hidden, other))
    assert_close(actual, expected_pair(z_a, z_b, temperature, other_temperature))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_pairs_have_cross_sums_of_exactly_zero(head, dtype):
    hidden, weight, _, temperature = random_case(17, 40, 131, 160, dtype=dtype)
    actual = head.reduce_head_pair(hidden, hidden.clone(), weight, temperature, temperature, 131)
    assert (actual[2] == 0).all() and (actual[5] == 0).all()
    assert torch.equal(actual[:2], actual[3:5])


@pytest.mark.parametrize("seed", range(3))
def test_logits_far_apart(head, seed):
    """One-hot features: a token's logits are a column of the weight, 1e4 apart, in any order along the vocabulary."""
    random = torch.Generator().manual_seed(seed)
    columns, tokens = 100, 3
    weight = torch.zeros(columns, 16)
    weight[:, :tokens] = torch.randn(columns, tokens, generator=random) * 5e3
    weight[:, 2] = torch.linspace(-1e4, 1e4, columns) * (-1) ** seed
    hidden = torch.eye(tokens, 16)
    other = hidden.roll(1, 0)
    targets, temperature = torch.tensor([0, 50, 99]), torch.tensor([0.6, 1.0, 0.6])
    z = full_logits(hidden, weight, columns)
    statistics = head.reduce_head(hidden, weight, targets, temperature, columns)
    assert_close(statistics, expected_statistics(z, targets, temperature))
    pair = head.reduce_head_pair(hidden, other, weight, temperature, temperature, columns)
    assert_close(pair, expected_pair(z, full_logits(other, weight, columns), temperature, temperature))
    rows = [row.float() for row in of_the_vocabulary(z, temperature)]
    gradient = head.head_gradient(
        hidden, weight, targets, temperature, columns, *rows, torch.ones(tokens), torch.ones(tokens)
    )
    assert gradient.isfinite().all()


def test_no_columns_and_no_tokens(head):
    hidden, weight, targets, temperature = random_case(5, 8, 5, 8)
    empty = torch.tensor([[-torch.inf], [0.0], [0.0]]).expand(3, 5)
    assert torch.equal(head.reduce_head(hidden, weight, targets, temperature, 0), torch.cat([empty, empty[1:2]]))
    pair = head.reduce_head_pair(hidden, hidden, weight, temperature, temperature, 0)
    assert torch.equal(pair, torch.cat([empty, empty]))
    gradient = head.head_gradient(hidden, weight, targets, temperature, 0, *[temperature] * 5)
    assert gradient.shape == (5, 8) and not gradient.any()
    none = (hidden[:0], weight, targets[:0], temperature[:0], 5)
    assert head.reduce_head(*none).shape == (4, 0)
    assert head.reduce_head_pair(hidden[:0], *none[:2], *[none[3]] * 2, 5).shape == (6, 0)
    assert head.head_gradient(*none, *[temperature[:0]] * 5).shape == (0, 8)


def test_strides(head):
    hidden, weight, targets, temperature = random_case(17, 40, 70, 80)
    other = hidden.flip(0)
    by_feature = [tensor.T.contiguous().T for tensor in (hidden, other, weight)]
    every_second = torch.stack([hidden, other], 1)[:, 0]
    statistics = head.reduce_head(hidden, weight, targets, temperature, 70)
    for strided in (by_feature[0], every_second):
        assert not strided.is_contiguous()
        assert torch.equal(head.reduce_head(strided, by_feature[2], targets, temperature, 70), statistics)
    pair = head.reduce_head_pair(hidden, other, weight, temperature, temperature, 70)
    assert torch.equal(head.reduce_head_pair(*by_feature, temperature, temperature, 70), pair)
    rows = [row.float() for row in of_the_vocabulary(full_logits(hidden, weight, 70), temperature)]
    gradient = head.head_gradient(hidden, weight, targets, temperature, 70, *rows, temperature, None)
    of_strided = head.head_gradient(by_feature[0], by_feature[2], targets, temperature, 70, *rows, temperature, None)
    assert torch.equal(of_strided, gradient)


def of_the_vocabulary(z, temperature):
    """Highest logit, log of sum exp and entropy over all logits [T, V]: three times [T]."""
    top = z.max(1).values
    x = (z - top[:, None]) / temperature.double()[:, None]
    log_p = x.log_softmax(1)
    return top, x.logsumexp(1), -(log_p.exp() * log_p).sum(1)


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_is_that_of_autograd(head, shape, dtype, with_entropy):
    """The vocabulary is two shards: this one and as many columns of another."""
    tokens, features, columns, padded = shape
    hidden, weight, targets, temperature = random_case(*shape, dtype=dtype)
    elsewhere = random_case(*shape, dtype=dtype, seed=1)[1]
    targets = torch.arange(tokens) * 7 % (2 * columns)
    grad_logprobs, grad_entropy = torch.randn(2, tokens, generator=torch.Generator().manual_seed(2))
    z = torch.cat([full_logits(hidden, weight, columns), full_logits(hidden, elsewhere, columns)], 1).requires_grad_()
    log_p = (z / temperature.double()[:, None]).log_softmax(1)
    loss = (log_p.gather(1, targets[:, None])[:, 0] * grad_logprobs).sum()
    if with_entropy:
        loss = loss - ((log_p.exp() * log_p).sum(1) * grad_entropy).sum()
    loss.backward()
    rows = [row.float() for row in of_the_vocabulary(z.detach(), temperature)]
    local = [(targets, weight, z.grad[:, :columns]), (targets - columns, elsewhere, z.grad[:, columns:])]
    for local_targets, shard, expected in local:
        actual = head.head_gradient(
            hidden,
            shard,
            local_targets,
            temperature,
            columns,
            *rows,
            grad_logprobs,
            grad_entropy if with_entropy else None,
        )
        assert actual.dtype == dtype and actual.shape == (tokens, padded)
        assert not actual[:, columns:].any()
        # The interpreter truncates to bf16 where a GPU rounds.
        relative = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
        assert torch.allclose(actual[:, :columns].double(), expected, rtol=relative, atol=1e-5)


def test_tokens_and_splits_in_several_groups(head, monkeypatch):
    """300 tokens are 19 blocks, more than run side by side; every block meets every split exactly once."""
    shape = (300, 8, 100, 128)
    hidden, weight, targets, temperature = random_case(*shape)
    expected = expected_statistics(full_logits(hidden, weight, 100), targets, temperature)
    for programs in (1, 6, 2048):
        monkeypatch.setattr(head, "_PROGRAMS", programs)
        assert_close(head.reduce_head(hidden, weight, targets, temperature, 100), expected)


@pytest.mark.parametrize("programs, splits", [(1, 1), (2, 2), (4, 4), (2048, 7)])
def test_the_number_of_splits_does_not_matter(head, monkeypatch, programs, splits):
    hidden, weight, targets, temperature = random_case(5, 16, 200, 224)
    other, other_temperature = hidden.flip(0), temperature.flip(0)
    monkeypatch.setattr(head, "_PROGRAMS", programs)
    assert head._splits(5, 200)[1] == splits
    z, other_z = full_logits(hidden, weight, 200), full_logits(other, weight, 200)
    statistics = head.reduce_head(hidden, weight, targets, temperature, 200)
    assert_close(statistics, expected_statistics(z, targets, temperature), 1e-6)
    pair = head.reduce_head_pair(hidden, other, weight, temperature, other_temperature, 200)
    assert_close(pair, expected_pair(z, other_z, temperature, other_temperature), 2e-6)


@pytest.mark.parametrize("bounds", [[0, 60], [0, 1, 60], [0, 20, 20, 59, 60], list(range(61))], ids=len)
def test_combine_of_any_partition(head, bounds):
    """In fp64, where the partition must not show; a part may be empty or hold all the probability."""
    random = torch.Generator().manual_seed(0)
    z_a, z_b = torch.randn(2, 4, 60, generator=random, dtype=torch.float64) * 10
    z_a[0, 3] = z_b[1, 50] = 1e4
    targets, tau_a, tau_b = torch.tensor([0, 30, 59, 70]), torch.full((4,), 0.6).double(), torch.ones(4).double()
    none = torch.tensor([-torch.inf, 0.0, 0.0]).double()[:, None].expand(3, 4)
    parts, pairs = [], []
    for start, end in zip(bounds, bounds[1:], strict=False):
        if start == end:
            parts.append(torch.cat([none, none[1:2]]))
            pairs.append(torch.cat([none, none]))
        else:
            parts.append(expected_statistics(z_a[:, start:end], targets - start, tau_a))
            pairs.append(expected_pair(z_a[:, start:end], z_b[:, start:end], tau_a, tau_b))
    expected = expected_statistics(z_a, targets, tau_a)
    assert torch.allclose(head.combine(torch.stack(parts), tau_a), expected, rtol=1e-12, atol=1e-12)
    expected = expected_pair(z_a, z_b, tau_a, tau_b)
    assert torch.allclose(head.combine_pair(torch.stack(pairs), tau_a, tau_b), expected, rtol=1e-12, atol=1e-12)


def test_what_does_not_fit_is_refused(head):
    hidden, weight, targets, temperature = random_case(5, 8, 5, 8)
    with pytest.raises(ValueError, match=r"hidden states \[5, 8\] float32 do not fit an LM head \[8, 8\] bfloat16"):
        head.reduce_head(hidden, weight.bfloat16(), targets, temperature, 5)
    with pytest.raises(ValueError, match="columns=9 of an LM head .* use 0 to 8"):
        head.reduce_head(hidden, weight, targets, temperature, 9)
    with pytest.raises(ValueError, match=r"a pair differ: \[5, 8\] float32 and \[4, 8\] float32"):
        head.reduce_head_pair(hidden, hidden[1:], weight, temperature, temperature, 5)


@pytest.mark.parametrize("start", [0, 40], ids=["whole", "shard"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scoring_and_losses_by_kernels(head, dtype, start):
    """What the actor calls, by kernels and by torch: scores with pairs, the fused loss, statistics with gradient.

    Of a shard that begins at 40 targets outside are 0, as its rank would contribute.
    """
    from megatron_policysplit.vocab_parallel import (
        Head,
        Pairs,
        VocabularyShard,
        fused_loss,
        head_pair_statistics,
        head_statistics,
        score,
    )

    hidden, weight, _, temperature = random_case(33, 40, 131, 160, dtype=dtype)
    targets = torch.arange(33) * 3 + start // 2
    other = hidden.roll(1, 0).contiguous()
    # With states of another call, within a chunk of 16, and across chunks; a position in several.
    first = torch.cat([torch.arange(5, 22), torch.tensor([0, 3, 30, 2, 2])])
    second = torch.cat([torch.arange(33, 50), torch.tensor([3, 2, 1, 20, 32])])
    pairs = Pairs(first, second, other[5:22], temperature[:17])
    found = []
    for triton in (True, False):
        leaf, second, parameter = (tensor.clone().requires_grad_() for tensor in (hidden, other, weight))
        parameter.main_grad = torch.zeros(weight.shape)
        by = Head(parameter, VocabularyShard(start, 131, None), 16, triton=triton)
        scores = score(by, leaf, targets, temperature, pairs)

        def token_loss(span, logprobs, entropy):
            return (torch.exp(0.3 * logprobs) - 0.1 * entropy**2).sum()

        fused = fused_loss(by, leaf, targets, temperature, token_loss)
        fused.loss.backward()
        assert torch.equal(fused.logprobs, scores.logprobs)
        token_loss(None, *head_statistics(by, leaf, targets, temperature)).backward()
        pair = head_pair_statistics(by, leaf, second, targets, temperature, temperature.flip(0))
        (pair.kl_ab + 2 * pair.kl_ba + pair.logprobs_b).sum().backward()
        found.append([*scores[:2], *scores.kl, *pair, leaf.grad, second.grad, parameter.main_grad])
    # A gradient of 16 bits; the interpreter truncates to them.
    tolerance = 1e-4 if dtype == torch.float32 else 0.03
    for by_kernels, by_torch in zip(*found, strict=True):
        tight = by_torch.dim() == 1
        scale = by_torch.abs().max().item()
        torch.testing.assert_close(by_kernels, by_torch, rtol=0, atol=scale * (1e-5 if tight else tolerance))
