"""Client of a judge model, which gives every response an integer score.

The judge stands behind POST /chat/completions of an OpenAI-compatible server. Its replies are read
by one rule (`parse_score`); a reply that does not fit the rule counts as unparsed and is never
guessed at.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

import aiohttp

from megatron_policysplit.config import JudgeConfig
from megatron_policysplit.errors import JudgeError
from megatron_policysplit.evaluation.judge_prompt import read_judge_prompt

LOWEST, HIGHEST = 1, 10
CONNECT_SECONDS = 30.0
BACKOFF_SECONDS = 1.0  # before the first repetition; doubled for each further one
LONGEST_WAIT_SECONDS = 60.0
GIVE_UP_AFTER = 3  # responses in a row without an answer, each after all of its retries

_SCORE = re.compile(
    r"[\s*_`]*score[\s*_`]*:[\s*_`]*(\d{1,2})(?:\s*/\s*10)?[\s*_`.]*", re.IGNORECASE
)
_PLACEHOLDER = re.compile(r"\{(question|response)\}")
# Question and response of the request that tries the judge out.
_TRIAL = ("Write one line about rain.", "Rain practises the piano on every tin roof in town.")


class JudgeUnavailable(JudgeError):
    """The judge gave no usable answer, after all retries."""


class JudgeRefusedRequest(JudgeError):
    """The judge refused this one request (400, 413, 422 and the like); it may take others."""


class _TemporaryFailure(Exception):
    """A failure that may be over soon. wait_seconds: what the server asks for; 0 if it does not."""

    def __init__(self, reason: str, wait_seconds: float = 0.0):
        super().__init__(reason)
        self.wait_seconds = wait_seconds


@dataclass(frozen=True)
class Verdict:
    """The judge's verdict on one response, made by `JudgeClient`."""

    score: int | None = None  # from 1 to 10; None without a reply, or where the reply has no score
    reply: str | None = None
    error: str | None = None  # why there is no reply


