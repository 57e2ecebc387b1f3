"""What a run writes down: messages, metrics, rollouts, checkpoints and Hugging Face directories."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from checkpoints_conv import write_hf
from megatron_policysplit.actor import checkpoint
from megatron_policysplit.actor.actor import DTYPES, Actor
from megatron_policysplit.actor.checkpoint import TrainerState
from megatron_policysplit.actor.checkpoint_files import checkpoint_path, complete
from megatron_policysplit.actor.weights import consume_weights
from megatron_policysplit.config import CheckpointConfig, Config, ModelConfig
from megatron_policysplit.config.load import to_dict
from megatron_policysplit.distributed.agree import raise_on_all_ranks
from megatron_policysplit.distributed.layout import Layout
from megatron_policysplit.files import naming_writes, replace_text
from megatron_policysplit.logs import Logger
from megatron_policysplit.logs.timing import Phases


class SilentLog:
    """The log of ranks that do not log."""

    def start(self, step: int) -> None:
        pass

    def message(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


def open_log(config: Config, layout: Layout) -> Logger | SilentLog:
    """The log of this rank (collective over all ranks). Raises ConfigError on every rank."""

    def make() -> Logger | SilentLog:
        if not layout.is_chief:
            return SilentLog()
        return Logger(config.log, config.run.dir, config.train.steps, to_dict(config))

    return raise_on_all_ranks(layout.world, make)


class Journal:
    """Where a run stands, and what it leaves on disk. Every rank has one; all call it alike."""

    def __init__(
        self,
        directory: Path,
        model: ModelConfig,
        checkpoints: CheckpointConfig,
        layout: Layout,
        actor: Actor,
        log: Logger | SilentLog,
    ):
        """Go on from the newest complete checkpoint in run.dir, if there is one.

        Collective over all ranks. Raises a UserError on every rank if it cannot be loaded.
        """
        self.log, self.directory = log, directory
        self._layout, self._actor = layout, actor
        self._model, self._keep = model, checkpoints.keep
        saved = complete(self._checkpoints)
        newest = layout.broadcast_from_chief(saved[-1] if saved else None)
        notes: list[str | None] = []
        self.state = checkpoint.load(actor, newest, notes.append) if newest else TrainerState()
        raise_on_all_ranks(layout.world, lambda: log.start(self.state.step))
        if newest:
            log.message(f"resumed from {newest}")
        for note in filter(None, notes):
            log.message(note)
        today = datetime.date.today().isoformat()
        self.state.date = layout.broadcast_from_chief(self.state.date or today)

    @property
    def _checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    def message(self, text: str) -> None:
        """Tell the user something."""
        self.log.message(text)

    def save(self) -> None:
        """Save the state after the last trained batch, unless it is saved (over all ranks)."""
        final, phases = checkpoint_path(self._checkpoints, self.state.step), Phases()
        if self._layout.broadcast_from_chief(final.exists()):
            return
        with phases.measure("checkpoint"):
            path = checkpoint.save(self._actor, self.state, self._checkpoints, self._keep)
        self.message(f"saved {path} in {phases.seconds['checkpoint']:.1f} s")

    def export(self, name: str) -> None:
        """Write the weights as a Hugging Face directory `run.dir/name` (over all ranks)."""
        if not self._layout.is_exported:
            return

        def take(stream: Iterable) -> None:
            if self._layout.is_chief:
                dtype = DTYPES[self._model.dtype]
                with naming_writes(self.directory / name):
                    write_hf(self.directory / name, self._model.path, stream, dtype)

        destination = "leader" if self._layout.data_rank == 0 else "nowhere"
        consume_weights(self._actor.model, self._actor.hf_config, destination, take)

    def dump(self, name: str, records: Sequence[dict[str, Any]]) -> Path:
        """Write records as JSON lines to `run.dir/name`, complete or not at all (chief only)."""
        path = self.directory / name
        replace_text(path, (json.dumps(record) + "\n" for record in records))
        return path
