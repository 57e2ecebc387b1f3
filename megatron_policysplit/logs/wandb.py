"""Logs to Weights & Biases, online or offline."""

from __future__ import annotations

import uuid
from pathlib import Path

from megatron_policysplit.errors import ConfigError
from megatron_policysplit.logs.jsonl import replace
from megatron_policysplit.logs.sink import Sink


class WandbSink(Sink):
    """Logs to one wandb run per run directory, which a resumed run continues (wandb_id.txt).

    Metrics are plotted over our own `step`. wandb's internal counter only grows and would reject
    the steps that a resumed run trains again. Neither the command line nor the terminal is sent.

    Raises ConfigError when the package is missing (at construction) or wandb refuses to start.
    """

    def __init__(self, project: str, mode: str, run_dir: Path, resolved_config: dict):
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f"log.wandb_project={project} needs the wandb package ({error}); "
                "run `pip install megatron_policysplit[wandb]` or set log.wandb_project=null"
            ) from error
        self.wandb = wandb
        self.project = project
        self.mode = mode
        self.run_dir = run_dir
        self.resolved_config = resolved_config
        self.run = None

    def start(self, step: int) -> None:
        try:
            self.run = self.wandb.init(
                project=self.project,
                mode=self.mode,
                id=run_id(self.run_dir),
                name=self.run_dir.resolve().name,
                resume="allow" if self.mode == "online" else None,
                dir=str(self.run_dir),
                config=self.resolved_config,
                settings=self.wandb.Settings(console="off", quiet=True, x_disable_meta=True),
            )
        except self.wandb.errors.Error as error:
            raise ConfigError(
                f"log.wandb_mode={self.mode}: wandb does not start ({error}); run `wandb login`, "
                "or set log.wandb_mode=offline, or log.wandb_project=null"
            ) from error
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.run.log({"step": step, **metrics})

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        self.log(step, metrics)

    def close(self) -> None:
        if self.run is not None:
            self.run.finish()


def run_id(run_dir: Path) -> str:
    """The wandb id of a run directory, which the first call makes and writes to wandb_id.txt."""
    path = run_dir / "wandb_id.txt"
    if not path.exists():
        replace(path, [uuid.uuid4().hex[:12]])
    return path.read_text(encoding="utf-8").strip()
