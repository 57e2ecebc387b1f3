"""transport=tensor: the engines read the weights from memory of the trainer, on the same machine.

Engines apart from the actor: the chief gets the full tensors and puts them, bucket by bucket, into
shared host memory, from which every rank of every engine copies its part. Colocated engines: every
actor rank gets the full tensors on its own device and gives its engine rank a handle to them (CUDA
IPC on a GPU).
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
from megatron_policysplit.weight_sync.bucket import payload
from megatron_policysplit.weight_sync.outcome import Failure, Failures, merged, results_of_all_ranks
from megatron_policysplit.weight_sync.shared_memory import Buffer, SharedMemory
from megatron_policysplit.weight_sync.transport import SyncSettings, TransportContext

OTHER = "weight_sync.transport=distributed"


class TensorTransport:
    """Built on all ranks at once: it creates a group for every colocated engine."""

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
        self._own: Placement | None = None  # the engine that runs on this rank's device
        self._group: dist.ProcessGroup | None = None
        for placement in context.placements if self.colocated else ():
            # An owner posts, and waits for the answer, while the other ranks wait in this group.
            group = dist.new_group(
                list(placement.ranks),
                backend="gloo",
                timeout=timedelta(seconds=2 * self.limit + 60),
            )
            if layout.rank in placement.ranks:
                self._own, self._group = placement, group
        self._memory: SharedMemory | None = None
        self._kept: list[Buffer] = []  # that an engine which fell silent may still be about to read

    def send(self, version: int, live: set[int]) -> Failures:
        """Give all buckets to the engines in `live`, on which a session is open. Collective over
        all ranks.
        """
        return merged(results_of_all_ranks(self.layout, lambda: self._send(live)))

    def close(self) -> None:
        self._release_kept()
        if self._memory is not None:
            self._memory.close()

    def _send(self, live: set[int]) -> Failures:
        self._release_kept()
        if self.colocated:
            return self._consume(
                "every_rank", lambda stream: self._give_own(stream, live), training_device()
            )
        if not self.layout.is_exported:
            return {}
        destination = "leader" if self.layout.data_rank == 0 else "nowhere"
        return self._consume(destination, lambda stream: self._give_all(stream, live), CPU)

    def _consume(self, destination, take, device: torch.device) -> Failures:
        return consume_weights(
            self.actor.model, self.actor.hf_config, destination, take, device=device, read=self.read
        )

    def _give_all(self, stream, live: set[int]) -> Failures:
        """The chief's part: fill one buffer while the engines read the other."""
        if not self.layout.is_chief:
            return {}
        failures: Failures = {}
        buffers: list[Buffer] = []
        pending: Work | None = None
        try:
            for index, bucket in enumerate(self.plan):
                if index < 2:
                    buffers.append(self._buffer(max(b.nbytes for b in self.plan[index:]), CPU))
                flat = buffers[index % 2].flat[: bucket.nbytes]
                bucket.fill(stream, flat)
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
                pending.wait()
            self._give_back(buffers, failures)

    def _give_own(self, stream, live: set[int]) -> Failures:
        """A colocated rank's part: its own copy for its own engine rank; the owner posts for all of
        them.
        """
        placement = self._own
        if placement is None or placement.index not in live:
            return {}
        buffer: Buffer | None = None
        failures: Failures = {}
        try:
            for bucket in self.plan:
                mine: str | Exception
                try:
                    if buffer is None or not buffer.reusable:
                        buffer = self._buffer(max(b.nbytes for b in self.plan), training_device())
                    flat = buffer.flat[: bucket.nbytes]
                    bucket.fill(stream, flat)
                    mine = payload(bucket, flat)
                except Exception as error:  # raised below, once the other ranks of the engine know
                    mine = error
                failure, stopped = self._post_together(placement, mine)
                if isinstance(mine, Exception):
                    raise mine
                if failure is not None:
                    failures = {placement.index: failure}
                if stopped or failures:
                    break
            return failures
        finally:
            self._give_back([buffer] if buffer is not None else [], failures)

    def _post_together(
        self, placement: Placement, mine: str | Exception
    ) -> tuple[Failure | None, bool]:
        """Gather the payloads of an engine's ranks to its owner and post them: why the engine
        failed, and whether a rank did.
        """
        given: list[str | None] | None = (
            [None] * len(placement.ranks) if self.layout.rank == placement.owner else None
        )
        dist.gather_object(
            None if isinstance(mine, Exception) else mine, given, placement.owner, self._group
        )
        verdict: list = [None, True]
        if given is not None and None not in given:
            member = self.members[placement.index]
            failures = self.control.run(self._post([member], {member.index: given}))
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

        return session.explained(await session.each(members, update))

    def _give_back(self, buffers: Sequence[Buffer], failures: Failures) -> None:
        """SGLang ends when the memory that it is told to read is gone, so an engine that may yet
        come to it keeps it until the next sync, which starts only once that engine has answered or
        been given up.
        """
        if any(failure.silent for failure in failures.values()):
            self._kept += buffers
        else:
            for buffer in buffers:
                buffer.release()

    def _release_kept(self) -> None:
        while self._kept:
            self._kept.pop().release()

    def _buffer(self, nbytes: int, device: torch.device) -> Buffer:
        if self._memory is None:
            self._memory = SharedMemory()
        return self._memory.buffer(nbytes, device)


def check_reach(settings: SyncSettings, addresses: Sequence[str]) -> None:
    """ConfigError if engines at `addresses` cannot read this process's memory, with the way out."""
    for address in addresses:
        if not is_this_machine(address):
            raise ConfigError(
                f"weight_sync.transport=tensor shares memory, but {address} is not on this "
                f"machine; set {OTHER}"
            )
    ours = installed_version("torch")
    if settings.external_servers:
        if settings.colocated:
            raise ConfigError(
                "weight_sync.transport=tensor cannot tell which torch the servers in "
                "rollout.addresses run, and GPU "
                f"memory is shared between equal versions only ({ours} here); set {OTHER}"
            )
        return
    other = "weight_sync.transport=disk" if settings.colocated else OTHER
    python = settings.server_python
    if python is None or python == sys.executable:
        return
    theirs = _torch_version(python)
    if _release(theirs) != _release(ours):
        raise ConfigError(
            "weight_sync.transport=tensor shares memory between equal versions of torch only; "
            "rollout.server.python="
            f"{python} has torch {theirs}, the trainer {ours}; set {other} or install the same "
            "version"
        )


def _torch_version(python: str) -> str:
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
    """2.13.0 of 2.13.0+cu130: builds of one release share memory."""
    return version.split("+")[0]


def is_this_machine(address: str) -> bool:
    """Whether the host of a URL is an address of this machine."""
    try:
        found = socket.getaddrinfo(urlsplit(address).hostname, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    for family, kind, protocol, _, place in found:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.bind((place[0], 0, *place[2:]))  # only an own address can be bound
            except OSError:
                continue
            return True
    return False
