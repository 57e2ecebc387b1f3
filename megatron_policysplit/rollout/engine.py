"""The engine protocol: what a source of rollouts must do. Asynchronous, ids in and ids out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_policysplit.rows import Mode, Rollout


@dataclass(frozen=True)
class Sampling:
    """temperature > 0; top_p in (0, 1]; top_k = -1 keeps all; max_tokens counts the end-of-sequence
    token.
    """

    temperature: float
    top_p: float
    top_k: int
    max_tokens: int


@dataclass(frozen=True)
class Request:
    """All samples of one question in one mode; sample i is drawn with seeds[i].

    A seed depends on (run seed, batch, question, mode, sample) and on nothing else, so a response
    does not depend on which leader or engine produced it.
    """

    batch: int
    question: int
    mode: Mode
    prompt: Sequence[int]
    sampling: Sampling
    samples: Sequence[int]
    seeds: Sequence[int]


class Engine(Protocol):
    """Every method but `submit` and `metrics` is a coroutine. Errors are raised, never turned into
    short results.
    """

    def submit(self, requests: Sequence[Request]) -> AsyncIterator[Rollout]:
        """Finished rollouts in any order; exactly one for every sample of every request, or an
        error.
        """

    async def log_probs(
        self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[list[float]]:
        """Log-probs (nats, temperature 1) of every response token of (prompt ids, response ids),
        nothing sampled.
        """

    def metrics(self) -> dict[str, float]:
        """What happened since the last call, by the names of the logs."""

    async def pause(self) -> None:
        """Stop generating at the next token; unfinished rollouts of `submit` are not delivered."""

    async def resume(self) -> None:
        """Accept requests again after `pause`."""

    async def health(self) -> int:
        """The version of the weights being served; raises if the engine cannot generate."""


class InProcessEngine(Engine, Protocol):
    """An engine in a leader's own process, which takes weights itself. SGLang's go through
    `weight_sync`.
    """

    async def load(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:  # noqa: F821
        """Take new weights: Hugging Face names and full CPU tensors; later rollouts carry
        `version`.
        """

    async def release(self) -> None:
        """Free the memory that weights and caches take; `load` or `restore` must come before
        `submit`.
        """

    async def restore(self) -> None:
        """Take the memory again after `release`."""


class EnginePaused(RuntimeError):
    """`submit` ended because the engine was paused; what had not been delivered must be requested
    again.
    """
