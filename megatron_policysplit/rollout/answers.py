"""Reads SGLang's answers to /generate: a rollout, the log-probs of given tokens, or an error.

Nothing here is repaired. An answer that is not whole raises `UnusableAnswer` and is asked for
again; one that shows that the server is set up wrongly raises EngineError at once, with the remedy.
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
    "context-length in rollout.server.arguments (the context 7 tokens longer than both), or lower "
    "data.max_prompt_tokens or rollout.max_response_tokens"
)
ROUNDING = 1e-4  # nats: a log-prob computed from rounded probabilities may lie so far above zero


class Cause(enum.Enum):
    """Why something is asked for again."""

    # No connection, a dropped one, half an answer, or status 429, 500, 502, 503 or 504.
    UNAVAILABLE = "unavailable"
    ABORTED = "aborted"  # the server was paused or stopped meanwhile
    TIME_LIMIT = "time_limit"
    DAMAGED = "damaged"
    WRONG_VERSION = "wrong_version"  # other weights than those that may be used


class UnusableAnswer(EngineError):
    """A request got no usable answer this time; the next one may be usable."""

    def __init__(self, message: str, cause: Cause):
        super().__init__(message)
        self.cause = cause


@dataclass(frozen=True)
class AnswerRules:
    """What an answer may contain. Made by `SglangEngine` for every answer that it reads."""

    stop_tokens: frozenset[int]  # ids that end a response; empty: every response has full length
    vocab_size: int  # ids are below it
    version: int  # of the weights that are served now
    max_staleness: int  # how many versions older the weights of an answer may be


def read_rollout(
    answer: Any, rid: str, request: Request, sample: int, rules: AnswerRules
) -> Rollout:
    """Read the rollout of one sample; raises UnusableAnswer or EngineError.

    Every token must have an id below the vocabulary size and a finite log-prob (nats) of its own,
    and must have been sampled by weights that `rules` allow.
    """
    meta = _read_meta(answer, rid, len(request.prompt))
    tokens, logprobs = _read_logprobs(
        meta.get("output_token_logprobs"), "output_token_logprobs", rules.vocab_size
    )
    # SGLang reports ids twice and their number once: three reports that must agree, or the
    # log-probs would be trained with tokens that they do not belong to.
    if answer.get("output_ids") != tokens:
        raise _damaged_answer("output_ids are not the ids that the log-probs belong to")
    if meta.get("completion_tokens") != len(tokens):
        raise _damaged_answer(
            f"it has {len(tokens)} tokens and speaks of {meta.get('completion_tokens')}"
        )
    max_tokens = request.sampling.max_tokens
    if not 0 < len(tokens) <= max_tokens:
        raise _damaged_answer(f"it has {len(tokens)} tokens; 1 to {max_tokens} were asked for")
    return Rollout(
        batch=request.batch,
        question=request.question,
        mode=request.mode,
        sample=sample,
        tokens=tokens,
        engine_logprobs=logprobs,
        finish_reason=_read_finish_reason(
            meta["finish_reason"], tokens, max_tokens, rules.stop_tokens
        ),
        weight_versions=_read_versions(meta.get("weight_versions"), len(tokens), rules),
    )


def read_scores(
    answer: Any, rid: str, prompt: Sequence[int], response: Sequence[int], rules: AnswerRules
) -> list[float]:
    """Read the log-probs (nats) of the response tokens; raises UnusableAnswer or EngineError.

    The request asked for log-probs from the last prompt token on. SGLang scales log-probs by the
    temperature for tokens that it samples, never for those that it is given.
    """
    meta = _read_meta(answer, rid, len(prompt) + len(response))
    entries = meta.get("input_token_logprobs")
    # The first entry is that of the last prompt token, which is no part of the response.
    if not isinstance(entries, list) or len(entries) != 1 + len(response):
        raise _damaged_answer(f"input_token_logprobs are not {1 + len(response)} entries")
    tokens, logprobs = _read_logprobs(entries[1:], "input_token_logprobs", rules.vocab_size)
    # SGLang calls the last id of the vocabulary 0; the log-prob is the last id's own.
    last_id = rules.vocab_size - 1
    if any(
        answered != sent and (answered, sent) != (0, last_id)
        for answered, sent in zip(tokens, response, strict=True)
    ):
        raise _damaged_answer("the log-probs belong to other tokens than those that were sent")
    _read_versions(meta.get("weight_versions"), 0, rules)
    return logprobs


def check_generated(
    answer: Any, rid: str, prompt_tokens: int, tokens: int, rules: AnswerRules
) -> None:
    """Check that `tokens` tokens were generated, by allowed weights.

    Raises UnusableAnswer or EngineError if not.
    """
    meta = _read_meta(answer, rid, prompt_tokens)
    _read_versions(meta.get("weight_versions"), tokens, rules)


def read_cached(answer: Any, rid: str, prompt_tokens: int) -> int:
    """Read how many of the prompt's tokens the server had computed before.

    Raises UnusableAnswer or EngineError.
    """
    meta = _read_meta(answer, rid, prompt_tokens)
    cached = meta.get("cached_tokens")
    if not isinstance(cached, int) or cached < 0:
        raise _damaged_answer(f"cached_tokens is {cached!r}")
    return min(cached, prompt_tokens)  # a retracted request finds its own first tokens in the cache


def error_of_refusal(error: EngineRefused) -> EngineError:
    """Return what a refused request means.

    That is an UnusableAnswer if the request may be accepted later, else the error that ends the
    run.
    """
    text = str(error)
    if error.status == 500 and "Out of memory" in text:
        return EngineError(f"{text}; {LENGTH_REMEDY}")
    if error.status in (429, 500):
        return UnusableAnswer(text, Cause.UNAVAILABLE)
    # Something on the way sent the request twice.
    if error.status == 400 and "Duplicate request ID" in text:
        return UnusableAnswer(text, Cause.DAMAGED)
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


def _damaged_answer(message: str) -> UnusableAnswer:
    return UnusableAnswer(f"the answer is damaged: {message}", Cause.DAMAGED)


def _read_meta(answer: Any, rid: str, prompt_tokens: int) -> Mapping[str, Any]:
    """The meta_info of an answer to this very request and prompt that was not aborted."""
    meta = answer.get("meta_info") if isinstance(answer, dict) else None
    if not isinstance(meta, dict) or not isinstance(meta.get("finish_reason"), dict):
        raise _damaged_answer("it is no object with meta_info and finish_reason")
    if meta.get("id") != rid:
        raise _damaged_answer(f"it belongs to request {meta.get('id')!r}, not to {rid!r}")
    # Before the number of tokens: an abort has a cause of its own, for which the client waits
    # instead of counting an attempt.
    if meta["finish_reason"].get("type") == "abort":
        message = str(meta["finish_reason"].get("message", "no reason given"))
        if "Out of memory" in message:
            raise EngineError(f"the server aborted a request: {message}; {LENGTH_REMEDY}")
        raise UnusableAnswer(f"the server aborted the request: {message}", Cause.ABORTED)
    if meta.get("prompt_tokens") != prompt_tokens:
        raise _damaged_answer(
            f"it is for a prompt of {meta.get('prompt_tokens')} tokens instead of {prompt_tokens}"
        )
    return meta


def _read_logprobs(entries: Any, name: str, vocab_size: int) -> tuple[list[int], list[float]]:
    """Ids and log-probs (nats) of entries [log-prob, id, text]."""
    if not isinstance(entries, list):
        raise _damaged_answer(f"{name} is no list")
    tokens, logprobs = [], []
    for entry in entries:
        if not isinstance(entry, list) or len(entry) < 2:
            raise _damaged_answer(f"{name} has the entry {entry!r}")
        logprob, token = entry[0], entry[1]
        # `type`, not isinstance: JSON's true is an int to Python.
        if type(token) is not int or not 0 <= token < vocab_size:
            raise _damaged_answer(f"token {token!r} is outside the vocabulary of {vocab_size}")
        if type(logprob) not in (int, float) or not math.isfinite(logprob) or logprob > ROUNDING:
            raise _damaged_answer(f"{name} has the log-prob {logprob!r}")
        tokens.append(token)
        logprobs.append(float(logprob))
    return tokens, logprobs


def _read_finish_reason(
    reason: Mapping[str, Any], tokens: Sequence[int], max_tokens: int, stop_tokens: frozenset[int]
) -> str:
    """Whether a response ended by a stop token ("stop") or at its full length ("length").

    Raises EngineError where the server does not stop by the run's rules: its responses would be
    trained on with a wrong end.
    """
    kind, matched = reason.get("type"), reason.get("matched")
    ignored_stop = next((token for token in tokens[:-1] if token in stop_tokens), None)
    if kind == "length" and tokens[-1] in stop_tokens:
        ignored_stop = tokens[-1]
    if ignored_stop is not None:
        raise EngineError(
            f"the server generated on after token {ignored_stop}, which ends a response; it must "
            "honour stop_token_ids (is something between the run and the server, or another "
            "program than SGLang behind the address?)"
        )
    if kind == "length":
        # SGLang says that it generated the full length: tokens were lost on the way.
        if len(tokens) < max_tokens == reason.get("length"):
            raise _damaged_answer(
                f"it ends for its length after {len(tokens)} of {max_tokens} tokens"
            )
        if len(tokens) < max_tokens:
            raise EngineError(
                f"the server cut a response at {len(tokens)} of "
                f"rollout.max_response_tokens={max_tokens} tokens; {LENGTH_REMEDY}"
            )
        return "length"
    if kind != "stop":
        raise _damaged_answer(f"its finish_reason is {dict(reason)!r}")
    if matched == "NaN happened":
        raise EngineError(
            "the server's logits are not finite; lower train.learning_rate or go back to an "
            "earlier checkpoint, and if that happens with the first weights, use another copy of "
            "the model"
        )
    if matched not in stop_tokens:
        raise EngineError(
            f"the server ended a response at {matched!r}, which is none of the run's stop tokens "
            f"{sorted(stop_tokens)}; make eos_token_id in generation_config.json of model.path "
            "name every token that ends a response, and serve the same directory"
        )
    if tokens[-1] != matched:
        raise _damaged_answer(f"it stopped at token {matched} and ends with {tokens[-1]}")
    return "stop"


def _read_versions(spans: Any, count: int, rules: AnswerRules) -> list[tuple[int, int]]:
    """(first token, version) of every span; the spans must cover `count` tokens without a gap."""
    if (
        not isinstance(spans, list)
        or not spans
        or not all(isinstance(span, dict) for span in spans)
    ):
        raise _damaged_answer("it does not say which weights were used (weight_versions)")
    versions, end = [], 0
    for span in spans:
        if span.get("start") != end or not isinstance(span.get("end"), int) or span["end"] < end:
            raise _damaged_answer(f"its weight_versions {spans!r} have a gap")
        versions.append((end, _check_version(span.get("version"), rules)))
        end = span["end"]
    if end != count:
        raise _damaged_answer(f"its weight_versions cover {end} of {count} tokens")
    return versions


def _check_version(text: Any, rules: AnswerRules) -> int:
    # A server that was started again serves "start-..." (`Server.initial_version`), no number.
    oldest = rules.version - rules.max_staleness
    if (
        not isinstance(text, str)
        or not text.isdecimal()
        or not oldest <= int(text) <= rules.version
    ):
        expected = (
            f"version {rules.version}"
            if not rules.max_staleness
            else f"{oldest} to {rules.version}"
        )
        raise UnusableAnswer(
            f"the server generated with weight version {text!r} instead of {expected}; a server "
            "that came back gets its weights at the next sync, and no other run may use it",
            Cause.WRONG_VERSION,
        )
    return int(text)
