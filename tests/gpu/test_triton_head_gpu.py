"""On a CUDA device, at a model's sizes: the Triton kernels of the LM head against fp64 torch, and their memory.

The shard is one of two of a vocabulary of 151,936, with padding behind it.
"""

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

TOKENS, COLUMNS, PADDED = 512, 151_936 // 2, 151_936 // 2 + 64
MB = 10**6


@pytest.fixture(scope="module")
def head():
    from megatron_policysplit.vocab_parallel import triton_head

    return triton_head


@pytest.fixture(scope="module", params=[1024, 4096], ids="H{}".format)
def case(request):
    """Hidden states of two policies [T, H], weight [padded, H], local targets [T], temperatures [T]; bf16 operands."""
    random = torch.Generator("cuda").manual_seed(0)
    normal = {"generator": random, "device": "cuda"}
    hidden = torch.randn(TOKENS, request.param, **normal).bfloat16()
    other = (hidden + 0.3 * torch.randn(TOKENS, request.param, **normal)).bfloat16()
    weight = (torch.randn(PADDED, request.param, **normal) * 2 / request.param**0.5).bfloat16()
    weight[COLUMNS:] = 100.0
    targets = torch.randint(-COLUMNS, 2 * COLUMNS, (TOKENS,), **normal)
    temperature = torch.tensor([0.6, 1.0], device="cuda").repeat(TOKENS // 2)
    return hidden, other, weight, targets, temperature


def full_logits(hidden, weight):
    """[T, columns] fp64, from products of bf16 operands accumulated in fp64, some columns at a time."""
    return torch.cat([hidden.double() @ rows.double().T for rows in weight[:COLUMNS].split(8192)], 1)


def shifted(z, temperature):
    return (z - z.max(1, keepdim=True).values) / temperature.double()[:, None]


def close(actual, expected, rtol=1e-4, atol=None):
    """Sums over the vocabulary may cancel, so what is small beside the largest may be off by a trifle of that."""
    atol = 1e-5 * expected.abs().max().item() if atol is None else atol
    return torch.allclose(actual.double(), expected, rtol=rtol, atol=atol)


def test_statistics_of_a_shard(head, case):
    hidden, _, weight, targets, temperature = case
    z = full_logits(hidden, weight)
    x = shifted(z, temperature)
    owned = (targets >= 0) & (targets < COLUMNS)
    at_target = z.gather(1, targets.clamp(0, COLUMNS - 1)[:, None])[:, 0].where(owned, 0.0)
    expected = z.max(1).values, x.exp().sum(1), (x.exp() * x).sum(1), at_target
    actual = head.reduce_head(hidden, weight, targets, temperature, COLUMNS)
    for name, ours, reference in zip(("highest", "total", "moment", "target"), actual, expected, strict=True):
        assert close(ours, reference), name


def test_statistics_of_a_pair(head, case):
    hidden, other, weight, _, temperature = case
    ones = torch.ones_like(temperature)
    z_a, z_b = full_logits(hidden, weight), full_logits(other, weight)
    x_a, x_b = shifted(z_a, temperature), shifted(z_b, ones)
    expected = [z_a.max(1).values, x_a.exp().sum(1), (x_a.exp() * (x_a - x_b)).sum(1)]
    expected += [z_b.max(1).values, x_b.exp().sum(1), (x_b.exp() * (x_b - x_a)).sum(1)]
    actual = head.reduce_head_pair(hidden, other, weight, temperature, ones, COLUMNS)
    for row, (ours, reference) in enumerate(zip(actual, expected, strict=True)):
        assert close(ours, reference), f"row {row}"


def test_equal_pairs_have_cross_sums_of_exactly_zero(head, case):
    hidden, _, weight, _, temperature = case
    actual = head.reduce_head_pair(hidden, hidden.clone(), weight, temperature, temperature, COLUMNS)
    assert not actual[2].any() and not actual[5].any()
    assert torch.equal(actual[:2], actual[3:5])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_other_dtypes_and_odd_sizes(head, case, dtype):
    hidden, _, weight, targets, temperature = case
    hidden, weight, columns = hidden[:77, :1000].to(dtype), weight[:3001, :1000].to(dtype), 2999
    z = hidden.double() @ weight[:columns].double().T
    x = shifted(z, temperature[:77])
    actual = head.reduce_head(hidden, weight, targets[:77], temperature[:77], columns)
    for ours, reference in zip(actual, (z.max(1).values, x.exp().sum(1), (x.exp() * x).sum(1)), strict=False):
        assert close(ours, reference)


def gradient_arguments(head, case):
    """Arguments of head_gradient as if this shard were the whole vocabulary; gradients of both outputs [T]."""
    hidden, _, weight, targets, temperature = case
    top, total, moment, _ = head.reduce_head(hidden, weight, targets, temperature, COLUMNS)
    log_total = total.log()
    grads = torch.randn(2, TOKENS, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
    return hidden, weight, targets, temperature, COLUMNS, top, log_total, log_total - moment / total, *grads


def test_gradient_is_that_of_autograd(head, case):
    arguments = gradient_arguments(head, case)
    hidden, weight, targets, temperature, *_, grad_logprobs, grad_entropy = arguments
    actual = head.head_gradient(*arguments)
    assert actual.dtype == torch.bfloat16 and actual.shape == (TOKENS, PADDED)
    assert not actual[:, COLUMNS:].any()
    owned = (targets >= 0) & (targets < COLUMNS)
    for some in torch.arange(TOKENS, device="cuda").split(128):
        z = full_logits(hidden[some], weight).requires_grad_()
        log_p = (z / temperature[some].double()[:, None]).log_softmax(1)
        # A target of another shard pulls only through log_total, which is here that of this shard alone.
        picked = log_p.gather(1, targets[some].clamp(0, COLUMNS - 1)[:, None])[:, 0]
        elsewhere = -(z / temperature[some].double()[:, None]).logsumexp(1)
        loss = (picked.where(owned[some], elsewhere) * grad_logprobs[some]).sum()
        loss = loss - ((log_p.exp() * log_p).sum(1) * grad_entropy[some]).sum()
        loss.backward()
        assert close(actual[some][:, :COLUMNS], z.grad, rtol=2**-7, atol=1e-6)
    without = head.head_gradient(*arguments[:-1], None)
    assert torch.equal(without, head.head_gradient(*arguments[:-1], torch.zeros_like(grad_entropy)))


def test_logits(head, case):
    hidden, _, weight, _, _ = case
    logits = head.head_logits(hidden, weight, COLUMNS)
    assert logits.shape == (TOKENS, PADDED) and logits.dtype == torch.float32
    assert close(logits[:, :COLUMNS], full_logits(hidden, weight))


@pytest.fixture
def nuclei(case):
    """A head of the shard as if it were the whole vocabulary, its scores with nuclei of 0.8, and fp64 logits."""
    from megatron_policysplit.distributed.device import tile_elements
    from megatron_policysplit.vocab_parallel import Head, VocabularyShard, score

    hidden, _, weight, targets, temperature = case
    shard = VocabularyShard(0, COLUMNS, None, tile_elements())
    by_kernels, by_torch = (Head(weight, shard, 200, triton=triton) for triton in (True, False))
    inputs = hidden, targets.clamp(0, COLUMNS - 1), temperature
    return by_kernels, inputs, *(score(by, *inputs, nucleus=0.8) for by in (by_kernels, by_torch))


def test_nuclei_hold_their_mass(nuclei):
    """The set of a threshold reaches the mass, and without its smallest logit it does not."""
    by_kernels, (hidden, _, temperature), scores, by_torch = nuclei
    log_p = (full_logits(hidden, by_kernels.weight) / temperature.double()[:, None]).log_softmax(1)
    z = full_logits(hidden, by_kernels.weight)
    inside = z >= scores.nucleus.threshold.double()[:, None]
    p = log_p.exp() * inside
    mass, smallest = p.sum(1), p.where(inside, 2.0).min(1).values
    assert (mass > 0.8 - 1e-4).all() and (mass - smallest < 0.8 + 1e-4).all()
    q = p / mass[:, None]
    entropy = -(q * q.clamp_min(1e-300).log()).sum(1)
    assert close(scores.nucleus.entropy, entropy, atol=1e-3)
    assert close(scores.nucleus.entropy, by_torch.nucleus.entropy.double(), atol=1e-3)
    assert inside.sum(1).float().mean() > 64  # more than the first candidates


def test_a_loss_with_nuclei(nuclei):
    """Bits of scoring, and gradients of hidden states and weight against the torch head's."""
    from dataclasses import replace

    from megatron_policysplit.distributed.device import mixed_products
    from megatron_policysplit.vocab_parallel import fused_loss, score

    by_kernels, (hidden, targets, temperature), scores, _ = nuclei
    alone = score(by_kernels, hidden, targets, temperature)
    found = []
    for triton in (True, False):
        weight, leaf = (values.clone().requires_grad_() for values in (by_kernels.weight, hidden))
        weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
        by = replace(by_kernels, weight=weight, triton=triton, mixed_products=mixed_products())
        seen = []

        def loss(span, logprobs, entropy, nucleus, seen=seen):
            seen.append(nucleus.detach())
            return (torch.exp(0.3 * logprobs) - 0.1 * entropy**2 + nucleus**2).sum()

        got = fused_loss(by, leaf, targets, temperature, loss, scores.nucleus.threshold, at_once=True)
        got.loss.backward()
        found.append((torch.cat(seen), leaf.grad, weight.main_grad))
        if triton:
            for one in (scores, alone):
                assert torch.equal(got.logprobs, one.logprobs) and torch.equal(got.entropy, one.entropy)
    for ours, reference in zip(*found, strict=True):
        assert (ours - reference).norm() < 0.01 * reference.norm()


def test_the_weight_gradient_is_summed_in_fp32(case):
    """torch.addmm with out_dtype, where this torch has it, against fp64."""
    from megatron_policysplit.distributed.device import mixed_products
    from megatron_policysplit.vocab_parallel.weight_gradient import add_product

    hidden = case[0]
    random = torch.Generator("cuda").manual_seed(2)
    grad_logits = torch.randn(TOKENS, 3001, generator=random, device="cuda").bfloat16()
    product = grad_logits.double().T @ hidden.double()
    total = torch.full(product.shape, float("nan"), device="cuda")
    for beta, factor in ((0, 1), (1, 2)):
        add_product(total, grad_logits.T, hidden, beta, mixed_products())
        assert (total - factor * product).norm() < 1e-5 * product.norm()


def test_targets_and_tokens_at_the_edges(head, case):
    hidden, _, weight, _, temperature = case
    targets = torch.tensor([0, COLUMNS - 1, COLUMNS, -1, 2**40], device="cuda")
    actual = head.reduce_head(hidden[:5], weight, targets, temperature[:5], COLUMNS)
    z = full_logits(hidden[:5], weight)
    assert close(actual[3], torch.stack([z[0, 0], z[1, -1], *z.new_zeros(3)]))
    assert head.reduce_head(hidden[:0], weight, targets[:0], temperature[:0], COLUMNS).shape == (4, 0)
    one = head.reduce_head(hidden[:1], weight, targets[:1], temperature[:1], COLUMNS)
    assert close(one[:, 0], actual[:, 0].double())


def test_the_reductions_hold_no_logits(head, case):
    hidden, other, weight, targets, temperature = case

    def statistics():
        return head.reduce_head(hidden, weight, targets, temperature, COLUMNS)

    def pair():
        return head.reduce_head_pair(hidden, other, weight, temperature, temperature, COLUMNS)

    for reduce in (statistics, pair):
        reduce()  # Blocks are timed at the first call, with a buffer to empty the cache.
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        reduce()
        assert torch.cuda.max_memory_allocated() - before < 10 * MB, reduce.__name__
