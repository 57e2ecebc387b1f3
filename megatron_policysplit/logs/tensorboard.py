"""Logs as TensorBoard event files."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_policysplit.files import naming_writes
from megatron_policysplit.logs.sink import Sink


class TensorBoardSink(Sink):
    """Writes one scalar per metric under its own name; on resume purges the points of later steps.

    resolved_config: shown as text, without secrets.
    """

    def __init__(self, directory: Path, resolved_config: dict):
        from torch.utils.tensorboard import SummaryWriter

        self.writer_class = SummaryWriter
        self.directory = directory
        self.resolved_config = resolved_config
        self.writer = None

    def start(self, step: int) -> None:
        # Readers hide the points of older files from purge_step on; a run that trained nothing
        # keeps none.
        config = json.dumps(self.resolved_config, indent=2, default=str)
        with naming_writes(self.directory):
            self.writer = self.writer_class(str(self.directory), purge_step=step + 1 if step else 0)
            self.writer.add_text(
                "config", "\n".join("    " + line for line in config.splitlines()), step
            )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        with naming_writes(self.directory):
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, step)
            self.writer.flush()

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        self.log(step, metrics)

    def close(self) -> None:
        if self.writer is not None:
            writer, self.writer = self.writer, None
            with naming_writes(self.directory):
                writer.close()
