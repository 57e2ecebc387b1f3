"""The leader's side of generation: requests in lots from a shared queue, until all are answered."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from megatron_policysplit.config import ModesConfig, RolloutConfig, SamplingConfig
from megatron_policysplit.config.modes import sampling_by_mode
from megatron_policysplit.errors import TrainingError
from megatron_policysplit.rollout.engine import Engine, Request, Sampling
from megatron_policysplit.rollout.seeds import sample_seed
from megatron_policysplit.rows import Mode, Rollout, SecondRollout

# All requests of some questions: what a leader takes from the queue at a time.
Lot = Sequence[Request]


@dataclass
class CollectStats:
    """Counts of one `collect`, on one leader."""

    lots: int = 0  # taken from the queue
    retried: int = 0  # samples requested again
    duplicates: int = 0  # rollouts dropped because their sample had one already
    generated_tokens: int = 0  # of the returned rollouts
    seconds: float = 0.0  # from the first lot to the last rollout

    def named(self) -> dict[str, float]:
        """Return what went wrong on this leader's side, by the names of the logs."""
        return {
            "rollout/retried": float(self.retried),
            "rollout/duplicates": float(self.duplicates),
        }


class QuestionQueue:
    """Hands out the numbers 0 .. lots-1, each to one leader, so that fast leaders take more."""

    def __init__(self, store: torch.distributed.Store | None, key: str, lots: int):  # noqa: F821
        """Start at 0.

        store: a torch.distributed Store that all leaders share, or None for a single leader.
        key: a counter of the store that nothing has used before, so a new one for every batch.
        """
        self._store, self._key, self._lots = store, key, lots
        self._local = itertools.count()

    def next(self) -> int | None:
        """Return the next lot's number, or None when all have been handed out."""
        lot = next(self._local) if self._store is None else self._store.add(self._key, 1) - 1
        return lot if lot < self._lots else None


@dataclass(frozen=True)
class RequestSettings:
    """What all requests of a run have in common."""

    sampling: Mapping[Mode, SamplingConfig]  # by the mode that samples
    max_response_tokens: int
    seed: int  # of the run


def request_settings(rollout: RolloutConfig, modes: ModesConfig, seed: int) -> RequestSettings:
    """Return the settings of a run's requests; `seed` is run.seed."""
    return RequestSettings(sampling_by_mode(rollout, modes), rollout.max_response_tokens, seed)


def build_requests(
    batch: int,
    questions: Iterable[int],
    prompts: Mapping[int, Mapping[Mode, Sequence[int]]],
    settings: RequestSettings,
    samples_per_mode: Mapping[Mode, int],
    purpose: str = "train",
    second: SecondRollout | None = None,
) -> list[Request]:
    """Build one request per question and mode that samples; a question's requests stay together.

    prompts: question -> mode -> prompt token ids.
    samples_per_mode: of the modes that sample.
    purpose: "train" or "evaluation", which never share a seed.
    second: further samples of the first questions, by requests of their own. Their numbers continue
        those of the first samples, so that they have seeds of their own.
    """
    requests = []
    for position, question in enumerate(questions):
        for mode, count in samples_per_mode.items():
            plan = settings.sampling[mode]
            draws = [(plan.temperature, range(count))]
            if second is not None and position < second.questions:
                draws.append(
                    (plan.temperature * second.temperature, range(count, count + second.samples))
                )
            for temperature, samples in draws:
                requests.append(
                    Request(
                        batch=batch,
                        question=question,
                        mode=mode,
                        prompt=prompts[question][mode],
                        sampling=Sampling(
                            temperature, plan.top_p, plan.top_k, settings.max_response_tokens
                        ),
                        samples=samples,
                        seeds=[
                            sample_seed(settings.seed, batch, question, mode, i, purpose)
                            for i in samples
                        ],
                    )
                )
    return requests


