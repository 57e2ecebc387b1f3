"""The `sglang` engine: rollouts over HTTP, from an SGLang server or several behind sglang-router.

All samples of a prompt go together and its prefix is computed once: first a request with the prompt
alone, for no token, then one request a sample, each with its own seed; all have one routing key, by
which the router (with `--policy manual`) keeps them on one server. Why not otherwise (seen with
SGLang 0.5.23 and sglang-router 0.3.2):

- k equal prompts in one request are scheduled at once, so that a new prompt is computed k times;
  and the router refuses (422) the list of sampling parameters that k seeds need;
- `n=k` computes a prefix once, by such a request for no token of the server's own, but gives all
  samples one seed, which makes them equal under deterministic inference;
- by `--policy cache_aware` the router splits the samples of a prompt over servers, and sends all
  prompts that share a system prompt to the same one first.

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
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from megatron_policysplit.errors import EngineError, EngineLost
from megatron_policysplit.rollout.answers import (
    AnswerRules,
    Cause,
    UnusableAnswer,
    check_generated,
    error_of_refusal,
    read_cached,
    read_rollout,
    read_scores,
)
from megatron_policysplit.rollout.engine import EnginePaused, Request
from megatron_policysplit.rollout.payloads import (
    health_payload,
    prefix_payload,
    sample_payload,
    score_payload,
)
from megatron_policysplit.rollout.sglang_http import (
    CONNECT_SECONDS,
    EngineRefused,
    EngineTimedOut,
    EngineUnreachable,
    SglangClient,
)
from megatron_policysplit.rollout.sglang_stats import EngineStats, ModeStats
from megatron_policysplit.rollout.tasks import cancel_all, gather_failures, result_of
from megatron_policysplit.rows import Mode, Rollout

HEALTH_SECONDS = 60.0
ALONE_SECONDS = 30.0  # at most this long a stalled first prefix holds up the others
LONGEST_DELAY_SECONDS = 15.0
# The server's doing, not the request's: these count the time waited, all others count attempts.
PATIENT = (Cause.UNAVAILABLE, Cause.ABORTED)

T = TypeVar("T")


class SglangEngine:
    """Generates through one address, a server or a router; implements `engine.Engine`.

    Weights do not go through it; `serve_version` says which ones are served. Coroutines raise
    EngineError, which names the address and the remedy. All of them run on one event loop.
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
        """Nothing is asked for yet.

        stop_token_ids: ids that end a response; with none, every response has max_tokens.
        vocab_size: ids are below it.
        concurrency: requests in flight; one holds all samples of a question in a mode.
        request_seconds: time limit of one sample.
        retries: how often something is asked for again after a time limit, a damaged answer or
            one from other weights.
        unavailable_seconds: how long a request waits, in all, for a server that is down or aborts
            it.
        max_staleness: how many versions older than the served one the weights of a sample may be.
        backoff_seconds: longest delay before the first repetition; it doubles with each, up to
            LONGEST_DELAY_SECONDS.
        """
        self._client = SglangClient(url, api_key, timeout_seconds=request_seconds)
        self._stop_tokens, self._vocab_size = frozenset(stop_token_ids), vocab_size
        self._retries, self._unavailable_seconds = retries, unavailable_seconds
        self._max_staleness, self._backoff_seconds = max_staleness, backoff_seconds
        self._slots = asyncio.Semaphore(concurrency)
        self._stats = EngineStats()
        self._version: int | None = None
        self._paused = False
        self._running: set[asyncio.Task] = set()
        # By mode: set when its first prefix with the present weights has been answered.
        self._first_prefix: dict[Mode, asyncio.Event] = {}

    def serve_version(self, version: int) -> None:
        """Note that the server now holds weights of this version; others' answers are refused."""
        self._version = version
        self._first_prefix.clear()  # a weight sync empties the server's prefix cache

    @property
    def stats(self) -> EngineStats:
        """What happened since the last `metrics`."""
        return self._stats

    def metrics(self) -> dict[str, float]:
        """What happened since the last call, by the names of the logs."""
        stats, self._stats = self._stats, EngineStats()
        return stats.named()

    async def submit(self, requests: Sequence[Request]) -> AsyncIterator[Rollout]:
        """Yield finished rollouts, every sample once; raises EnginePaused after a `pause`.

        When it is closed or cancelled the connections close, by which servers and router notice
        within some four seconds that they can stop.
        """
        for request in requests:
            self._check_ids(request.prompt, f"the prompt of question {request.question}")
        # Rollouts as they come, and each task once it has ended: behind its own rollouts, so that
        # none is lost when the last task has ended.
        events: asyncio.Queue[Rollout | asyncio.Task] = asyncio.Queue()
        tasks = self._start(self._generate(request, events.put_nowait) for request in requests)
        for task in tasks:
            task.add_done_callback(events.put_nowait)
        running = len(tasks)
        try:
            while running:
                event = await events.get()
                if isinstance(event, Rollout):
                    yield event
                else:
                    running -= 1
                    result_of(event)
        finally:
            await cancel_all(tasks)

    async def log_probs(
        self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[list[float]]:
        """Score given responses: log-probs (nats, temperature 1) of all response tokens.

        sequences: (prompt ids, response ids), together 7 tokens shorter than the server's context.
        """
        for number, (prompt, response) in enumerate(sequences):
            self._check_ids(prompt, f"the prompt of sequence {number}")
            self._check_ids(response, f"the response of sequence {number}")
        tasks = self._start(self._score(prompt, response) for prompt, response in sequences)
        try:
            if tasks:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
                for task in done:
                    result_of(task)
            return [task.result() for task in tasks]
        finally:
            await cancel_all(tasks)

    async def pause(self) -> None:
        """Return once nothing is asked for any more; running submits raise EnginePaused."""
        self._paused = True
        await cancel_all(list(self._running))

    async def resume(self) -> None:
        """Accept requests again."""
        self._paused = False

    async def health(self) -> int:
        """Have one token generated and return the served version.

        Raises EngineError if none is generated, or one by other weights.
        """
        rules = self._answer_rules()
        await self._ask(
            health_payload(),
            None,
            lambda answer, rid: check_generated(answer, rid, 1, 1, rules),
            HEALTH_SECONDS,
        )
        return rules.version

    async def aclose(self) -> None:
        """Stop what is running and close the connections."""
        await cancel_all(list(self._running))
        await self._client.close()

    async def _generate(self, request: Request, deliver: Callable[[Rollout], None]) -> None:
        """Deliver every sample of a request once; those that failed are asked for again."""
        seeds = dict(zip(request.samples, request.seeds, strict=True))  # of samples not delivered
        prompt = list(request.prompt)

        async def sample(index: int, routing_key: str) -> None:
            payload = sample_payload(prompt, request.sampling, seeds[index], self._stop_tokens)

            def read(answer: Any, rid: str) -> tuple[Rollout, int]:
                cached = read_cached(answer, rid, len(prompt))
                return read_rollout(answer, rid, request, index, self._answer_rules()), cached

            rollout, cached = await self._ask(payload, routing_key, read)
            stats = self._mode_stats(request.mode)
            stats.prompt_tokens += len(prompt)
            stats.prefill_tokens += len(prompt) - cached
            del seeds[index]
            deliver(rollout)

        async def prefix(routing_key: str) -> None:
            self._stats.requests += 1
            cached = await self._ask(
                prefix_payload(prompt),
                routing_key,
                lambda answer, rid: read_cached(answer, rid, len(prompt)),
            )
            self._mode_stats(request.mode).prefill_tokens += len(prompt) - cached

        async def attempt() -> list[UnusableAnswer]:
            # A new key each time: the server that failed need not be the one to retry.
            routing_key = uuid.uuid4().hex
            if failures := await self._ask_prefix(
                request.mode, partial(prefix, routing_key), len(seeds) > 1
            ):
                return failures
            self._stats.requests += len(seeds)
            return await gather_failures([sample(index, routing_key) for index in seeds])

        what = f"question {request.question} ({request.mode.value})"
        await self._persist(attempt, what, request.mode)

    async def _ask_prefix(
        self, mode: Mode, ask: Callable[[], Coroutine[Any, Any, None]], shared: bool
    ) -> list[UnusableAnswer]:
        """Ask for a prefix where several samples share it, or where it is the mode's first one.

        The mode's first prefix goes alone; the others wait a while for its answer.
        """
        if mode in self._first_prefix:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._first_prefix[mode].wait(), ALONE_SECONDS)
            return await gather_failures([ask()]) if shared else []
        answered = self._first_prefix[mode] = asyncio.Event()
        failures: list[UnusableAnswer] | None = None
        try:
            failures = await gather_failures([ask()])
            return failures
        finally:
            answered.set()
            # One that failed or was cancelled (None) filled no cache: the next is the first then.
            # Unless new weights came meanwhile, and with them another first prefix.
            if failures != [] and self._first_prefix.get(mode) is answered:
                del self._first_prefix[mode]

    async def _score(self, prompt: Sequence[int], response: Sequence[int]) -> list[float]:
        payload = score_payload(prompt, response)
        scores: list[float] = []

        def read(answer: Any, rid: str) -> list[float]:
            return read_scores(answer, rid, prompt, response, self._answer_rules())

        async def ask() -> None:
            scores[:] = await self._ask(payload, None, read)

        await self._persist(lambda: gather_failures([ask()]), "the log-probs of a response", None)
        return scores

    async def _persist(
        self, attempt: Callable[[], Awaitable[list[UnusableAnswer]]], what: str, mode: Mode | None
    ) -> None:
        """Attempt until every answer is usable.

        Raises EngineError when the limit on attempts is reached, EngineLost at that on waiting.
        """
        waited_seconds, attempts, repetitions = 0.0, 0, 0
        while True:
            # The slot is given back before the delay, so that others use it meanwhile.
            async with self._slots:
                start = time.monotonic()
                failures = await attempt()
            if not failures:
                return
            if mode is not None:
                self._mode_stats(mode).retries.update(failure.cause for failure in failures)
            impatient = [failure for failure in failures if failure.cause not in PATIENT]
            if impatient:
                attempts += 1
                if attempts > self._retries:
                    raise EngineError(
                        f"{self._client.address} gave no usable answer for {what} in {attempts} "
                        f"attempts (rollout.retries={self._retries}): {impatient[-1]}"
                    )
            else:
                # What ran for long before the server went was no waiting.
                waited_seconds += min(time.monotonic() - start, CONNECT_SECONDS)
                if waited_seconds > self._unavailable_seconds:
                    raise EngineLost(
                        f"{self._client.address} kept {what} waiting for {waited_seconds:.0f} s "
                        f"(rollout.unavailable_seconds={self._unavailable_seconds:g}): "
                        f"{failures[-1]}; see its log"
                    )
            # Random, so that the requests of one failed server do not come back all at once.
            delay = min(LONGEST_DELAY_SECONDS, self._backoff_seconds * 2.0 ** min(repetitions, 10))
            delay *= random.uniform(0.5, 1.0)
            repetitions += 1
            await asyncio.sleep(delay)
            waited_seconds += delay

    async def _ask(
        self,
        payload: dict[str, Any],
        routing_key: str | None,
        read: Callable[[Any, str], T],
        seconds: float | None = None,
    ) -> T:
        """Send one request and return what `read(answer, request id)` makes of its answer.

        Raises UnusableAnswer or EngineError.
        """
        rid = uuid.uuid4().hex
        try:
            answer = await self._client.generate(
                {**payload, "rid": rid}, timeout_seconds=seconds, routing_key=routing_key
            )
        except EngineTimedOut as error:
            hint = "raise rollout.request_seconds if responses take so long"
            raise UnusableAnswer(f"{error}; {hint}", Cause.TIME_LIMIT) from None
        except EngineUnreachable as error:
            raise UnusableAnswer(str(error), Cause.UNAVAILABLE) from None
        except EngineRefused as error:
            raise error_of_refusal(error) from None
        try:
            return read(answer, rid)
        except UnusableAnswer:
            raise
        except EngineError as error:
            raise EngineError(f"{self._client.address}: {error}") from None

    def _answer_rules(self) -> AnswerRules:
        """By the version that is served when the answer is read, not when it was asked for."""
        if self._version is None:
            raise EngineError(
                f"{self._client.address} has not been given weights by this run; sync them first"
            )
        return AnswerRules(self._stop_tokens, self._vocab_size, self._version, self._max_staleness)

    def _check_ids(self, ids: Sequence[int], what: str) -> None:
        # A server dies of an id that its embedding does not have.
        if not len(ids) or min(ids) < 0 or max(ids) >= self._vocab_size:
            detail = f"has ids outside 0 to {self._vocab_size - 1}" if len(ids) else "is empty"
            raise EngineError(
                f"{what} {detail}; the tokenizer and the weights in model.path must belong together"
            )

    def _mode_stats(self, mode: Mode) -> ModeStats:
        return self._stats.modes[mode]

    def _start(self, coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[asyncio.Task[T]]:
        if self._paused:
            raise EnginePaused("the engine is paused; call resume() and submit the requests again")
        self._answer_rules()  # raises here, not in a task, where no weights have been given yet
        tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
        for task in tasks:
            self._running.add(task)
            task.add_done_callback(self._running.discard)
        return tasks
