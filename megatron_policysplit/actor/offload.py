"""Frees the actor's GPU memory while engines use the GPU, and brings everything back bit for bit.

Megatron's tensors are views of each other: parameters of the distributed optimizer's buffers,
gradients of DDP's, master weights and optimizer shards of others. Giving a tensor a new storage
would cut it off from the others. So the storages themselves are emptied and filled again in place
(`UntypedStorage.resize_`), and no tensor is replaced: every view stays valid, whoever holds it, in
Megatron-Core, Transformer Engine or torch. (Megatron-Core's own `offload_to_cpu` gives the
optimizer new tensors, which are no longer its views, and does not know parameters outside of
buffers.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, UntypedStorage

from megatron_policysplit.actor.gradient_fusion import drop_placeholders
from megatron_policysplit.actor.host_memory import CHUNK_BYTES, HostMemory
from megatron_policysplit.actor.optimizer import PolicyOptimizer
from megatron_policysplit.distributed.device import free_memory_bytes, return_freed_memory

Part = Literal["optimizer", "gradients", "parameters"]
ORDER: tuple[Part, ...] = ("optimizer", "gradients", "parameters")
ALIGNMENT_BYTES = 64  # each storage begins at a multiple of this in host memory


class Offload:
    """Moves one rank's tensors to host memory and back, in three parts.

    Parts leave in the order optimizer, gradients, parameters and come back in the reverse order; a
    call out of order raises RuntimeError. No call is collective. Host memory, pinned for a GPU, is
    allocated at the first offload and then reused.

    The optimizer part is its state and master weights. The gradients are DDP's buffers: their
    contents are dropped, and are zero afterwards. The parameters are those of the model and its
    buffers; with them go Megatron's tables of rotary positions, which are made again when needed.

    ddp: Megatron's DistributedDataParallel.
    """

    def __init__(
        self,
        ddp: torch.nn.Module,
        optimizer: PolicyOptimizer,
        *,
        chunk_bytes: int = CHUNK_BYTES,
    ):
        self._ddp, self._optimizer = ddp, optimizer
        self._device = next(ddp.parameters()).device
        self._host = {"optimizer": HostMemory(chunk_bytes), "parameters": HostMemory(chunk_bytes)}
        self._away: dict[Part, dict[int, _Emptied]] = {}

    @property
    def away(self) -> tuple[Part, ...]:
        """The parts that have left the device, in the order in which they left."""
        return tuple(self._away)

    @property
    def bytes_away(self) -> int:
        """Bytes of device memory that it takes to bring back what is away."""
        return sum(emptied.nbytes for part in self._away.values() for emptied in part.values())

    def free_bytes(self) -> float:
        """Bytes of device memory that no process holds; infinite on the CPU."""
        return free_memory_bytes()

    def offload_optimizer(self) -> None:
        """Copy the optimizer's state and master weights to host memory and free them."""
        self._check("offload", "optimizer")
        # Frees the gradients that the last step left; the next step would clear them anyway.
        self._optimizer.zero_grad()
        # A storage that parts share leaves with the last of them: in fp32 the optimizer steps on
        # the parameters themselves.
        shared = self._parameters() | self._gradients()
        states = {key: storage for key, storage in self._states().items() if key not in shared}
        self._empty("optimizer", states)

    def offload_gradients(self) -> None:
        """Free DDP's gradient buffers; their contents are lost."""
        self._check("offload", "gradients")
        shared = self._parameters()
        gradients = {
            key: storage for key, storage in self._gradients().items() if key not in shared
        }
        self._empty("gradients", gradients)

    def offload_parameters(self) -> None:
        """Copy the parameters to host memory and free them.

        Until they are back `read` gives their values; nothing else may touch them.
        """
        self._check("offload", "parameters")
        _drop_rotary_tables()
        drop_placeholders()
        self._empty("parameters", self._parameters())

    def restore_parameters(self) -> None:
        """Bring the parameters back, bit for bit."""
        self._check("restore", "parameters")
        self._fill("parameters")

    def restore_gradients(self) -> None:
        """Allocate DDP's gradient buffers again, filled with zeros."""
        self._check("restore", "gradients")
        self._fill("gradients")

    def restore_optimizer(self) -> None:
        """Bring the optimizer's state and master weights back, bit for bit."""
        self._check("restore", "optimizer")
        self._fill("optimizer")

    def read(self, parameter: Tensor) -> Tensor:
        """Return a parameter's values on the device: a copy while parameters are away, else itself.

        Detached. Raises RuntimeError for a tensor that is none of the parameters that are away.
        """
        if "parameters" not in self._away:
            return parameter.detach()
        emptied = self._away["parameters"].get(_key(parameter.untyped_storage()))
        if emptied is None:
            raise RuntimeError(
                f"a tensor of shape {tuple(parameter.shape)} is none of the parameters that are "
                "away"
            )
        size, stride, itemsize = parameter.shape, parameter.stride(), parameter.element_size()
        # The bytes from the first to the last element of this view of the storage, gaps included.
        span = 1 + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        values = torch.empty(span * itemsize, dtype=torch.uint8, device=self._device)
        self._host["parameters"].read(
            emptied.position + parameter.storage_offset() * itemsize, values
        )
        return values.view(parameter.dtype).as_strided(size, stride)

    def _check(self, verb: Literal["offload", "restore"], part: Part) -> None:
        """Raise RuntimeError unless this part is next."""
        count = len(self._away)
        allowed = ORDER[count : count + 1] if verb == "offload" else ORDER[:count][-1:]
        if part not in allowed:
            away = " and ".join(self._away) or "nothing"
            raise RuntimeError(
                f"cannot {verb} {part} with {away} away; the order is {', '.join(ORDER)}, and back"
            )

    def _parameters(self) -> dict[int, UntypedStorage]:
        """Storages of the model's parameters and buffers, by key."""
        return self._storages([*self._ddp.module.parameters(), *self._ddp.module.buffers()])

    def _gradients(self) -> dict[int, UntypedStorage]:
        """Storages of DDP's buffers and of main gradients outside of them, by key."""
        buffers = [
            buffer.grad_data for buffer in (*self._ddp.buffers, *self._ddp.expert_parallel_buffers)
        ]
        return self._storages(
            [*buffers, *(p.main_grad for p in self._ddp.parameters() if hasattr(p, "main_grad"))]
        )

    def _states(self) -> dict[int, UntypedStorage]:
        """Storages of all that the optimizers step on, by key.

        That is their state, and master weights or the parameters themselves.
        """
        tensors: list[Tensor] = []
        for optimizer in self._optimizer.megatron.chained_optimizers:
            for group in optimizer.optimizer.param_groups:
                tensors += group["params"]
            for state in optimizer.optimizer.state.values():
                tensors += [value for value in state.values() if isinstance(value, Tensor)]
        return self._storages(tensors)

    def _storages(self, tensors: Iterable[Tensor]) -> dict[int, UntypedStorage]:
        """Each storage of the tensors on the device once, by key, in the order of the tensors."""
        storages: dict[int, UntypedStorage] = {}
        for tensor in tensors:
            # torch's AdamW counts its steps on the CPU; those stay there.
            if tensor.device == self._device:
                storage = tensor.untyped_storage()
                storages.setdefault(_key(storage), storage)
        return storages

    def _empty(self, part: Part, storages: dict[int, UntypedStorage]) -> None:
        """Copy storages to the part's host memory, if it has any, and set their size to 0."""
        emptied, end = {}, 0
        for key, storage in storages.items():
            emptied[key] = _Emptied(storage, storage.nbytes(), end)
            end += -(-storage.nbytes() // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        if part in self._host:
            self._host[part].reserve(end)
            for item in emptied.values():
                self._host[part].write(item.position, _bytes(item.storage))
        # This waits for the copies, which run asynchronously; only then may the storages go.
        return_freed_memory()
        for item in emptied.values():
            item.storage.resize_(0)
        return_freed_memory()
        self._away[part] = emptied

    def _fill(self, part: Part) -> None:
        """Give storages their size back and fill them from host memory, or with zeros."""
        for item in self._away[part].values():
            item.storage.resize_(item.nbytes)
            if part in self._host:
                self._host[part].read(item.position, _bytes(item.storage))
            else:
                _bytes(item.storage).zero_()
        del self._away[part]


@dataclass(frozen=True)
class _Emptied:
    """A storage that has been set to size 0."""

    storage: UntypedStorage
    nbytes: int  # its size before
    position: int  # of its bytes in host memory; meaningless for gradients, which are dropped


def _drop_rotary_tables() -> None:
    """Forget the tables of rotary positions, up to 32, that Megatron keeps on the device."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    RotaryEmbedding.forward.cache_clear()


def _key(storage: UntypedStorage) -> int:
    """A number that is the same for every Python handle of a storage, empty or not."""
    # Not data_ptr(): that is 0 while the storage is empty.
    return storage._cdata


def _bytes(storage: UntypedStorage) -> Tensor:
    """A tensor that is the whole storage: uint8[nbytes]."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