def split_lots(requests: Iterable[Request], lot_questions: int) -> list[list[Request]]:
    """Split requests into lots of `lot_questions` questions each; the last may have fewer.

    All requests of a question, of all its modes, are in one lot.
    """
    by_question: dict[int, list[Request]] = {}
    for request in requests:
        by_question.setdefault(request.question, []).append(request)
    groups = list(by_question.values())
    return [sum(groups[i : i + lot_questions], []) for i in range(0, len(groups), lot_questions)]


async def collect(
    engine: Engine,
    next_lot: Callable[[], Lot | None],
    *,
    concurrency: int = 2,
    retries: int = 2,
    timeout_seconds: float | None = None,
) -> tuple[list[Rollout], CollectStats]:
    """Generate every lot that `next_lot` gives until it gives None; rollouts come sorted by key.

    next_lot: returns another lot at every call, None when there is none left.
    concurrency: lots submitted at the same time.
    retries: how often the samples that an attempt did not deliver are requested again.
    timeout_seconds: time limit of one attempt at one lot.

    A second rollout of a sample is dropped and counted. Raises TrainingError naming what is missing
    after all attempts, or a rollout that was never requested. The engine's own errors, EnginePaused
    among them, pass through and end the other lots.
    """
    stats, rollouts, start = CollectStats(), [], time.monotonic()

    async def worker() -> None:
        while (lot := next_lot()) is not None:
            stats.lots += 1
            rollouts.extend(await _collect_lot(engine, lot, retries, timeout_seconds, stats))

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(worker())
    except BaseExceptionGroup as errors:
        # Callers know the engine's own errors, not groups of them.
        raise errors.exceptions[0] from None
    stats.generated_tokens = sum(len(rollout.tokens) for rollout in rollouts)
    stats.seconds = time.monotonic() - start
    return sorted(rollouts, key=lambda rollout: rollout.key), stats


async def _collect_lot(
    engine: Engine, lot: Lot, retries: int, timeout_seconds: float | None, stats: CollectStats
) -> list[Rollout]:
    keys = {key for request in lot for key in _keys(request)}
    rollouts: dict[tuple, Rollout] = {}
    is_timed_out = False  # whether the last attempt was
    for attempt in range(retries + 1):
        requests = _missing_requests(lot, rollouts)
        if not requests:
            break
        if attempt:
            stats.retried += len(keys) - len(rollouts)
        try:
            is_timed_out = False
            # Closed at once when the attempt ends early, so that the engine stops generating: a
            # generator that is only dropped is closed when it is collected.
            async with (
                asyncio.timeout(timeout_seconds) as limit,
                aclosing(engine.submit(requests)) as stream,
            ):
                async for rollout in stream:
                    if rollout.key not in keys:
                        raise TrainingError(
                            f"the engine returned {rollout.key}, which was not requested in this "
                            "lot; check that no other run uses the same engine"
                        )
                    if rollout.key in rollouts:
                        stats.duplicates += 1
                    else:
                        rollouts[rollout.key] = rollout
        except TimeoutError:
            if not limit.expired():  # the engine's own
                raise
            is_timed_out = True
    missing = sorted(keys - rollouts.keys())
    if missing:
        examples = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        cause = f"; the last attempt ran past {timeout_seconds} seconds" if is_timed_out else ""
        raise TrainingError(
            f"the engine did not deliver {len(missing)} of {len(keys)} responses of a lot in "
            f"{retries + 1} attempts{cause}; missing (batch, question, mode, sample): {examples}; "
            "check the engine's log"
        )
    return list(rollouts.values())


def _keys(request: Request) -> list[tuple[int, int, str, int]]:
    return [
        (request.batch, request.question, request.mode.value, sample) for sample in request.samples
    ]


def _missing_requests(lot: Lot, rollouts: Mapping[tuple, Rollout]) -> list[Request]:
    """The requests of a lot without the samples that have a rollout."""
    requests = []
    for request in lot:
        pairs = [
            (sample, seed)
            for key, sample, seed in zip(
                _keys(request), request.samples, request.seeds, strict=True
            )
            if key not in rollouts
        ]
        if pairs:
            samples, seeds = zip(*pairs, strict=True)
            requests.append(replace(request, samples=samples, seeds=seeds))
    return requests
