"""The chunked LM head and the fused loss against plain torch on all logits, in real process groups."""

import pytest
import torch

from megatron_policysplit.vocab_parallel import chunk_pass, weight_gradient
from megatron_policysplit.vocab_parallel.fused_loss import fused_loss
from megatron_policysplit.vocab_parallel.head import head_pair_statistics, head_statistics, score
from megatron_policysplit.vocab_parallel.shard import TILE_ELEMENTS
from tests.support.dist import run_distributed
from tests.support.head_inputs import CHUNKS, HIDDEN, MANY_PAIRS, TOKENS, inputs, with_states
from tests.support.vocabulary import (
    SIZES,
    Anew,
    as_tests,
    assert_gradients,
    assert_same_bits_everywhere,
    counted_collectives,
    exact_head,
    extreme_logits,
    extreme_pair,
    head_of,
    mixed_temperatures,
    plain_kl,
    plain_statistics,
    random,
    random_targets,
    ranks,
    rows_of,
    sharded_head,
)

def curved(span, logprobs, entropy):
    """A loss per token that is linear in nothing and different for every token."""
    factor = torch.linspace(0.5, 1.5, TOKENS, dtype=logprobs.dtype)[span]
    return (factor * (torch.exp(0.3 * logprobs) - 0.2 * entropy**2)).sum()


def check_score():
    for vocab in SIZES:
        hidden, weight, targets, temperature = inputs(vocab)
        expected = plain_statistics(hidden.double() @ weight.double().t(), targets, temperature)
        by_chunk = [score(head_of(weight, chunk), hidden, targets, temperature) for chunk in CHUNKS]
        for got in by_chunk:
            assert got.logprobs.dtype == torch.float32 and not got.logprobs.requires_grad
            for value, truth, reference in zip(got[:2], expected, by_chunk[0][:2], strict=True):
                torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(value, reference, rtol=1e-6, atol=1e-6)
            assert_same_bits_everywhere(got.logprobs, got.entropy)


def check_extreme_logits():
    """Logits 1e4 apart: values and gradients stay those of fp64."""
    for vocab in SIZES:
        logits, targets, temperature = extreme_logits(vocab), random_targets(vocab), mixed_temperatures()
        plain = logits.double().requires_grad_()
        truth = plain_statistics(plain, targets, temperature)
        (truth[0] + 0.5 * truth[1]).sum().backward()
        for chunk in (1, 3, len(logits)):
            head, hidden = exact_head(logits, chunk)
            fused = fused_loss(head, hidden, targets, temperature, lambda span, lp, h: (lp + 0.5 * h).sum())
            fused.loss.backward()
            again, leaf = exact_head(logits, chunk)
            logprobs, entropy = head_statistics(again, leaf, targets, temperature)
            (logprobs + 0.5 * entropy).sum().backward()
            scores = score(again, leaf, targets, temperature)
            for got in (fused[1:], (logprobs.detach(), entropy.detach()), scores[:2]):
                for value, expected in zip(got, truth, strict=True):
                    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=2e-6)
                assert got[0][0] == got[1][0] == 0
                assert_same_bits_everywhere(*got)
            for own, states in ((head, hidden), (again, leaf)):
                assert_gradients(own, states, logits, plain.grad, torch.full((len(logits),), 2e-6))