class JudgeClient:
    """Asks the judge of an `eval.judge` section about responses.

    It holds no connection between calls, so each call may run on its own event loop. The API key is
    sent, never shown. Raises ConfigError for a prompt that cannot be used.
    """

    def __init__(
        self,
        config: JudgeConfig,
        api_key: str | None = None,
        *,
        backoff_seconds: float = BACKOFF_SECONDS,
    ):
        self.config = config
        self.url = config.url.rstrip("/") + "/chat/completions"
        self._template = read_judge_prompt(config)
        self._key, self._backoff = api_key, backoff_seconds

    async def check(self) -> Verdict:
        """The verdict on a trial response. Raises JudgeError if the judge cannot be used."""
        async with self._session() as session:
            return await self._ask(session, *_TRIAL)

    async def judge(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """A verdict on each pair (question, response), in the order of the pairs.

        At most eval.judge.concurrency requests are in flight; one that waits before it is repeated
        counts. A judge that fails raises nothing: the verdicts hold the errors. Once GIVE_UP_AFTER
        responses in a row had no answer, or key, address or model are refused, it asks no more.
        """
        verdicts: dict[int, Verdict] = {}
        queue = iter(range(len(pairs)))  # shared by all workers
        unanswered, reason_to_stop = 0, None

        async def work() -> None:
            nonlocal unanswered, reason_to_stop
            for i in queue:
                if reason_to_stop is None:
                    try:
                        verdicts[i] = await self._ask(session, *pairs[i])
                        unanswered = 0
                    except JudgeError as error:
                        verdicts[i] = Verdict(error=str(error))
                        unanswered += isinstance(error, JudgeUnavailable)
                        # Any other JudgeError (key, address, model) meets every request alike.
                        final = not isinstance(error, (JudgeUnavailable, JudgeRefusedRequest))
                        if final or unanswered >= GIVE_UP_AFTER:
                            reason_to_stop = f"not asked any more, because {error}"
                else:
                    verdicts[i] = Verdict(error=reason_to_stop)

        async with self._session() as session, asyncio.TaskGroup() as workers:
            for _ in range(min(self.config.concurrency, len(pairs))):
                workers.create_task(work())
        return [verdicts[i] for i in range(len(pairs))]

    def _session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            connector=aiohttp.TCPConnector(limit=0),  # `judge` limits the requests itself
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(
                total=self.config.timeout_seconds, sock_connect=CONNECT_SECONDS
            ),
        )

    async def _ask(self, session: aiohttp.ClientSession, question: str, response: str) -> Verdict:
        """The verdict on one response, with retries. Raises JudgeError."""
        payload = {
            "model": self.config.model,
            "messages": [{"role": "user", "content": fill(self._template, question, response)}],
            "max_tokens": self.config.max_tokens,
            "temperature": self.config.temperature,
        }
        # null leaves a setting to the server.
        payload = {name: value for name, value in payload.items() if value is not None}
        attempts = self.config.retries + 1
        for attempt in range(attempts):
            try:
                return await self._post(session, payload)
            except _TemporaryFailure as failure:
                reason, wait_seconds = str(failure), failure.wait_seconds
            if attempt + 1 < attempts:
                seconds = max(self._backoff * 2**attempt, wait_seconds)
                await asyncio.sleep(min(seconds, LONGEST_WAIT_SECONDS))
        raise JudgeUnavailable(
            f"the judge at {self.url} gave no answer in {attempts} attempt{'s' * (attempts > 1)} "
            f"({reason}); see that eval.judge.url is right and its server at work, or set "
            "eval.judge.url=null"
        )

    async def _post(self, session: aiohttp.ClientSession, payload: dict) -> Verdict:
        """Send one request. Raises _TemporaryFailure for what may pass, JudgeError for the rest."""
        try:
            # A redirect would turn the POST into a GET, or carry the responses to a server nobody
            # named.
            async with session.post(self.url, json=payload, allow_redirects=False) as answer:
                status, body = answer.status, await answer.read()
                wait = answer.headers.get("Retry-After")
        except TimeoutError:
            raise _TemporaryFailure(
                f"none within eval.judge.timeout_seconds={self.config.timeout_seconds:g}"
            ) from None
        except (aiohttp.ClientError, OSError) as error:
            raise _TemporaryFailure(str(error) or type(error).__name__) from None
        if status in (408, 429) or status >= 500:
            raise _TemporaryFailure(
                f"it answered {status}: {self._excerpt(body)}", retry_after_seconds(wait)
            )
        if not 200 <= status < 300:
            raise self._refusal(status, self._excerpt(body))
        try:
            choice = json.loads(body)["choices"][0]
            reply = choice["message"].get("content") or ""
            if not isinstance(reply, str):
                raise TypeError
            # A reply that was cut has no score: of "Score: 10" a cut may leave "Score: 1".
            truncated = choice.get("finish_reason") == "length"
            return Verdict(None if truncated else parse_score(reply), reply)
        except (ValueError, LookupError, TypeError, AttributeError):
            raise _TemporaryFailure(
                f"its answer is not a chat completion: {self._excerpt(body)}"
            ) from None

    def _refusal(self, status: int, excerpt: str) -> JudgeError:
        """The error for an answer that no repetition would change, with its remedy."""
        text = f"the judge at {self.url} answered {status} ({excerpt}); "
        variable = self.config.api_key_variable
        if status in (401, 403) and variable is None:
            return JudgeError(
                text
                + "set eval.judge.api_key_variable to the name of a variable that holds its API key"
            )
        if status in (401, 403):
            return JudgeError(
                f"{text}put a key that may use eval.judge.model={self.config.model} into the "
                f"environment variable {variable}, which eval.judge.api_key_variable names"
            )
        if status == 404:
            return JudgeError(
                f"{text}eval.judge.url must be the base, such as http://host:port/v1, and "
                f"eval.judge.model={self.config.model} a model that it serves"
            )
        if status < 400:
            return JudgeError(text + "set eval.judge.url to the address that it redirects to")
        return JudgeRefusedRequest(
            text + "see whether it knows eval.judge.model and takes such requests"
        )

    def _excerpt(self, body: bytes) -> str:
        """The beginning of an answer on one line, without the key that a server may repeat."""
        text = " ".join(body.decode(errors="replace").split())
        return (text.replace(self._key, "***") if self._key else text)[:300] or "nothing more"


def fill(template: str, question: str, response: str) -> str:
    """The template with {question} and {response} filled in; braces inside the two mean nothing."""
    texts = {"question": question, "response": response}
    return _PLACEHOLDER.sub(lambda match: texts[match[1]], template)


def parse_score(reply: str) -> int | None:
    """The N of a last line `Score: N`, an integer from 1 to 10; None for any other reply.

    Case, Markdown's emphasis, a full stop and `/10` behind N do not matter; empty lines at the end
    are skipped.
    """
    match = _SCORE.fullmatch(reply.rstrip().rpartition("\n")[2])
    return int(match[1]) if match and LOWEST <= int(match[1]) <= HIGHEST else None


def retry_after_seconds(value: str | None) -> float:
    """Seconds that a Retry-After header asks to wait; 0 without a readable one.

    value: a number of seconds or a date (RFC 9110, section 10.2.3).
    """
    try:
        if value is None or value.strip().isdigit():
            return float(value or 0)
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0


def judge_measures(verdicts: Iterable[Verdict]) -> dict[str, float | int]:
    """Measures of a judge's verdicts.

    judge_score: mean over the responses with a score, on the judge's scale; left out without one.
    judge_unparsed: number of replies without a score.
    judge_failed: number of responses without a reply.
    """
    verdicts = list(verdicts)
    scores = [verdict.score for verdict in verdicts if verdict.score is not None]
    failed = sum(verdict.error is not None for verdict in verdicts)
    counts = {"judge_unparsed": len(verdicts) - len(scores) - failed, "judge_failed": failed}
    return ({"judge_score": sum(scores) / len(scores)} if scores else {}) | counts
