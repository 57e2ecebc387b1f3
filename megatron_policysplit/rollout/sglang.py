"""The `sglang` engine: rollouts from one SGLang server, or from several behind sglang-router, over
HTTP.

All samples of a prompt go together and its prefix is computed once: first a request with the prompt
alone, for no token, then one request a sample, each with its own seed; all have one routing key, by
which the router (with `--policy manual`) keeps them on one server. Why not otherwise (seen with
SGLang 0.5.23 and sglang-router 0.3.2):

- k equal prompts in one request are scheduled at once, so that a new prompt is computed k times;
  and the router
  refuses (422) the list of sampling parameters that k seeds need;
- `n=k` computes a prefix once, by such a request for no token of the server's own, but gives all
  samples one seed,
  which makes them equal under deterministic inference;
- by `--policy cache_aware` the router splits the samples of a prompt over servers, and sends all
  prompts that share a
  system prompt to the same one first.

The prompts of the high-entropy mode share their system prompt, and a scheduler that gets several at
once computes it for each of them (SGLang's `--schedule-policy lpm` too). So the first prefix of a
mode after new weights goes alone; the others find its system prompt in the cache. That holds for
the server it goes to; others behind the router compute the system prompt for each of the requests
that reach them first.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from megatron_policysplit.errors import EngineError, EngineLost
from megatron_policysplit.rollout.answers import (
    Accepted,
    Cause,
    Unfinished,
    check_generated,
    read_cached,
    read_rollout,
    read_scores,
    refusal,
)
from megatron_policysplit.rollout.engine import EnginePaused, Request
from megatron_policysplit.rollout.sglang_http import (
    CONNECT_SECONDS,
    EngineRefused,
    EngineTimedOut,
    EngineUnreachable,
    SglangClient,
)
from megatron_policysplit.rollout.sglang_stats import EngineStats, ModeStats
from megatron_policysplit.rows import Mode, Rollout

HEALTH_SECONDS = 60.0
ALONE_SECONDS = 30.0  # at most this long a stalled first prefix holds up the others
LONGEST_DELAY_SECONDS = 15.0
PATIENT = (
    Cause.UNAVAILABLE,
    Cause.ABORTED,
)  # the server's doing, not the request's: time counts, not attempts

T = TypeVar("T")


class SglangEngine:
    """Generates through one address. Weights do not go through it; `serve_version` says which ones
    are served.

    stop_token_ids: ids that end a response; with none, every response has max_tokens. vocab_size:
    ids are below it.
    concurrency: requests in flight; one holds all samples of a question in a mode.
    request_seconds: time limit of one sample. retries: how often something is asked for again after
    a time limit, a damaged answer or one from other weights. unavailable_seconds: how long a
    request waits, in all, for a server that is down or aborts it.
    max_staleness: how many versions older than the served one the weights of a sample may be.
    backoff_seconds: longest delay before the first repetition; it doubles with each, up to 15
    seconds.

    Coroutines raise EngineError, which names the address and the remedy. All of them run on one
    event loop.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None,
        stop_token_ids: Sequence[int],
        vocab_size: int,
        concurrency: int,
        request_seconds: float,
        retries: int,
        unavailable_seconds: float,
        max_staleness: int = 0,
        backoff_seconds: float = 1.0,
    ):
        self._client = SglangClient(url, api_key, timeout_seconds=request_seconds)
        self._stop_tokens, self._vocab_size = frozenset(stop_token_ids), vocab_size
        self._retries, self._unavailable_seconds = retries, unavailable_seconds
        self._max_staleness, self._backoff_seconds = max_staleness, backoff_seconds
        self._slots = asyncio.Semaphore(concurrency)
        self._stats = EngineStats()
        self._version: int | None = None
        self._paused = False
        self._running: set[asyncio.Task] = set()
        self._first: dict[
            Mode, asyncio.Event
        ] = {}  # set when the first prefix with these weights has been answered

    def serve_version(self, version: int) -> None:
        """From now on the server holds weights of this version; answers from others are not
        accepted.
        """
        self._version = version
        self._first.clear()  # a weight sync empties the server's prefix cache

    @property
    def stats(self) -> EngineStats:
        """What happened since the last `metrics`."""
        return self._stats

    def metrics(self) -> dict[str, float]:
        """What happened since the last call, by the names of the logs."""
        stats, self._stats = self._stats, EngineStats()
        return stats.named()

    async def submit(self, requests: Sequence[Request]) -> AsyncIterator[Rollout]:
        """Finished rollouts, every sample once; raises EnginePaused when `pause` is called
        meanwhile.

        When it is closed or cancelled the connections close, by which servers and router notice
        within some four seconds that they can stop.
        """
        for request in requests:
            self._check_ids(request.prompt, f"the prompt of question {request.question}")
        arrived: asyncio.Queue[Rollout | asyncio.Task] = asyncio.Queue()
        tasks = self._start(self._generate(request, arrived.put_nowait) for request in requests)
        for task in tasks:
            task.add_done_callback(arrived.put_nowait)
        unfinished = len(tasks)
        try:
            while unfinished:
                item = await arrived.get()
                if isinstance(item, Rollout):
                    yield item
                else:
                    unfinished -= 1
                    _result(item)
        finally:
            await _stop(tasks)

    async def log_probs(
        self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[list[float]]:
        """Log-probs (nats, temperature 1) of the response tokens of (prompt ids, response ids),
        nothing sampled.

        Prompt and response together must be 7 tokens shorter than the server's context.
        """
        for number, (prompt, response) in enumerate(sequences):
            self._check_ids(prompt, f"the prompt of sequence {number}")
            self._check_ids(response, f"the response of sequence {number}")
        tasks = self._start(self._score(prompt, response) for prompt, response in sequences)
        try:
            if tasks:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
                for task in done:
                    _result(task)
            return [task.result() for task in tasks]
        finally:
            await _stop(tasks)

    async def pause(self) -> None:
        """Returns once nothing is asked for any more; running submits raise EnginePaused."""
        self._paused = True
        await _stop(list(self._running))

    async def resume(self) -> None:
        self._paused = False

    async def health(self) -> int:
        """The served version, after one token was generated; EngineError if none is, or one by
        other weights.
        """
        accepted = self._accepted()
        sampling = {"max_new_tokens": 1, "temperature": 1.0, "ignore_eos": True}
        payload = {"input_ids": [0], "sampling_params": sampling}
        await self._ask(
            payload,
            None,
            lambda answer, rid: check_generated(answer, rid, 1, 1, accepted),
            HEALTH_SECONDS,
        )
        return accepted.version

    async def aclose(self) -> None:
        """Stop what is running and close the connections."""
        await _stop(list(self._running))
        await self._client.close()

    async def _generate(self, request: Request, deliver: Callable[[Rollout], None]) -> None:
        """All samples of a request, those that failed together again until each has been delivered
        once.
        """
        outstanding = dict(zip(request.samples, request.seeds, strict=True))
        prompt = list(request.prompt)

        async def sample(index: int, routing_key: str) -> None:
            payload = {
                "input_ids": prompt,
                "sampling_params": self._sampling(request, outstanding[index]),
                "return_logprob": True,
            }

            def read(answer: Any, rid: str) -> tuple[Rollout, int]:
                cached = read_cached(answer, rid, len(prompt))
                return read_rollout(answer, rid, request, index, self._accepted()), cached

            rollout, cached = await self._ask(payload, routing_key, read)
            stats = self._of(request.mode)
            stats.prompt_tokens += len(prompt)
            stats.prefill_tokens += len(prompt) - cached
            del outstanding[index]
            deliver(rollout)

        async def prefix(routing_key: str) -> None:
            payload = {
                "input_ids": prompt,
                "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            }
            self._stats.requests += 1
            cached = await self._ask(
                payload, routing_key, lambda answer, rid: read_cached(answer, rid, len(prompt))
            )
            self._of(request.mode).prefill_tokens += len(prompt) - cached

        async def attempt() -> list[Unfinished]:
            routing_key = (
                uuid.uuid4().hex
            )  # a new one each time: the server that failed need not be the one to retry
            if failures := await self._prefix(
                request.mode, partial(prefix, routing_key), len(outstanding) > 1
            ):
                return failures
            self._stats.requests += len(outstanding)
            return await _together([sample(index, routing_key) for index in outstanding])

        await self._persist(
            attempt, f"question {request.question} ({request.mode.value})", request.mode
        )

    async def _prefix(
        self, mode: Mode, ask: Callable[[], Coroutine[Any, Any, None]], shared: bool
    ) -> list[Unfinished]:
        """Ask for the prefix of several samples, or for the first one of a mode, for which the
        others wait a while.
        """
        if mode in self._first:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._first[mode].wait(), ALONE_SECONDS)
            return await _together([ask()]) if shared else []
        first = self._first[mode] = asyncio.Event()
        failures: list[Unfinished] | None = None
        try:
            failures = await _together([ask()])
            return failures
        finally:
            first.set()
            if failures != [] and self._first.get(mode) is first:
                del self._first[mode]

    async def _score(self, prompt: Sequence[int], response: Sequence[int]) -> list[float]:
        payload = {
            "input_ids": [*prompt, *response],
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": len(prompt) - 1,
        }
        scores: list[float] = []

        async def ask() -> None:
            scores[:] = await self._ask(
                payload,
                None,
                lambda answer, rid: read_scores(answer, rid, prompt, response, self._accepted()),
            )

        await self._persist(lambda: _together([ask()]), "the log-probs of a response", None)
        return scores

    async def _persist(
        self, attempt: Callable[[], Awaitable[list[Unfinished]]], what: str, mode: Mode | None
    ) -> None:
        """Attempt until nothing is unfinished; raises EngineError when the limits on time or
        attempts are reached.
        """
        waited, spent, repetitions = 0.0, 0, 0
        while True:
            async with self._slots:
                began = time.monotonic()
                failures = await attempt()
            if not failures:
                return
            if mode is not None:
                self._of(mode).retries.update(failure.cause for failure in failures)
            impatient = [failure for failure in failures if failure.cause not in PATIENT]
            if impatient:
                spent += 1
                if spent > self._retries:
                    raise EngineError(
                        f"{self._client.address} gave no usable answer for {what} in {spent} "
                        "attempts "
                        f"(rollout.retries={self._retries}): {impatient[-1]}"
                    )
            else:
                # What ran for long before the server went was no waiting.
                waited += min(time.monotonic() - began, CONNECT_SECONDS)
                if waited > self._unavailable_seconds:
                    raise EngineLost(
                        f"{self._client.address} kept {what} waiting for {waited:.0f} s "
                        f"(rollout.unavailable_seconds={self._unavailable_seconds:g}): "
                        f"{failures[-1]}; see its log"
                    )
            delay = min(LONGEST_DELAY_SECONDS, self._backoff_seconds * 2.0 ** min(repetitions, 10))
            delay *= random.uniform(0.5, 1.0)
            repetitions += 1
            await asyncio.sleep(delay)
            waited += delay

    async def _ask(
        self,
        payload: Mapping[str, Any],
        routing_key: str | None,
        read: Callable[[Any, str], T],
        seconds: float | None = None,
    ) -> T:
        """One request and what `read(answer, request id)` makes of the answer; raises Unfinished or
        EngineError.
        """
        rid = uuid.uuid4().hex
        try:
            answer = await self._client.generate(
                {**payload, "rid": rid}, timeout_seconds=seconds, routing_key=routing_key
            )
        except EngineTimedOut as error:
            hint = "raise rollout.request_seconds if responses take so long"
            raise Unfinished(f"{error}; {hint}", Cause.TIME_LIMIT) from None
        except EngineUnreachable as error:
            raise Unfinished(str(error), Cause.UNAVAILABLE) from None
        except EngineRefused as error:
            raise refusal(error) from None
        try:
            return read(answer, rid)
        except Unfinished:
            raise
        except EngineError as error:
            raise EngineError(f"{self._client.address}: {error}") from None

    def _sampling(self, request: Request, seed: int) -> dict[str, Any]:
        """Every parameter that bends the distribution is named, whatever the server's defaults are."""
        return {
            "temperature": request.sampling.temperature,
            "top_p": request.sampling.top_p,
            "top_k": request.sampling.top_k,
            "min_p": 0.0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "repetition_penalty": 1.0,
            "min_new_tokens": 0,
            "max_new_tokens": request.sampling.max_tokens,
            "stop_token_ids": sorted(self._stop_tokens),
            "ignore_eos": not self._stop_tokens,
            "no_stop_trim": True,
            "skip_special_tokens": False,
            "sampling_seed": seed,  # [0, 2**63), which SGLang takes as it is
        }

    def _accepted(self) -> Accepted:
        if self._version is None:
            raise EngineError(
                f"{self._client.address} has not been given weights by this run; sync them first"
            )
        return Accepted(self._stop_tokens, self._vocab_size, self._version, self._max_staleness)

    def _check_ids(self, ids: Sequence[int], what: str) -> None:
        """A server dies of an id that its embedding does not have."""
        if not len(ids) or min(ids) < 0 or max(ids) >= self._vocab_size:
            detail = f"has ids outside 0 to {self._vocab_size - 1}" if len(ids) else "is empty"
            raise EngineError(
                f"{what} {detail}; the tokenizer and the weights in model.path must belong together"
            )

    def _of(self, mode: Mode) -> ModeStats:
        return self._stats.modes[mode]

    def _start(self, coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[asyncio.Task[T]]:
        if self._paused:
            raise EnginePaused("the engine is paused; call resume() and submit the requests again")
        self._accepted()
        tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
        for task in tasks:
            self._running.add(task)
            task.add_done_callback(self._running.discard)
        return tasks


async def _together(coroutines: Sequence[Coroutine[Any, Any, None]]) -> list[Unfinished]:
    """Run all to their end and return what they left unfinished; any other error ends all of them
    and is raised.
    """
    failures = []

    async def note(coroutine: Coroutine[Any, Any, None]) -> None:
        try:
            await coroutine
        except Unfinished as failure:
            failures.append(failure)

    try:
        async with asyncio.TaskGroup() as group:
            for coroutine in coroutines:
                group.create_task(note(coroutine))
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return failures


def _result(task: asyncio.Task[T]) -> T:
    if task.cancelled():
        raise EnginePaused(
            "the engine was paused while it generated; submit the requests again after resume()"
        )
    return task.result()


async def _stop(tasks: Sequence[asyncio.Task]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
