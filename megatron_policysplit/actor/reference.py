"""The initial policy's weights, kept in host memory and swapped in for a forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron_policysplit.actor.host_memory import CHUNK_BYTES, HostMemory


class ReferenceWeights:
    """A copy of a model's weights on the host, which changes places with those on the device.

    The device never holds both: a swap exchanges them chunk by chunk, and a second one exchanges
    them back, bit for bit. Every rank holds its own part; no call is collective.
    """

    def __init__(self, model: torch.nn.Module, *, chunk_bytes: int = CHUNK_BYTES):
        """Copy the weights that the model has now. Its parameters must be contiguous."""
        self._model = model
        self._host = HostMemory(chunk_bytes)
        views = self._bytes()
        self._host.reserve(sum(map(len, views)))
        position = 0
        for view in views:
            self._host.write(position, view)
            position += len(view)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Have these weights in the model's parameters; afterwards those that were there before."""
        self._host.exchange(self._bytes())
        try:
            yield
        finally:
            self._host.exchange(self._bytes())

    def _bytes(self) -> list[Tensor]:
        """The memory of each parameter, uint8[bytes]."""
        return [
            parameter.detach().view(-1).view(torch.uint8) for parameter in self._model.parameters()
        ]
