"""transport=disk: the chief writes a Hugging Face directory, which every engine reads from a file
system they share.

SGLang reads it outside of a weight-update session. The newest two directories are kept: an engine
that comes back gets the current one without any other rank.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from checkpoints_conv import write_hf
from megatron_policysplit.actor.actor import Actor
from megatron_policysplit.actor.weights import Read, consume_weights
from megatron_policysplit.config import Config
from megatron_policysplit.distributed.control import Control
from megatron_policysplit.distributed.layout import Layout
from megatron_policysplit.serving.members import Member
from megatron_policysplit.weight_sync import session
from megatron_policysplit.weight_sync.outcome import Failures, merged, results_of_all_ranks

KEPT = 2
NAME = re.compile(
    r"version-\d{8}|\.version-\d{8}\.(partial|previous)"
)  # the latter of a writer that was killed


class DiskTransport:
    """version: of the newest snapshot that is complete, None before the first. Known on every rank."""

    has_session = False

    def __init__(
        self,
        config: Config,
        layout: Layout,
        control: Control,
        actor: Actor,
        members: Mapping[int, Member],
        read: Read,
    ):
        self.config, self.layout, self.control, self.members, self.read = (
            config,
            layout,
            control,
            members,
            read,
        )
        self.actor = actor
        self.directory = Path(
            config.weight_sync.directory or Path(config.run.dir) / "weights"
        ).resolve()
        self.version: int | None = None
        self._written: list[Path] = []

    def send(self, version: int, live: set[int]) -> Failures:
        """Write `version`, unless it was written last, and have the engines in `live` read it.
        Collective over all.
        """
        if version != self.version:
            results_of_all_ranks(self.layout, lambda: self._write(version))
            self.version = version

        async def load(member: Member) -> None:
            await self.load(member, version)

        members = [self.members[engine] for engine in sorted(live) if engine in self.members]
        failures = merged(
            results_of_all_ranks(self.layout, lambda: self.control.run(session.each(members, load)))
        )
        return session.explained(failures)

    async def load(self, member: Member, version: int) -> None:
        """Have a paused engine read the snapshot of `version`."""
        path = self._path(version)
        await member.client.update_from_disk(
            str(path), timeout_seconds=self.config.weight_sync.timeout_seconds
        )

    def close(self) -> None:
        """Snapshots stay: engines that run on may be asked to read them."""

    def _write(self, version: int) -> None:
        if not self.layout.is_exported:
            return
        path = self._path(version)

        def take(stream) -> None:
            if self.layout.is_chief:
                write_hf(
                    path, self.config.model.path, stream, next(self.actor.model.parameters()).dtype
                )

        destination = "leader" if self.layout.data_rank == 0 else "nowhere"
        consume_weights(self.actor.model, self.actor.hf_config, destination, take, read=self.read)
        if self.layout.is_chief:
            self._written = [*(old for old in self._written if old != path), path][-KEPT:]
            for old in self.directory.iterdir():
                if NAME.fullmatch(old.name) and old not in self._written:
                    shutil.rmtree(old)

    def _path(self, version: int) -> Path:
        return self.directory / f"version-{version:08d}"
