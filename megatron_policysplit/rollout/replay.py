"""The `replay` engine: rollouts from the dump of an earlier run, to work on training alone."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path

from megatron_policysplit.errors import DataError, EngineError
from megatron_policysplit.rollout.engine import EnginePaused, Request
from megatron_policysplit.rows import Mode, Rollout

DUMP = re.compile(r"step_\d{6,}\.jsonl")  # of a step's rollouts; what else lies there is no dump


class ReplayEngine:
    """Serves stored rollouts, one file a batch; implements `engine.InProcessEngine`.

    The files are step_NNNNNN.jsonl, a JSON record a line. A record needs batch, question, mode,
    sample, tokens, engine_logprobs, finish_reason and weight_versions; it may have reward and
    loss_mask.
    """

    def __init__(self, directory: str | Path):
        """Find the batches of `directory`; raises DataError when it has none."""
        self._directory = Path(directory)
        paths = [
            path
            for path in sorted(self._directory.glob("step_*.jsonl"))
            if DUMP.fullmatch(path.name) and path.is_file()
        ]
        if not paths:
            raise DataError(
                f"rollout.replay_dir={directory} holds no step_NNNNNN.jsonl; give the rollouts/ "
                "directory of a run made with log.rollouts=true"
            )
        self._files = {_first_batch(path): path for path in paths}  # batch -> its file
        self._cached: tuple[int, dict[tuple, Rollout]] | None = None
        self._version = 0
        self._paused = False

    async def submit(self, requests: Sequence[Request]) -> AsyncIterator[Rollout]:
        """Yield the stored rollouts of the requests.

        Raises DataError for one that was not dumped, EnginePaused after `pause`.
        """
        for request in requests:
            for sample in request.samples:
                if self._paused:
                    raise EnginePaused(
                        "the replay engine is paused; call resume() and submit the requests again"
                    )
                yield self._find((request.batch, request.question, request.mode.value, sample))

    def _find(self, key: tuple[int, int, str, int]) -> Rollout:
        batch = key[0]
        path = self._files.get(batch)
        if path is None:
            raise DataError(
                f"{self._directory} holds no rollouts of batch {batch} (its batches are "
                f"{min(self._files)} to {max(self._files)}); set train.steps to at most what the "
                "dumped run trained"
            )
        if self._cached is None or self._cached[0] != batch:
            self._cached = (batch, _read(path))
        rollout = self._cached[1].get(key)
        if rollout is None:
            raise DataError(
                f"{path} has no rollout with (batch, question, mode, sample) = {key}; replay with "
                "the data, run.seed, data.batch_questions, algorithm.name and "
                "rollout.samples_per_question of the dumped run"
            )
        return rollout

    def metrics(self) -> dict[str, float]:
        """Return nothing: this engine counts nothing of its own."""
        return {}

    async def log_probs(self, sequences: Sequence) -> list[list[float]]:
        """Raise EngineError: stored rollouts have no model."""
        raise EngineError("rollout.engine=replay has no model to score with; set agreement.every=0")

    async def load(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:  # noqa: F821
        """Note the version, and read the tensors to their end."""
        # The generator takes part in the collectives of the export; other ranks wait in them.
        for _ in tensors:
            pass
        self._version = version

    async def pause(self) -> None:
        """Make running submits end before their next rollout."""
        self._paused = True

    async def resume(self) -> None:
        """Accept requests again."""
        self._paused = False

    async def release(self) -> None:
        """Forget the batch read last; it is read again when asked for."""
        self._cached = None

    async def restore(self) -> None:
        """Do nothing: nothing is held that would have to come back before `submit`."""

    async def health(self) -> int:
        """Return the version loaded last; stored rollouts keep those they were sampled with."""
        return self._version


def _first_batch(path: Path) -> int:
    with path.open(encoding="utf-8", errors="replace") as lines:
        return _record(lines.readline(), path, 1).batch


def _read(path: Path) -> dict[tuple, Rollout]:
    rollouts: dict[tuple, Rollout] = {}
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            rollout = _record(line, path, number)
            if rollout.key in rollouts:
                raise DataError(
                    f"{path}, line {number}: {rollout.key} is there twice; remove one of the lines"
                )
            rollouts[rollout.key] = rollout
    return rollouts


def _record(line: str, path: Path, number: int) -> Rollout:
    try:
        record = json.loads(line)
        if not isinstance(record["mode"], str):
            raise TypeError(f"the mode {record['mode']} is not a name")
        return Rollout(
            batch=record["batch"],
            question=record["question"],
            mode=Mode(record["mode"]),
            sample=record["sample"],
            tokens=record["tokens"],
            engine_logprobs=record["engine_logprobs"],
            finish_reason=record["finish_reason"],
            weight_versions=[(first, version) for first, version in record["weight_versions"]],
            loss_mask=record.get("loss_mask", []),
            reward=record.get("reward", 0.0),
        )
    except KeyError as error:
        raise DataError(
            f"{path}, line {number}: the record has no {error}; dump the rollouts again"
        ) from error
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{path}, line {number}: not a rollout record ({error}); dump the rollouts again"
        ) from error