def check_kl_of_extreme_logits():
    """Values and gradients of two policies whose logits are 1e4 apart, in themselves or from each other."""
    for vocab in SIZES:
        a, b = extreme_pair(vocab)
        both, tokens = torch.cat([a, b]), len(a)
        targets, t_a, t_b = random_targets(vocab), mixed_temperatures(), mixed_temperatures(flip=True)
        plain = both.double().requires_grad_()
        p, q = plain.split(tokens)
        truth = plain_kl(p, q, t_a, t_b), plain_kl(q, p, t_b, t_a)
        (truth[0] + 0.5 * truth[1]).sum().backward()
        for chunk in (1, 3, tokens):
            head, hidden = exact_head(both, chunk)
            kl = head_pair_statistics(head, hidden[:tokens], hidden[tokens:], targets, t_a, t_b)[4:]
            (kl[0] + 0.5 * kl[1]).sum().backward()
            scored = score(head, hidden[:tokens], targets, t_a, with_states(hidden[tokens:], t_b, tokens=tokens)).kl
            for got in (kl, scored):
                for value, expected in zip(got, truth, strict=True):
                    torch.testing.assert_close(value.detach().double(), expected, rtol=1e-6, atol=2e-6)
            largest = torch.maximum(*truth).detach().clamp_min(1.0)  # in p (L - KL) both may be 1e4, and cancel
            assert_gradients(head, hidden, both, plain.grad, 1e-6 * largest.repeat(2))


def check_gradients():
    """Of log-prob and entropy, each alone and both, by recomputation and by the fused loss; any chunk."""
    for vocab in SIZES:
        hidden, weight, targets, temperature = inputs(vocab)
        for use in ((1, 0), (0, 1), (1, 1)):

            def loss_of(span, logprobs, entropy, use=use):
                parts = [torch.exp(0.3 * logprobs), -0.2 * entropy**2]
                return sum(part.sum() for part, used in zip(parts, use, strict=True) if used)

            plain = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
            whole = slice(0, TOKENS)
            truth = loss_of(whole, *plain_statistics(plain[0] @ plain[1].t(), targets, temperature))
            truth.backward()
            for chunk in CHUNKS:
                for fused in (False, True):
                    head, leaf = head_of(weight, chunk), hidden.clone().requires_grad_()
                    if fused:
                        loss = fused_loss(head, leaf, targets, temperature, loss_of).loss
                    else:
                        loss = loss_of(whole, *head_statistics(head, leaf, targets, temperature))
                    (2.0 * loss).backward()
                    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-5)
                    torch.testing.assert_close(leaf.grad.double(), 2 * plain[0].grad, rtol=1e-4, atol=1e-4)
                    got, expected = rows_of(head, vocab, 2 * plain[1].grad)
                    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)
                    assert_same_bits_everywhere(leaf.grad)


def gradcheck(function, *tensors):
    assert torch.autograd.gradcheck(function, [tensor.requires_grad_() for tensor in tensors])


def check_gradcheck_of_statistics():
    hidden, weight, targets, temperature = inputs(5, torch.float64, tokens=4)
    gradcheck(lambda h, w: head_statistics(sharded_head(w, 3), h, targets, temperature), hidden, weight)


def check_gradcheck_of_pairs():
    hidden, weight, targets, temperature = inputs(5, torch.float64, tokens=4)
    other = random(4, HIDDEN, seed=8, scale=1.0, dtype=torch.float64)

    def statistics(a, b, w):
        return head_pair_statistics(sharded_head(w, 3), a, b, targets, temperature, temperature.flip(0))

    gradcheck(statistics, hidden, other, weight)


def check_gradcheck_of_the_fused_loss():
    hidden, weight, targets, temperature = inputs(5, torch.float64, tokens=4)

    def loss(h, w):
        return fused_loss(sharded_head(w, 3), h, targets, temperature, curved).loss

    gradcheck(lambda h, w: Anew.apply(loss, h, w), hidden, weight)


def check_training_sees_what_scoring_saw():
    """Bit for bit: the first ratio of a policy loss is 1."""
    for vocab in SIZES:
        hidden, weight, targets, temperature = inputs(vocab)
        for chunk in CHUNKS:
            head = head_of(weight, chunk)
            before = score(head, hidden, targets, temperature, MANY_PAIRS)
            seen = fused_loss(head, hidden.clone().requires_grad_(), targets, temperature, curved)
            assert torch.equal(before.logprobs, seen.logprobs) and torch.equal(before.entropy, seen.entropy)


