"""What SGLang answers to /generate, checked: a rollout, the log-probs of given tokens, or why it is
neither.

Nothing here is repaired. An answer that is not whole raises `Unfinished` and is asked for again;
one that shows that the server is set up wrongly raises EngineError at once, with the remedy.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_policysplit.errors import EngineError
from megatron_policysplit.rollout.engine import Request
from megatron_policysplit.rollout.sglang_http import EngineRefused
from megatron_policysplit.rows import Rollout

LENGTH_REMEDY = (
    "the server must hold prompt and response: raise max-total-tokens, mem-fraction-static or "
    "context-length in "
    "rollout.server.arguments (the context 7 tokens longer than both), or lower "
    "data.max_prompt_tokens or "
    "rollout.max_response_tokens"
)
ROUNDING = 1e-4  # nats: a log-prob computed from rounded probabilities may lie so far above zero


class Cause(enum.Enum):
    """Why something is asked for again."""

    UNAVAILABLE = (
        "unavailable"  # no connection, a dropped one, half an answer, 429, 500, 502, 503, 504
    )
    ABORTED = "aborted"  # the server was paused or stopped meanwhile
    TIME_LIMIT = "time_limit"
    DAMAGED = "damaged"
    WRONG_VERSION = "wrong_version"


class Unfinished(EngineError):
    """No usable answer this time."""

    def __init__(self, message: str, cause: Cause):
        super().__init__(message)
        self.cause = cause


@dataclass(frozen=True)
class Accepted:
    """What an answer may contain. stop_tokens: ids that end a response; empty where every response
    has full length.
    version: weights now served, max_staleness: how many versions older they may be.
    """

    stop_tokens: frozenset[int]
    vocab_size: int
    version: int
    max_staleness: int


def read_rollout(
    answer: Any, rid: str, request: Request, sample: int, accepted: Accepted
) -> Rollout:
    """The rollout of one sample; raises Unfinished or EngineError."""
    meta = _meta(answer, rid, len(request.prompt))
    tokens, logprobs = _pairs(
        meta.get("output_token_logprobs"), "output_token_logprobs", accepted.vocab_size
    )
    if answer.get("output_ids") != tokens:
        raise _damaged("output_ids are not the ids that the log-probs belong to")
    if meta.get("completion_tokens") != len(tokens):
        raise _damaged(f"it has {len(tokens)} tokens and speaks of {meta.get('completion_tokens')}")
    if not 0 < len(tokens) <= request.sampling.max_tokens:
        raise _damaged(
            f"it has {len(tokens)} tokens; 1 to {request.sampling.max_tokens} were asked for"
        )
    return Rollout(
        batch=request.batch,
        question=request.question,
        mode=request.mode,
        sample=sample,
        tokens=tokens,
        engine_logprobs=logprobs,
        finish_reason=_finish(
            meta["finish_reason"], tokens, request.sampling.max_tokens, accepted.stop_tokens
        ),
        weight_versions=_spans(meta.get("weight_versions"), len(tokens), accepted),
    )


def read_scores(
    answer: Any, rid: str, prompt: Sequence[int], response: Sequence[int], accepted: Accepted
) -> list[float]:
    """Log-probs of the response tokens, asked for from the last prompt token on; raises Unfinished
    or EngineError.

    SGLang scales log-probs by the temperature for tokens that it samples, never for those that it
    is given.
    """
    meta = _meta(answer, rid, len(prompt) + len(response))
    entries = meta.get("input_token_logprobs")
    if not isinstance(entries, list) or len(entries) != 1 + len(response):
        raise _damaged(f"input_token_logprobs are not {1 + len(response)} entries")
    tokens, logprobs = _pairs(entries[1:], "input_token_logprobs", accepted.vocab_size)
    last = (
        accepted.vocab_size - 1
    )  # SGLang calls the last id of the vocabulary 0; the log-prob is the last id's own
    if any(
        got != sent and (got, sent) != (0, last) for got, sent in zip(tokens, response, strict=True)
    ):
        raise _damaged("the log-probs belong to other tokens than those that were sent")
    _spans(meta.get("weight_versions"), 0, accepted)
    return logprobs


def check_generated(
    answer: Any, rid: str, prompt_tokens: int, tokens: int, accepted: Accepted
) -> None:
    """Raises Unfinished or EngineError unless so many tokens were generated, by accepted weights."""
    _spans(_meta(answer, rid, prompt_tokens).get("weight_versions"), tokens, accepted)


def read_cached(answer: Any, rid: str, prompt_tokens: int) -> int:
    """How many of the prompt's tokens the server had computed before; raises Unfinished or
    EngineError.
    """
    meta = _meta(answer, rid, prompt_tokens)
    cached = meta.get("cached_tokens")
    if not isinstance(cached, int) or cached < 0:
        raise _damaged(f"cached_tokens is {cached!r}")
    return min(cached, prompt_tokens)  # a retracted request finds its own first tokens in the cache


def refusal(error: EngineRefused) -> EngineError:
    """What a refused request means: Unfinished if it may be accepted later, else the error that
    ends the run.
    """
    text = str(error)
    if error.status == 500 and "Out of memory" in text:
        return EngineError(f"{text}; {LENGTH_REMEDY}")
    if error.status in (429, 500):
        return Unfinished(text, Cause.UNAVAILABLE)
    if (
        error.status == 400 and "Duplicate request ID" in text
    ):  # something on the way sent the request twice
        return Unfinished(text, Cause.DAMAGED)
    if error.status in (401, 403):
        return EngineError(
            f"{text}; rollout.api_key_variable must name the variable with the key of these servers"
        )
    if error.status == 400 and any(word in text for word in ("length", "tokens", "longer")):
        return EngineError(f"{text}; {LENGTH_REMEDY}")
    return EngineError(
        f"{text}; the address must be that of an SGLang server or sglang-router that takes "
        "/generate"
    )


def _damaged(message: str) -> Unfinished:
    return Unfinished(f"the answer is damaged: {message}", Cause.DAMAGED)


def _meta(answer: Any, rid: str, prompt_tokens: int) -> Mapping[str, Any]:
    meta = answer.get("meta_info") if isinstance(answer, dict) else None
    if not isinstance(meta, dict) or not isinstance(meta.get("finish_reason"), dict):
        raise _damaged("it is no object with meta_info and finish_reason")
    if meta.get("id") != rid:
        raise _damaged(f"it belongs to request {meta.get('id')!r}, not to {rid!r}")
    if meta["finish_reason"].get("type") == "abort":
        message = str(meta["finish_reason"].get("message", "no reason given"))
        if "Out of memory" in message:
            raise EngineError(f"the server aborted a request: {message}; {LENGTH_REMEDY}")
        raise Unfinished(f"the server aborted the request: {message}", Cause.ABORTED)
    if meta.get("prompt_tokens") != prompt_tokens:
        raise _damaged(
            f"it is for a prompt of {meta.get('prompt_tokens')} tokens instead of {prompt_tokens}"
        )
    return meta


def _pairs(entries: Any, name: str, vocab_size: int) -> tuple[list[int], list[float]]:
    """Ids and log-probs (nats) of entries [log-prob, id, text]."""
    if not isinstance(entries, list):
        raise _damaged(f"{name} is no list")
    tokens, logprobs = [], []
    for entry in entries:
        if not isinstance(entry, list) or len(entry) < 2:
            raise _damaged(f"{name} has the entry {entry!r}")
        logprob, token = entry[0], entry[1]
        if type(token) is not int or not 0 <= token < vocab_size:
            raise _damaged(f"token {token!r} is outside the vocabulary of {vocab_size}")
        if type(logprob) not in (int, float) or not math.isfinite(logprob) or logprob > ROUNDING:
            raise _damaged(f"{name} has the log-prob {logprob!r}")
        tokens.append(token)
        logprobs.append(float(logprob))
    return tokens, logprobs


def _finish(
    reason: Mapping[str, Any], tokens: Sequence[int], max_tokens: int, stop_tokens: frozenset[int]
) -> str:
    kind, matched = reason.get("type"), reason.get("matched")
    missed = next((token for token in tokens[:-1] if token in stop_tokens), None)
    if kind == "length" and tokens[-1] in stop_tokens:
        missed = tokens[-1]
    if missed is not None:
        raise EngineError(
            f"the server generated on after token {missed}, which ends a response; it must honour "
            "stop_token_ids "
            "(is something between the run and the server, or another program than SGLang behind "
            "the address?)"
        )
    if kind == "length":
        if len(tokens) < max_tokens == reason.get("length"):
            raise _damaged(f"it ends for its length after {len(tokens)} of {max_tokens} tokens")
        if len(tokens) < max_tokens:
            raise EngineError(
                f"the server cut a response at {len(tokens)} of "
                f"rollout.max_response_tokens={max_tokens} tokens; "
                f"{LENGTH_REMEDY}"
            )
        return "length"
    if kind != "stop":
        raise _damaged(f"its finish_reason is {dict(reason)!r}")
    if matched == "NaN happened":
        raise EngineError(
            "the server's logits are not finite; lower train.learning_rate or go back to an "
            "earlier checkpoint, and "
            "if that happens with the first weights, use another copy of the model"
        )
    if matched not in stop_tokens:
        raise EngineError(
            f"the server ended a response at {matched!r}, which is none of the run's stop tokens "
            f"{sorted(stop_tokens)}; make eos_token_id in generation_config.json of model.path "
            "name every token that "
            "ends a response, and serve the same directory"
        )
    if tokens[-1] != matched:
        raise _damaged(f"it stopped at token {matched} and ends with {tokens[-1]}")
    return "stop"


def _spans(spans: Any, count: int, accepted: Accepted) -> list[tuple[int, int]]:
    """(first token, version) of every span; together they must cover `count` tokens without a gap."""
    if (
        not isinstance(spans, list)
        or not spans
        or not all(isinstance(span, dict) for span in spans)
    ):
        raise _damaged("it does not say which weights were used (weight_versions)")
    result, end = [], 0
    for span in spans:
        if span.get("start") != end or not isinstance(span.get("end"), int) or span["end"] < end:
            raise _damaged(f"its weight_versions {spans!r} have a gap")
        result.append((end, _version(span.get("version"), accepted)))
        end = span["end"]
    if end != count:
        raise _damaged(f"its weight_versions cover {end} of {count} tokens")
    return result


def _version(text: Any, accepted: Accepted) -> int:
    oldest = accepted.version - accepted.max_staleness
    if (
        not isinstance(text, str)
        or not text.isdecimal()
        or not oldest <= int(text) <= accepted.version
    ):
        wanted = (
            f"version {accepted.version}"
            if not accepted.max_staleness
            else f"{oldest} to {accepted.version}"
        )
        raise Unfinished(
            f"the server generated with weight version {text!r} instead of {wanted}; a server that "
            "came back gets its "
            "weights at the next sync, and no other run may use it",
            Cause.WRONG_VERSION,
        )
    return int(text)
