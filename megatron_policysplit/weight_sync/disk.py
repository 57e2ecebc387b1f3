"""transport=disk: the chief writes a Hugging Face directory, and every engine reads it.

On a file system that they share. SGLang reads it outside of a weight-update session. The newest two
directories are kept: an engine that comes back gets the current one without any other rank.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from checkpoints_conv import write_hf
from megatron_policysplit.actor.weights import consume_weights
from megatron_policysplit.serving.members import Member
from megatron_policysplit.weight_sync import session
from megatron_policysplit.weight_sync.outcome import Failures, merge, results_of_all_ranks
from megatron_policysplit.weight_sync.transport import TransportContext

RETAINED = 2  # snapshots: the current one, and one that an engine may still be reading
# A snapshot, or what a writer that was killed left beside it.
NAME = re.compile(r"version-\d{8}|\.version-\d{8}\.(partial|previous)")


@dataclass(frozen=True)
class DiskSnapshot:
    """A complete directory of weights. Implements `transport.Snapshot`."""

    version: int
    path: Path
    timeout_seconds: float

    async def load(self, member: Member) -> None:
        """Have a paused engine read the directory."""
        await member.client.update_from_disk(str(self.path), timeout_seconds=self.timeout_seconds)


class DiskTransport:
    """The chief writes files and the engines read them. Implements `transport.Transport`."""

    has_session = False
    snapshot: DiskSnapshot | None = None

    def __init__(self, context: TransportContext):
        settings = context.settings
        self.layout, self.control, self.actor = context.layout, context.control, context.actor
        self.members, self.read = context.members, context.read
        self.model_path, self.limit = settings.model_path, settings.weight_sync.timeout_seconds
        directory = settings.weight_sync.directory or Path(settings.run_dir) / "weights"
        self.directory = Path(directory).resolve()
        self._paths: list[Path] = []

    def send(self, version: int, live: set[int]) -> Failures:
        """Write `version`, unless it was written last, and have the engines in `live` read it.

        Beside the export one all-gather of an object over the world for each of the two.
        """
        if self.snapshot is None or self.snapshot.version != version:
            results_of_all_ranks(self.layout, lambda: self._write(version))
            # All ranks have heard from the chief by now, so the directory is complete.
            self.snapshot = DiskSnapshot(version, self._path(version), self.limit)
        members = [self.members[engine] for engine in sorted(live) if engine in self.members]
        failures = results_of_all_ranks(
            self.layout, lambda: self.control.run(session.call_each(members, self.snapshot.load))
        )
        return session.add_hint(merge(failures))

    def close(self) -> None:
        """Snapshots stay: engines that run on may be asked to read them."""

    def _write(self, version: int) -> None:
        """Export the weights; as the chief write them, and delete what is older than two."""
        if not self.layout.is_exported:
            return
        path = self._path(version)

        def write(stream) -> None:
            if self.layout.is_chief:
                write_hf(path, self.model_path, stream, next(self.actor.model.parameters()).dtype)

        # Replicas that share experts with the first one only give theirs.
        destination = "leader" if self.layout.data_rank == 0 else "nowhere"
        consume_weights(self.actor.model, self.actor.hf_config, destination, write, read=self.read)
        if self.layout.is_chief:
            self._delete_old(path)

    def _delete_old(self, newest: Path) -> None:
        written = [*(path for path in self._paths if path != newest), newest]
        self._paths = written[-RETAINED:]
        for path in self.directory.iterdir():
            if NAME.fullmatch(path.name) and path not in self._paths:
                shutil.rmtree(path)

    def _path(self, version: int) -> Path:
        return self.directory / f"version-{version:08d}"