def check_main_grad():
    """The gradient is added to it, the hook fires, and a gradient that comes by autograd is not lost (tied weights)."""
    hidden, weight, targets, temperature = inputs(131)
    plain = head_of(weight, 16)
    fused_loss(plain, hidden.clone().requires_grad_(), targets, temperature, curved).loss.backward()
    for tied in (False, True):
        head = head_of(weight, 16)
        head.weight.main_grad = torch.ones_like(head.weight)
        fired = []

        def hook(parameter, fired=fired):  # as Megatron's DDP does
            if parameter.grad is not None:
                parameter.main_grad.add_(parameter.grad)
            parameter.grad = None
            fired.append(True)

        head.weight.register_post_accumulate_grad_hook(hook)
        loss = fused_loss(head, hidden.clone().requires_grad_(), targets, temperature, curved).loss
        if tied:
            loss = loss + 3.0 * head.weight.sum()
        loss.backward()
        assert fired == [True]
        torch.testing.assert_close(head.weight.main_grad, plain.weight.grad + (4.0 if tied else 1.0))


def check_bfloat16():
    """Operands in bf16, statistics and main_grad in fp32: near the fp32 result, and the hidden gradient is bf16."""
    hidden, weight, targets, temperature = inputs(131)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    exact, rounded = head_of(weight.float(), 16), head_of(weight, 16)
    rounded.weight.main_grad = torch.zeros(rounded.weight.shape)
    leaf = hidden.clone().requires_grad_()
    got = fused_loss(rounded, leaf, targets, temperature, curved)
    truth = fused_loss(exact, hidden.float().requires_grad_(), targets, temperature, curved)
    got.loss.backward()
    truth.loss.backward()
    assert got.logprobs.dtype == torch.float32 and leaf.grad.dtype == torch.bfloat16 and rounded.weight.grad is None
    torch.testing.assert_close(got.logprobs, truth.logprobs, rtol=1e-5, atol=1e-5)
    difference = (rounded.weight.main_grad - exact.weight.grad).norm() / exact.weight.grad.norm()
    assert difference < 0.005


def check_collectives():
    """One per scoring call, one per chunk in the fused loss, one reduction of hidden gradients."""
    hidden, weight, targets, temperature = inputs(131)
    sharded = ranks() > 1
    head, leaf = head_of(weight, 32), hidden.clone().requires_grad_()
    with counted_collectives() as calls:
        score(head, hidden, targets, temperature, with_states(hidden[:40], temperature[:40]))
        assert calls == ([("all_gather", 4 * TOKENS + 6 * 40)] if sharded else [])
        calls.clear()
        loss = fused_loss(head, leaf, targets, temperature, curved).loss
        assert calls == ([("all_gather", 4 * size) for size in (32, 32, 6)] if sharded else [])
        calls.clear()
        loss.backward()
        assert calls == ([("all_reduce", hidden.numel())] if sharded else [])
        calls.clear()
        logprobs, entropy = head_statistics(head, leaf, targets, temperature)
        assert calls == ([("all_gather", 4 * TOKENS)] if sharded else [])
        calls.clear()
        (logprobs + entropy).sum().backward()
        assert calls == ([("all_reduce", hidden.numel())] if sharded else [])


