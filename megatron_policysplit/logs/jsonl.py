"""Logs as files in the run directory.

metrics.jsonl: metrics, one line per step and kind.
rollouts/step_NNNNNN.jsonl, rollouts/eval_NNNNNN.jsonl: every rollout.
reward_errors.jsonl: rollouts that could not be graded.
messages.log: sentences for the user.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from megatron_policysplit.errors import DataError
from megatron_policysplit.files import naming_writes, replace_text
from megatron_policysplit.logs.sink import Sink


class JsonlSink(Sink):
    """Writes JSON lines; a file that is replaced is written beside and renamed into place.

    A line of metrics.jsonl is {"step", "kind": "train" or "eval", "time": Unix seconds,
    metrics...}. It never holds two lines of one step and kind: on resume the lines of steps that
    are trained again are dropped, and a step logged twice keeps its newer line.
    """

    def __init__(self, run_dir: Path, dump_rollouts: bool = True):
        self.run_dir = run_dir
        self.dump_rollouts = dump_rollouts
        self.path = run_dir / "metrics.jsonl"
        self.file = None  # metrics.jsonl, open for appending between `start` and `close`
        self.written: set[tuple[int, str]] = set()  # (step, kind) of its lines

    def start(self, step: int) -> None:
        self._keep(lambda record: record["step"] <= step)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._write(step, "train", metrics)

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        self._write(step, "eval", metrics)

    def rollouts(self, step: int, records: list[dict]) -> None:
        self._dump(rollout_path(self.run_dir, step), step, records)

    def eval_rollouts(self, step: int, records: list[dict]) -> None:
        self._dump(self.run_dir / "rollouts" / f"eval_{step:06d}.jsonl", step, records)

    def _dump(self, path: Path, step: int, records: list[dict]) -> None:
        errors = [record for record in records if record.get("reward_error")]
        if errors:
            with _appending(self.run_dir / "reward_errors.jsonl") as file:
                file.writelines(to_json({"step": step, **record}) + "\n" for record in errors)
        if self.dump_rollouts:
            with naming_writes(path):
                path.parent.mkdir(exist_ok=True)
            replace(path, map(to_json, records))

    def message(self, text: str) -> None:
        with _appending(self.run_dir / "messages.log") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def close(self) -> None:
        if self.file is not None:
            file, self.file = self.file, None
            with naming_writes(self.path):
                file.close()

    def _write(self, step: int, kind: str, metrics: dict[str, float]) -> None:
        if self.file is None:
            raise RuntimeError(
                "Logger.start(step) must come before the first metrics, and close() after the last"
            )
        if (step, kind) in self.written:
            self._keep(lambda record: (record["step"], record["kind"]) != (step, kind))
        record = {"step": step, "kind": kind, "time": time.time(), **metrics}
        with naming_writes(self.path):
            self.file.write(to_json(record) + "\n")
            self.file.flush()
        self.written.add((step, kind))

    def _keep(self, condition: Callable[[dict], bool]) -> None:
        """Rewrite metrics.jsonl with the records that meet a condition, and open it to append."""
        self.close()
        records = read_metrics_file(self.path) if self.path.exists() else []
        records = [record for record in records if condition(record)]
        replace(self.path, map(to_json, records))
        self.written = {(record["step"], record["kind"]) for record in records}
        with naming_writes(self.path):
            self.file = _open_to_append(self.path)


@contextmanager
def _appending(path: Path) -> Iterator[TextIO]:
    """A file to append lines to. Raises WriteError."""
    with naming_writes(path), _open_to_append(path) as file:
        yield file


def _open_to_append(path: Path) -> TextIO:
    # A lone surrogate in a text must not end the run.
    return open(path, "a", encoding="utf-8", errors="backslashreplace")


def rollout_path(run_dir: Path, step: int) -> Path:
    """The dump of the rollouts of a training step."""
    return Path(run_dir) / "rollouts" / f"step_{step:06d}.jsonl"


def replace(path: Path, lines: Iterable[str]) -> None:
    """Replace a text file by lines, as a whole (`replace_text`). Raises WriteError."""
    replace_text(path, (line + "\n" for line in lines))


def to_json(record: dict) -> str:
    """A record as one line of standard JSON.

    Numbers that are not finite become null, scalars of numpy and torch become plain numbers.
    """
    return json.dumps(_plain(record), ensure_ascii=False, allow_nan=False)


def read_jsonl(path: Path) -> Iterator[dict]:
    """The records of a JSONL file.

    A last line without its newline was cut by a crash and is left out. Raises DataError naming the
    file where it cannot be read, and file and line when any other line is not a JSON object.
    """
    try:
        file = open(path, encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); restore the file") from error
    with file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                return
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if not isinstance(record, dict):
                raise DataError(
                    f"{path}:{number} is not a JSON object; remove that line, or restore the file"
                )
            yield record


def read_metrics_file(path: Path) -> list[dict]:
    """The records of a metrics.jsonl. Raises DataError when one has no `step` or no `kind`."""
    records = list(read_jsonl(path))
    for number, record in enumerate(records, 1):
        step = record.get("step")
        is_step = isinstance(step, int) and not isinstance(step, bool)
        if not is_step or record.get("kind") not in ("train", "eval"):
            raise DataError(
                f"{path}:{number} holds {str(record)[:80]}, which is not a metrics record; remove "
                "that line"
            )
    return records


def _plain(value):
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if not isinstance(value, float):
        value = value.item()  # a numpy or torch scalar
    return value if not isinstance(value, float) or math.isfinite(value) else None
