"""transport=tensor: the engines read the weights from memory of the trainer, on the same machine.

Engines apart from the actor: the chief gets the full tensors and puts them, bucket by bucket, into
shared host memory, from which every rank of every engine copies its part.

Colocated engines: every actor rank gets the full tensors on its own device and gives its engine
rank a handle to them (CUDA IPC on a GPU). The owner of the engine posts the handles of all its
ranks in one request.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from importlib.metadata import version as installed_version
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from megatron_policysplit.actor.weights import CPU, consume_weights
from megatron_policysplit.distributed.control import Work
from megatron_policysplit.distributed.device import training_device
from megatron_policysplit.errors import ConfigError
from megatron_policysplit.serving.members import Member, Placement
from megatron_policysplit.weight_sync import session
from megatron_policysplit.weight_sync.bucket import Bucket, payload
from megatron_policysplit.weight_sync.outcome import Failure, Failures, merge, results_of_all_ranks
from megatron_policysplit.weight_sync.shared_memory import Buffer, SharedMemory
from megatron_policysplit.weight_sync.transport import SyncSettings, TransportContext

REMEDY = "weight_sync.transport=distributed"


class TensorTransport:
    """The engines read memory of the trainer. Implements `transport.Transport`.

    The constructor makes one gloo group for each colocated engine, of the ranks it runs on.
    """

    has_session = True
    snapshot = None

    def __init__(self, context: TransportContext):
        settings, layout = context.settings, context.layout
        self.layout, self.control, self.actor = layout, context.control, context.actor
        self.members, self.read = context.members, context.read
        self.plan = context.plan_buckets(per_stage=False)
        self.limit = settings.weight_sync.timeout_seconds
        self.colocated = settings.colocated
        addresses = [member.address for member in self.members.values()]
        results_of_all_ranks(layout, lambda: check_reach(settings, addresses))
        self._engine: Placement | None = None  # the engine that runs on this rank's device
        self._group: dist.ProcessGroup | None = None
        for placement in context.placements if self.colocated else ():
            # Every rank makes every group, as torch wants it.
            # An owner posts, and waits for the answer, while the other ranks wait in this group.
            group = dist.new_group(
                list(placement.ranks),
                backend="gloo",
                timeout=timedelta(seconds=2 * self.limit + 60),
            )
            if layout.rank in placement.ranks:
                self._engine, self._group = placement, group
        self._memory: SharedMemory | None = None
        # Buffers that an engine which fell silent may still read.
        self._retained: list[Buffer] = []

    def send(self, version: int, live: set[int]) -> Failures:
        """Give all buckets to the engines in `live`.

        Beside the export one all-gather of an object over the world; if colocated, per bucket one
        gather and one broadcast of objects over the ranks of each engine.
        """
        return merge(results_of_all_ranks(self.layout, lambda: self._send(live)))

    def close(self) -> None:
        """Release all shared memory, and end the process that guards it."""
        self._release_retained()
        if self._memory is not None:
            self._memory.close()

    def _send(self, live: set[int]) -> Failures:
        # An engine that was silent in the last sync has answered since, or is not in `live`.
        self._release_retained()
        if self.colocated:
            return self._consume(
                "every_rank", lambda stream: self._share_colocated(stream, live), training_device()
            )
        if not self.layout.is_exported:
            return {}
        destination = "leader" if self.layout.data_rank == 0 else "nowhere"
        return self._consume(destination, lambda stream: self._share_from_chief(stream, live), CPU)

    def _consume(self, destination, take, device: torch.device) -> Failures:
        return consume_weights(
            self.actor.model, self.actor.hf_config, destination, take, device=device, read=self.read
        )

    def _share_from_chief(self, stream, live: set[int]) -> Failures:
        """As the chief, fill one buffer while the engines read the other."""
        if not self.layout.is_chief:
            return {}
        failures: Failures = {}
        buffers: list[Buffer] = []
        pending: Work | None = None
        try:
            for index, bucket in enumerate(self.plan):
                if index < 2:  # two buffers in turn, each as large as the largest still to come
                    buffers.append(self._buffer(max(b.nbytes for b in self.plan[index:]), CPU))
                flat = buffers[index % 2].flat[: bucket.nbytes]
                bucket.fill(stream, flat)
                # An engine takes one bucket at a time. With its answer the other buffer is free.
                if pending is not None:
                    failures.update(pending.result())
                receivers = [self.members[engine] for engine in sorted(live - set(failures))]
                if not receivers:
                    return failures
                payloads = {
                    m.index: [payload(bucket, flat) for _ in range(m.tensor)] for m in receivers
                }
                pending = self.control.start(self._post(receivers, payloads))
            failures.update(pending.result())
            return failures
        finally:
            if pending is not None:
                pending.wait()  # also after an error: engines may be reading the buffer
            self._release_buffers(buffers, failures)

    def _share_colocated(self, stream, live: set[int]) -> Failures:
        """As a rank with a colocated engine, fill a buffer for the engine rank on this device.

        The owner posts for all ranks of the engine.
        """
        placement = self._engine
        if placement is None or placement.index not in live:
            return {}
        buffer: Buffer | None = None
        failures: Failures = {}
        try:
            for bucket in self.plan:
                handle: str | Exception
                try:
                    buffer = self._next_buffer(buffer, bucket)
                    handle = _filled(bucket, stream, buffer)
                except Exception as error:  # raised below, once the other ranks of the engine know
                    handle = error
                failure, stopped = self._gather_and_post(placement, handle)
                if isinstance(handle, Exception):
                    raise handle
                if failure is not None:
                    failures = {placement.index: failure}
                if stopped or failures:
                    break
            return failures
        finally:
            self._release_buffers([buffer] if buffer is not None else [], failures)

    def _next_buffer(self, last: Buffer | None, bucket: Bucket) -> Buffer:
        """The buffer for a bucket, once the engine has answered for the last one.

        On a GPU each has the size of its bucket, and the last one is given up first: besides the
        one that is filled, only what the engine still reads is held.
        """
        if last is not None and last.reusable:
            return last
        if last is not None:
            last.release()
        device = training_device()
        reused = device == CPU
        nbytes = max(b.nbytes for b in self.plan) if reused else bucket.nbytes
        return self._buffer(nbytes, device)

    def _gather_and_post(
        self, placement: Placement, handle: str | Exception
    ) -> tuple[Failure | None, bool]:
        """Gather the handles of an engine's ranks to its owner, which posts them.

        Returns why the engine failed (None if it did not), and whether a rank failed: then nothing
        was posted. One gather and one broadcast of objects over the engine's ranks.
        """
        is_owner = self.layout.rank == placement.owner
        handles: list[str | None] | None = [None] * len(placement.ranks) if is_owner else None
        # A rank that failed takes part all the same, or the others would wait for it.
        dist.gather_object(
            None if isinstance(handle, Exception) else handle,
            handles,
            placement.owner,
            self._group,
        )
        verdict: list = [None, True]
        if handles is not None and None not in handles:
            member = self.members[placement.index]
            failures = self.control.run(self._post([member], {member.index: handles}))
            verdict = [failures.get(member.index), False]
        dist.broadcast_object_list(verdict, placement.owner, self._group)
        return verdict[0], verdict[1]

    async def _post(
        self, members: Sequence[Member], payloads: Mapping[int, Sequence[str]]
    ) -> Failures:
        async def update(member: Member) -> None:
            await member.client.update_from_tensor(
                payloads[member.index], timeout_seconds=self.limit
            )

        return session.add_hint(await session.call_each(members, update))

    def _release_buffers(self, buffers: Sequence[Buffer], failures: Failures) -> None:
        """Release the buffers, unless an engine may still come to read them.

        SGLang ends when memory that it is told to read is gone. What a silent engine was told to
        read stays until the next sync, which starts only once that engine has answered or is given
        up.
        """
        if any(failure.silent for failure in failures.values()):
            self._retained += buffers
        else:
            for buffer in buffers:
                buffer.release()

    def _release_retained(self) -> None:
        while self._retained:
            self._retained.pop().release()

    def _buffer(self, nbytes: int, device: torch.device) -> Buffer:
        if self._memory is None:  # not in the constructor: it starts a process
            self._memory = SharedMemory()
        return self._memory.buffer(nbytes, device)


def _filled(bucket: Bucket, stream, buffer: Buffer) -> str:
    """Fill a buffer with a bucket; what an engine is told to find it by. No reference is kept."""
    flat = buffer.flat[: bucket.nbytes]
    bucket.fill(stream, flat)
    return payload(bucket, flat)


def check_reach(settings: SyncSettings, addresses: Sequence[str]) -> None:
    """Raise ConfigError if engines at `addresses` cannot read this rank's memory."""
    for address in addresses:
        if not is_this_machine(address):
            raise ConfigError(
                f"weight_sync.transport=tensor shares memory, but {address} is not on this "
                f"machine; set {REMEDY}"
            )
    # A handle is torch's own description of memory, which differs from release to release.
    trainer_torch = installed_version("torch")
    if settings.external_servers:
        if settings.colocated:
            raise ConfigError(
                "weight_sync.transport=tensor cannot tell which torch the servers in "
                "rollout.addresses run, and GPU memory is shared between equal versions only "
                f"({trainer_torch} here); set {REMEDY}"
            )
        return
    remedy = "weight_sync.transport=disk" if settings.colocated else REMEDY
    python = settings.server_python
    if python is None or python == sys.executable:
        return
    server_torch = _torch_version(python)
    if _release(server_torch) != _release(trainer_torch):
        raise ConfigError(
            "weight_sync.transport=tensor shares memory between equal versions of torch only; "
            f"rollout.server.python={python} has torch {server_torch}, "
            f"the trainer {trainer_torch}; set {remedy} or install the same version"
        )


def _torch_version(python: str) -> str:
    """Return the version of torch that an interpreter has; ConfigError if it has none."""
    question = "from importlib.metadata import version; print(version('torch'))"
    try:
        done = subprocess.run([python, "-c", question], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"rollout.server.python={python} cannot be run ({error})") from error
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(
            f"rollout.server.python={python} has no torch ({reason}); install SGLang there"
        )
    return done.stdout.strip()


def _release(version: str) -> str:
    """Return 2.13.0 of 2.13.0+cu130: builds of one release share memory."""
    return version.split("+")[0]


def is_this_machine(url: str) -> bool:
    """Return whether the host of a URL is an address of this machine."""
    try:
        addresses = socket.getaddrinfo(urlsplit(url).hostname, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    for family, kind, protocol, _, address in addresses:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.bind((address[0], 0, *address[2:]))  # only an own address can be bound
            except OSError:
                continue
            return True
    return False