def check_many_tiles_and_slices():
    """Nothing changes when the elementwise work and 16-bit weights are cut into smaller pieces, or chunks are huge."""
    hidden, weight, targets, temperature = inputs(131)
    other = hidden + 0.1

    def everything(dtype, tile_elements=TILE_ELEMENTS):
        head = head_of(weight.to(dtype), 10**9, tile_elements)
        leaf = hidden.to(dtype, copy=True).requires_grad_()
        scores = score(head, leaf, targets, temperature, with_states(other[2:].to(dtype), temperature[2:], 2))
        fused_loss(head, leaf, targets, temperature, curved).loss.backward()
        pair = head_pair_statistics(head, leaf, other.to(dtype), targets, temperature, temperature)
        sum(value.sum() for value in pair).backward()
        return [*scores[:2], *scores.kl, leaf.grad, head.weight.grad]

    for dtype in (torch.float32, torch.bfloat16):
        whole = everything(dtype)
        before = chunk_pass.SLICE_ROWS, weight_gradient.SLICE_ROWS
        chunk_pass.SLICE_ROWS, weight_gradient.SLICE_ROWS = 11, 13
        try:
            cut = everything(dtype, 300)
        finally:
            chunk_pass.SLICE_ROWS, weight_gradient.SLICE_ROWS = before
        for a, b in zip(whole, cut, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def check_gradients_do_not_depend_on_chunks():
    hidden, weight, targets, temperature = inputs(131)
    found = {}
    for chunk in CHUNKS:
        head, leaf = head_of(weight, chunk), hidden.clone().requires_grad_()
        fused_loss(head, leaf, targets, temperature, curved).loss.backward()
        found[chunk] = leaf.grad, head.weight.grad
    for chunk, gradients in found.items():
        bound = 1e-6 if chunk > 1 else 3e-6  # a product with a single row is another routine's
        for one, other in zip(found[TOKENS], gradients, strict=True):
            assert (one - other).norm() <= bound * one.norm()


def check_no_tokens():
    """A micro-batch without response tokens takes part and changes nothing."""
    hidden, weight, targets, temperature = inputs(131)
    head, leaf = head_of(weight, 32), hidden[:0].clone().requires_grad_()
    assert len(score(head, leaf, targets[:0], temperature[:0]).logprobs) == 0
    loss = fused_loss(head, leaf, targets[:0], temperature[:0], curved).loss
    loss.backward()
    assert loss == 0 and (head.weight.grad == 0).all() and leaf.grad.shape == (0, HIDDEN)


class Counted:
    """`curved`, and for how many chunks its gradient was wanted."""

    def __init__(self):
        self.wanted = 0

    def __call__(self, span, logprobs, entropy):
        self.wanted += logprobs.requires_grad
        return curved(span, logprobs, entropy)


def check_without_gradient():
    hidden, weight, targets, temperature = inputs(131)
    head = head_of(weight, 32)
    with torch.no_grad():
        without = fused_loss(head, hidden, targets, temperature, linear := Counted())
    with_gradient = fused_loss(head, hidden.clone().requires_grad_(), targets, temperature, differentiable := Counted())
    assert not without.loss.requires_grad and torch.equal(without.loss, with_gradient.loss)
    assert (linear.wanted, differentiable.wanted) == (0, 3)


def check_backward_once():
    hidden, weight, targets, temperature = inputs(131)
    loss = fused_loss(head_of(weight, 32), hidden.clone().requires_grad_(), targets, temperature, curved).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


test_on_one_rank, test_on_sharded_vocabulary = as_tests(
    check_score,
    check_extreme_logits,
    check_kl_of_extreme_logits,
    check_gradients,
    check_gradcheck_of_statistics,
    check_gradcheck_of_pairs,
    check_gradcheck_of_the_fused_loss,
    check_training_sees_what_scoring_saw,
    check_main_grad,
    check_bfloat16,
    check_collectives,
    check_many_tiles_and_slices,
    check_gradients_do_not_depend_on_chunks,
    check_no_tokens,
    check_without_gradient,
    check_backward_once,
)


def score_in_group(rank, tokens):
    import torch.distributed as dist

    dist.init_process_group("gloo")
    hidden, weight, targets, temperature = inputs(131)
    got = score(head_of(weight, 16), hidden, targets, temperature, MANY_PAIRS)
    values = [value.tolist() for value in (*got[:2], *got.kl)]
    dist.destroy_process_group()
    return values


def test_tensor_parallelism_changes_nothing():
    """Against one rank, 1e-5."""
    hidden, weight, targets, temperature = inputs(131)
    one = score(head_of(weight, 16), hidden, targets, temperature, MANY_PAIRS)
    for tensor in (2, 4):
        for values in run_distributed(score_in_group, tensor, TOKENS):
            for value, reference in zip(values, (*one[:2], *one.kl), strict=True):
                torch.testing.assert_close(torch.tensor(value), reference, rtol=1e-5, atol=1e-5)
