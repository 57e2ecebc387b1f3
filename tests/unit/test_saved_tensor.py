"""Blocks of saved tensors, read straight into their place, against torch.load and slicing."""

import io
from itertools import product
from zipfile import BadZipFile

import pytest
import torch

from checkpoints_conv.saved_tensor import Block, read_into

BEFORE = b"other bytes in the file"


def saved(path, tensor, after=b"more"):
    """A file with the tensor somewhere in it: (path, offset, length)."""
    stream = io.BytesIO()
    torch.save(tensor, stream)
    path.write_bytes(BEFORE + stream.getvalue() + after)
    return path, len(BEFORE), len(stream.getvalue())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_block_is_read_or_declined(tmp_path, dtype):
    """A block is read exactly if it is one run of the stored elements; then it has their bits."""
    tensor = torch.randn(2, 3, 4).to(dtype)
    where = saved(tmp_path / "file", tensor)
    taken = 0
    spans = [[(start, stop) for start in range(n) for stop in range(start + 1, n + 1)] for n in tensor.shape]
    for block in product(*spans):
        expected = tensor[tuple(slice(*span) for span in block)]
        target = torch.full(expected.shape, -1.0, dtype=dtype)
        found = read_into(*where, [start for start, _ in block], target)
        assert found == (len(expected.reshape(-1)) == 1 or expected.is_contiguous())
        assert torch.equal(target, expected if found else torch.full_like(target, -1.0))
        taken += found
    assert 0 < taken < len(list(product(*spans)))


def test_a_block_goes_into_a_part_of_a_larger_tensor(tmp_path):
    tensor, target = torch.randn(5, 3), torch.zeros(4, 3)
    where = saved(tmp_path / "file", tensor)
    assert read_into(*where, (2, 0), target.narrow(0, 1, 2))
    assert torch.equal(target[1:3], tensor[2:4]) and not target[0].any() and not target[3].any()
    assert not read_into(*where, (2, 0), torch.zeros(3, 2).t())


@pytest.mark.parametrize(
    "tensor",
    [torch.randn(3, 2).t(), torch.randn(4, 3)[1:3], torch.randn(2, 3).double(), torch.randn(6)],
    ids=["transposed", "part-of-a-storage", "of-another-type", "of-another-rank"],
)
def test_what_is_not_simply_its_elements_is_left_to_torch(tmp_path, tensor):
    target = torch.zeros(2, 3)
    assert not read_into(*saved(tmp_path / "file", tensor), (0, 0), target)
    assert not target.any()


def test_without_checksums(tmp_path):
    """As conversion writes them."""
    tensor, target = torch.randn(2, 3), torch.zeros(2, 3)
    torch.serialization.set_crc32_options(False)
    try:
        where = saved(tmp_path / "file", tensor)
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_into(*where, (0, 0), target) and torch.equal(target, tensor)


def test_a_file_that_ends_early(tmp_path):
    path, offset, length = saved(tmp_path / "file", torch.randn(2, 3), after=b"")
    path.write_bytes(path.read_bytes()[: offset + length // 2])
    with pytest.raises((RuntimeError, BadZipFile, EOFError)):
        read_into(path, offset, length, (0, 0), torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("shape", "offsets", "lengths", "first"),
    [
        ((4, 5), (1, 0), (2, 5), 5),
        ((4, 5), (1, 2), (1, 3), 7),
        ((4, 5), (1, 2), (2, 3), None),
        ((2, 3, 4), (1, 0, 0), (1, 3, 4), 12),
        ((2, 3, 4), (1, 2, 1), (1, 1, 2), 21),
        ((2, 3, 4), (0, 1, 0), (2, 2, 4), None),
        ((7,), (3,), (2,), 3),
        ((), (), (), 0),
    ],
)
def test_runs(shape, offsets, lengths, first):
    assert Block(shape, offsets, lengths).run() == first
