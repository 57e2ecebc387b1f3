"""Files: metrics.jsonl, rollouts/{step,eval}_NNNNNN.jsonl, reward_errors.jsonl (not gradable),
messages.log.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_policysplit.errors import DataError
from megatron_policysplit.logs.sink import Sink


class JsonlSink(Sink):
    """One JSON object a line; files that are replaced are written beside and renamed.

    A line of metrics.jsonl is {"step", "kind": "train" or "eval", "time": Unix seconds,
    metrics...}. It never holds two lines of one step and kind: on resume the lines of steps that
    are trained again are dropped, and a step logged twice keeps its newer line.
    """

    def __init__(self, run_dir: Path, dump_rollouts: bool = True):
        self.run_dir = run_dir
        self.dump_rollouts = dump_rollouts
        self.path = run_dir / "metrics.jsonl"
        self.file = None
        self.written: set[tuple[int, str]] = set()

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
        failed = [record for record in records if record.get("reward_error")]
        if failed:
            with open(
                self.run_dir / "reward_errors.jsonl",
                "a",
                encoding="utf-8",
                errors="backslashreplace",
            ) as file:
                file.writelines(to_json({"step": step, **record}) + "\n" for record in failed)
        if self.dump_rollouts:
            path.parent.mkdir(exist_ok=True)
            replace(path, map(to_json, records))

    def message(self, text: str) -> None:
        with open(
            self.run_dir / "messages.log", "a", encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None

    def _write(self, step: int, kind: str, metrics: dict[str, float]) -> None:
        if self.file is None:
            raise RuntimeError(
                "Logger.start(step) must come before the first metrics, and close() after the last"
            )
        if (step, kind) in self.written:
            self._keep(lambda record: (record["step"], record["kind"]) != (step, kind))
        self.file.write(
            to_json({"step": step, "kind": kind, "time": time.time(), **metrics}) + "\n"
        )
        self.file.flush()
        self.written.add((step, kind))

    def _keep(self, wanted) -> None:
        """Rewrite metrics.jsonl with the wanted records only, and open it for appending."""
        self.close()
        records = (
            [record for record in read_metrics_file(self.path) if wanted(record)]
            if self.path.exists()
            else []
        )
        replace(self.path, map(to_json, records))
        self.written = {(record["step"], record["kind"]) for record in records}
        self.file = open(self.path, "a", encoding="utf-8", errors="backslashreplace")


def rollout_path(run_dir: Path, step: int) -> Path:
    return Path(run_dir) / "rollouts" / f"step_{step:06d}.jsonl"


def replace(path: Path, lines: Iterable[str]) -> None:
    """Write a text file beside `path`, flush it to disk and rename it into place: readers see old
    or new, whole.
    """
    beside = path.with_name(path.name + ".partial")
    with open(beside, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(line + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def to_json(record: dict) -> str:
    """One line of standard JSON: what is not finite becomes null, numbers of numpy and torch become
    plain ones.
    """
    return json.dumps(_plain(record), ensure_ascii=False, allow_nan=False)


def read_jsonl(path: Path) -> Iterator[dict]:
    """The records of a JSONL file. A last line without its newline was cut by a crash and is left
    out.

    Raises DataError naming file and line when any other line is not a JSON object.
    """
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                return
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict):
                raise DataError(
                    f"{path}:{number} is not a JSON object; remove that line, or restore the file"
                )
            yield record


def read_metrics_file(path: Path) -> list[dict]:
    """The records of a metrics.jsonl; DataError when one has no `step` or no `kind`."""
    records = list(read_jsonl(path))
    for record in records:
        if not isinstance(record.get("step"), int) or record.get("kind") not in ("train", "eval"):
            raise DataError(
                f"{path} holds {str(record)[:80]}, which is not a metrics record; remove that line"
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
