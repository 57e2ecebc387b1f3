"""Host memory in chunks: what is written is read, and an exchange is one, whatever the sizes."""

import random

import pytest
import torch

from megatron_policysplit.actor.host_memory import HostMemory


def random_bytes(draw, length):
    return torch.tensor([draw.randrange(256) for _ in range(length)], dtype=torch.uint8)


@pytest.mark.parametrize("chunk_bytes", [1, 7, 16, 64, 1000])
@pytest.mark.parametrize("lengths", [[1], [16], [5, 0, 30, 1, 64], [200], [16, 16, 32], []])
def test_exchange(chunk_bytes, lengths):
    draw = random.Random(f"{chunk_bytes}{lengths}")
    inside = [random_bytes(draw, length) for length in lengths]
    outside = [random_bytes(draw, length) for length in lengths]
    memory = HostMemory(chunk_bytes)
    memory.reserve(sum(lengths))
    position = 0
    for tensor in inside:
        memory.write(position, tensor)
        position += len(tensor)
    tensors = [tensor.clone() for tensor in outside]
    for expected_outside, expected_inside in ((inside, outside), (outside, inside), (inside, outside)):
        memory.exchange(tensors)
        assert all(map(torch.equal, tensors, expected_outside))
        assert all(map(torch.equal, contents(memory, lengths), expected_inside))
    assert len(memory.chunks) == -(-sum(lengths) // chunk_bytes), "an exchange adds no chunk to the memory"


def contents(memory, lengths):
    tensors, position = [], 0
    for length in lengths:
        tensors.append(torch.zeros(length, dtype=torch.uint8))
        memory.read(position, tensors[-1])
        position += length
    return tensors
