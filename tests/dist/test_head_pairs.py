"""The exact KL of pairs of tokens against plain torch on all logits, in real process groups."""

import pytest
import torch

from megatron_policysplit.vocab_parallel import Pairs, score, chunk_pass
from tests.support.head_inputs import CHUNKS, HIDDEN, MANY_PAIRS, TOKENS, inputs, with_states
from tests.support.vocabulary import SIZES, as_tests, assert_same_bits_everywhere, exact_head, head_of, plain_kl, random


def assert_pairs(got, pairs, states, weight, temperature):
    """KL of pairs of positions in states [N, H] at temperature [N], in fp64 on all logits."""
    logits = states.double() @ weight.double().t()
    for value, (a, b) in zip(got, ((pairs.first, pairs.second), (pairs.second, pairs.first)), strict=True):
        truth = plain_kl(logits[a], logits[b], temperature[a], temperature[b])
        torch.testing.assert_close(value.double(), truth, rtol=1e-4, atol=1e-5)
    assert_same_bits_everywhere(*got)


def check_pairs():
    """Within chunks and across, positions in several pairs; log-probs and entropies keep their bits."""
    for vocab in SIZES:
        hidden, weight, targets, temperature = inputs(vocab)
        for chunk in CHUNKS:
            got = score(head_of(weight, chunk), hidden, targets, temperature, MANY_PAIRS)
            alone = score(head_of(weight, chunk), hidden, targets, temperature)
            assert torch.equal(got.logprobs, alone.logprobs) and torch.equal(got.entropy, alone.entropy)
            assert alone.kl is None
            assert_pairs(got.kl, MANY_PAIRS, hidden, weight, temperature)
        none = torch.empty(0, dtype=torch.int64)
        assert [
            len(value) for value in score(head_of(weight, 7), hidden, targets, temperature, Pairs(none, none)).kl
        ] == [0, 0]


def check_pairs_with_states_of_another_call():
    """More of them than tokens of the call, one beside several tokens, one beside none, and pairs within the call."""
    for vocab in SIZES:
        hidden, weight, targets, temperature = inputs(vocab)
        others = hidden.repeat(2, 1) + random(2 * TOKENS, HIDDEN, seed=9, scale=0.1)
        flipped = temperature.flip(0).repeat(2)
        away = torch.arange(TOKENS, 3 * TOKENS - 1)
        first = torch.cat([torch.arange(2 * TOKENS - 1) % TOKENS, away[:9], torch.tensor([3, 3, 68, 8])])
        second = torch.cat([away, torch.arange(61, 70), torch.tensor([TOKENS + 50, 4, 1, TOKENS + 50])])
        pairs = Pairs(first, second, others, flipped)
        states, temperatures = torch.cat([hidden, others]), torch.cat([temperature, flipped])
        for chunk in CHUNKS:
            got = score(head_of(weight, chunk), hidden, targets, temperature, pairs)
            alone = score(head_of(weight, chunk), hidden, targets, temperature)
            assert torch.equal(got.logprobs, alone.logprobs) and torch.equal(got.entropy, alone.entropy)
            assert_pairs(got.kl, pairs, states, weight, temperatures)


def check_logits_within_a_chunk_are_made_once():
    """Rows that go through the matrix product: those of the chunks, and the far tokens of a chunk once each. At most a
    chunk of them at a time, and two chunks of logits in all."""
    hidden, weight, targets, temperature = inputs(131)
    made, buffers, make = [], set(), chunk_pass.shard_logits

    def counting(states, weight, out, *rest):
        made.append(len(states))
        buffers.add(out.untyped_storage().data_ptr())
        assert out.untyped_storage().nbytes() == 32 * len(weight) * out.itemsize
        return make(states, weight, out, *rest)

    def products(first, second, *others):
        made.clear()
        score(
            head_of(weight, 32), hidden, targets, temperature, Pairs(torch.tensor(first), torch.tensor(second), *others)
        )
        return list(made)

    chunk_pass.shard_logits = counting
    try:
        assert products([0, 1, 31, 32, 1], [31, 2, 0, 33, 1]) == [32, 32, 6]
        # of the second chunk 3 (twice) and 31, of the last one 3
        assert products([3, 40, 31, 3, 33], [32, 3, 35, 69, 34]) == [32, 32, 2, 6, 1]
        assert products([0] * 40 + [69], [*range(TOKENS, TOKENS + 40), TOKENS], hidden[:40], temperature[:40]) == [
            *(32, 32, 8), 32, *(6, 1)]  # fmt: skip
        assert len(buffers) <= 2 * 3  # of each call two
    finally:
        chunk_pass.shard_logits = make


def check_equal_policies():
    """KL of exactly 0 where logits are equal: within a chunk, across chunks and with states of another call."""
    _, _, targets, temperature = inputs(131)
    logits = random(TOKENS, 131, seed=5)
    logits[20:40], temperature[20:40] = logits[:20], temperature[:20]
    for chunk in CHUNKS:
        head, hidden = exact_head(logits, chunk)
        equal = Pairs(torch.arange(20).repeat(2), torch.arange(40))
        for pairs in (equal, with_states(hidden[3:60], temperature[3:60], 3)):
            assert all((value == 0).all() for value in score(head, hidden, targets, temperature, pairs).kl)
        near = score(head, hidden, targets, temperature, with_states(1.1 * hidden, temperature)).kl
        assert all((value > 0).all() for value in near)


def check_a_pair_without_a_token_of_the_call():
    hidden, weight, targets, temperature = inputs(131)
    for first, second in ((TOKENS, TOKENS + 1), (0, -1), (0, TOKENS + 9)):
        pairs = Pairs(torch.tensor([first]), torch.tensor([second]), hidden[:9], temperature[:9])
        with pytest.raises(ValueError, match="a pair has"):
            score(head_of(weight, 7), hidden, targets, temperature, pairs)


test_on_one_rank, test_on_sharded_vocabulary = as_tests(
    check_pairs,
    check_pairs_with_states_of_another_call,
    check_logits_within_a_chunk_are_made_once,
    check_equal_policies,
    check_a_pair_without_a_token_of_the_call,
)
