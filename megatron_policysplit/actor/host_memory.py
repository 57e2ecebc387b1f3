"""Host memory that tensors of the device are copied to and exchanged with; pinned for a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from megatron_policysplit.distributed.device import host_memory

# torch rounds a block of pinned memory up to a power of two, so a single block for everything could
# waste as much again.
CHUNK_BYTES = 64 * 2**20


class HostMemory:
    """Host memory addressed by byte position, in chunks of equal size that are never given back."""

    def __init__(self, chunk_bytes: int = CHUNK_BYTES):
        self.chunk_bytes = chunk_bytes
        self.chunks: list[Tensor] = []
        self._spare: Tensor | None = None  # of `exchange`, made at its first call

    def reserve(self, nbytes: int) -> None:
        """Allocate chunks until there is room for `nbytes` bytes."""
        while len(self.chunks) * self.chunk_bytes < nbytes:
            self.chunks.append(host_memory(self.chunk_bytes))

    def write(self, position: int, source: Tensor) -> None:
        """Copy source[n] (uint8) to `position`; from a GPU asynchronously."""
        for number, offset, part in self._pieces(position, source):
            self.chunks[number][offset : offset + len(part)].copy_(part, non_blocking=True)

    def read(self, position: int, target: Tensor) -> None:
        """Copy n bytes from `position` into target[n] (uint8).

        To a GPU asynchronously, in stream order: later kernels see the bytes.
        """
        for number, offset, part in self._pieces(position, target):
            part.copy_(self.chunks[number][offset : offset + len(part)], non_blocking=True)

    def exchange(self, tensors: Iterable[Tensor]) -> None:
        """Exchange the bytes from position 0 on with those of tensors[n] (uint8), in their order.

        Afterwards the tensors hold what was in host memory, and host memory what they held. Takes
        one more chunk of host memory and none of the device. With a GPU asynchronously, in stream
        order.
        """
        if self._spare is None:
            self._spare = host_memory(self.chunk_bytes)
        position, current = 0, 0
        for tensor in tensors:
            for number, offset, part in self._pieces(position, tensor):
                if number != current:
                    self._take_spare(current)
                    current = number
                span = slice(offset, offset + len(part))
                # In stream order: the device's bytes are out before others overwrite them.
                self._spare[span].copy_(part, non_blocking=True)
                part.copy_(self.chunks[number][span], non_blocking=True)
            position += len(tensor)
        if position:
            self._take_spare(current)

    def _take_spare(self, number: int) -> None:
        """Put the spare chunk, which has the device's bytes by now, in the place of chunk `number`.

        The chunk whose place it takes becomes the spare one.
        """
        self.chunks[number], self._spare = self._spare, self.chunks[number]

    def _pieces(self, position: int, tensor: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """(chunk, offset in it, slice of `tensor`) that together are the tensor from `position`."""
        done = 0
        while done < len(tensor):
            number, offset = divmod(position + done, self.chunk_bytes)
            length = min(self.chunk_bytes - offset, len(tensor) - done)
            yield number, offset, tensor[done : done + length]
            done += length
