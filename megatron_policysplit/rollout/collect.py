"""The leader's side of generation: what to ask for, in lots from a shared queue, until all of it is
there.
"""

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
    """lots: taken by this leader. retried: samples requested again. duplicates: rollouts dropped as
    such.
    generated_tokens: of the rollouts kept. seconds: from the first lot to the last rollout.
    """

    lots: int = 0
    retried: int = 0
    duplicates: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0

    def named(self) -> dict[str, float]:
        """What went wrong on this leader's side, for the logs."""
        return {
            "rollout/retried": float(self.retried),
            "rollout/duplicates": float(self.duplicates),
        }


class QuestionQueue:
    """Hands out the numbers 0 .. lots-1, each to one leader.

    store: a torch.distributed Store that all leaders share, or None for a single leader. key: a
    counter of the store that nothing has used before, so one of its own for every rollout batch.
    """

    def __init__(self, store: torch.distributed.Store | None, key: str, lots: int):  # noqa: F821
        self._store, self._key, self._lots = store, key, lots
        self._local = itertools.count()

    def next(self) -> int | None:
        """The next lot's number, or None when all have been handed out."""
        lot = next(self._local) if self._store is None else self._store.add(self._key, 1) - 1
        return lot if lot < self._lots else None


@dataclass(frozen=True)
class RequestSettings:
    """What all requests of a run have in common."""

    sampling: Mapping[Mode, SamplingConfig]  # by the mode that samples
    max_response_tokens: int
    seed: int  # of the run


def request_settings(rollout: RolloutConfig, modes: ModesConfig, seed: int) -> RequestSettings:
    """The settings of a run's requests; `seed` is run.seed."""
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
    """One request per question and mode that is sampled at all; questions stay together, in their
    order.

    second: further samples of the first questions, by requests of their own. Their numbers go on
    from the others', so their seeds are others too.

    prompts: question -> mode -> prompt token ids. samples_per_mode: of the modes that sample.
    purpose: "train" or "evaluation", which never share a seed.
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
    """Lots of `lot_questions` questions each (the last may have fewer), all modes of a question in
    one lot.
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

    concurrency: lots submitted at the same time. timeout_seconds: of one attempt at one lot.
    Samples that an attempt did not deliver are requested again, at most `retries` times; a second
    rollout of a sample is dropped and counted. Raises TrainingError naming what is still missing
    after that, or a rollout that was never requested; the engine's own errors, EnginePaused among
    them, pass through and end the other lots.
    """
    stats, rollouts, began = CollectStats(), [], time.monotonic()

    async def worker() -> None:
        while (lot := next_lot()) is not None:
            stats.lots += 1
            rollouts.extend(await _collect_lot(engine, lot, retries, timeout_seconds, stats))

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(worker())
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    stats.generated_tokens = sum(len(rollout.tokens) for rollout in rollouts)
    stats.seconds = time.monotonic() - began
    return sorted(rollouts, key=lambda rollout: rollout.key), stats


async def _collect_lot(
    engine: Engine, lot: Lot, retries: int, timeout_seconds: float | None, stats: CollectStats
) -> list[Rollout]:
    wanted = {key for request in lot for key in _keys(request)}
    arrived: dict[tuple, Rollout] = {}
    timed_out = False
    for attempt in range(retries + 1):
        outstanding = _without(lot, arrived)
        if not outstanding:
            break
        if attempt:
            stats.retried += len(wanted) - len(arrived)
        try:
            timed_out = False
            async with (
                asyncio.timeout(timeout_seconds) as limit,
                aclosing(engine.submit(outstanding)) as stream,
            ):
                async for rollout in stream:
                    if rollout.key not in wanted:
                        raise TrainingError(
                            f"the engine returned {rollout.key}, which was not requested in this "
                            "lot; "
                            "check that no other run uses the same engine"
                        )
                    if rollout.key in arrived:
                        stats.duplicates += 1
                    else:
                        arrived[rollout.key] = rollout
        except TimeoutError:
            if not limit.expired():  # the engine's own
                raise
            timed_out = True
    missing = sorted(wanted - arrived.keys())
    if missing:
        named = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        cause = f"; the last attempt ran past {timeout_seconds} seconds" if timed_out else ""
        raise TrainingError(
            f"the engine did not deliver {len(missing)} of {len(wanted)} responses of a lot in "
            f"{retries + 1} attempts"
            f"{cause}; missing (batch, question, mode, sample): {named}; check the engine's log"
        )
    return list(arrived.values())


def _keys(request: Request) -> list[tuple[int, int, str, int]]:
    return [
        (request.batch, request.question, request.mode.value, sample) for sample in request.samples
    ]


def _without(lot: Lot, arrived: Mapping[tuple, Rollout]) -> list[Request]:
    """The requests of a lot, less the samples that have arrived."""
    left = []
    for request in lot:
        pairs = [
            (sample, seed)
            for key, sample, seed in zip(
                _keys(request), request.samples, request.seeds, strict=True
            )
            if key not in arrived
        ]
        if pairs:
            samples, seeds = zip(*pairs, strict=True)
            left.append(replace(request, samples=samples, seeds=seeds))
    return left
