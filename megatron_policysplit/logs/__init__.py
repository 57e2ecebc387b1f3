"""Logs of a run: one `Logger` on the chief rank, one file here per sink."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from megatron_policysplit.config import LogConfig
from megatron_policysplit.files import naming_writes
from megatron_policysplit.logs.sink import Sink, without_secrets
from megatron_policysplit.logs.streams import CONSOLE


class Logger:
    """Hands metrics, rollouts and messages to every sink that the config's `log` section asks for.

    Made on the chief rank only. Files are always written: metrics.jsonl and messages.log, and
    rollouts/ unless `log.rollouts` is false. Metric values are numbers; a value that is not finite
    is stored as null in files and as it is elsewhere. Raises ConfigError when a sink's package is
    missing.

    Args:
        config: which sinks there are.
        run_dir: where files go; it is created.
        total_steps: for the progress display.
        resolved_config: goes, without secrets, to TensorBoard and wandb.
    """

    def __init__(
        self, config: LogConfig, run_dir: str | Path, total_steps: int, resolved_config: dict
    ):
        run_dir = Path(run_dir)
        with naming_writes(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
        self.sinks = list(_sinks(config, run_dir, total_steps, without_secrets(resolved_config)))

    def start(self, step: int) -> None:
        """Begin after `step` trained steps (0: a fresh run); drop what files hold of later steps.

        Raises ConfigError when wandb refuses to start.
        """
        for sink in self.sinks:
            sink.start(step)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Metrics of training step `step` (the first is 1)."""
        for sink in self.sinks:
            sink.log(step, metrics)
        if (news := CONSOLE.news()) is not None:
            self.message(news)

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Metrics `eval/<mode>/...` of the weights after `step` training steps."""
        for sink in self.sinks:
            sink.evaluation(step, metrics)

    def rollouts(self, step: int, records: list[dict]) -> None:
        """Dump the rollouts of one step; a step that is generated again replaces its dump."""
        for sink in self.sinks:
            sink.rollouts(step, records)

    def eval_rollouts(self, step: int, records: list[dict]) -> None:
        """Dump the rollouts of an evaluation with the weights after `step` training steps."""
        for sink in self.sinks:
            sink.eval_rollouts(step, records)

    def message(self, text: str) -> None:
        """Tell the user something, without breaking the progress display."""
        for sink in self.sinks:
            sink.message(text)

    def close(self) -> None:
        """Close every sink, also when closing one of them fails."""
        with ExitStack() as stack:
            for sink in self.sinks:
                stack.callback(sink.close)


def _sinks(config: LogConfig, run_dir: Path, total_steps: int, resolved_config: dict):
    from megatron_policysplit.logs.jsonl import JsonlSink

    yield JsonlSink(run_dir, dump_rollouts=config.rollouts)
    if config.tensorboard:
        from megatron_policysplit.logs.tensorboard import TensorBoardSink

        yield TensorBoardSink(run_dir / "tensorboard", resolved_config)
    if config.wandb_project is not None:
        from megatron_policysplit.logs.wandb import WandbSink

        yield WandbSink(config.wandb_project, config.wandb_mode, run_dir, resolved_config)
    if config.console:
        from megatron_policysplit.logs.console import ConsoleSink

        yield ConsoleSink(total_steps)


__all__ = ["Logger", "Sink", "without_secrets"]
