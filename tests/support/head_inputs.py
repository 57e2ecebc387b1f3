"""Inputs of the LM head for its tests, and pairs of their tokens."""

import torch

from megatron_policysplit.vocab_parallel import Pairs
from tests.support.vocabulary import random

TOKENS, HIDDEN = 70, 6
CHUNKS = (1, 7, 64, TOKENS)


def inputs(vocab, dtype=torch.float32, tokens=TOKENS):
    """hidden [T, H], weight [V, H], targets with the first and the last id, temperatures 0.6 and 1 in turn."""
    hidden, weight = random(tokens, HIDDEN, seed=1, scale=1.0, dtype=dtype), random(vocab, HIDDEN, seed=2, dtype=dtype)
    targets = torch.randint(0, vocab, (tokens,), generator=torch.Generator().manual_seed(3))
    targets[0], targets[1] = 0, vocab - 1
    return hidden, weight, targets, torch.tensor([0.6, 1.0]).repeat(tokens)[:tokens]


# Neighbours; rows of 20 tokens beside each other; a hub with three others, near and far; a pair twice, both ways round.
MANY_PAIRS = Pairs(
    torch.cat([torch.tensor([0, 62, 66]), torch.arange(20, 40), torch.tensor([5, 5, 5, 69, 5, 9])]),
    torch.cat([torch.tensor([1, 67, 63]), torch.arange(40, 60), torch.tensor([4, 9, 69, 5, 64, 5])]),
)


def with_states(hidden, temperature, start=0, tokens=TOKENS):
    """Each of these states beside the token at the same place from `start` on, in a call of so many tokens."""
    places = torch.arange(len(hidden))
    return Pairs(start + places, tokens + places, hidden, temperature)
