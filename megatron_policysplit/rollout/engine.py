"""The engine protocol: what a source of rollouts must do. Asynchronous, ids in and ids out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_policysplit.rows import Mode, Rollout


@dataclass(frozen=True)
class Sampling:
    """How the responses of a request are sampled."""

    temperature: float  # above 0
    top_p: float  # in (0, 1]
    top_k: int  # -1 keeps all tokens
    max_tokens: int  # of a response, the end-of-sequence token included


@dataclass(frozen=True)
class Request:
    """Some samples of one question in one mode, with one seed each.

    A seed depends on (run seed, batch, question, mode, sample) and on nothing else, so a response
    does not depend on which leader or engine produced it.
    """

    batch: int  # number of the rollout batch
    question: int  # id of the question
    mode: Mode
    prompt: Sequence[int]  # token ids
    sampling: Sampling
    samples: Sequence[int]  # numbers of the samples
    seeds: Sequence[int]  # of the samples, in their order


class Engine(Protocol):
    """What a leader generates with.

    Every method but `submit` and `metrics` is a coroutine. Errors are raised, never turned into
    short results.
    """

    def submit(self, requests: Sequence[Request]) -> AsyncIterator[Rollout]:
        """Yield finished rollouts in any order, exactly one for every sample, or raise an error."""

    async def log_probs(
        self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[list[float]]:
        """Score given responses: log-probs (nats, temperature 1) of all response tokens.

        sequences: (prompt ids, response ids). Nothing is sampled.
        """

    def metrics(self) -> dict[str, float]:
        """Return what happened since the last call, by the names of the logs."""

    async def pause(self) -> None:
        """Stop generating at the next token; unfinished rollouts of `submit` are not delivered."""

    async def resume(self) -> None:
        """Accept requests again after `pause`."""

    async def health(self) -> int:
        """Return the version of the served weights; raises if the engine cannot generate."""


class InProcessEngine(Engine, Protocol):
    """An engine in a leader's own process, which takes weights itself.

    The weights of SGLang's servers go through `weight_sync` instead.
    """

    async def load(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:  # noqa: F821
        """Take new weights (Hugging Face names, full CPU tensors); later rollouts carry `version`.

        Must read `tensors` to the end, even after an error of its own: they may come from a
        generator whose collectives other ranks take part in.
        """

    async def release(self) -> None:
        """Free the memory of weights and caches, until `load` or `restore`."""

    async def restore(self) -> None:
        """Take the memory again after `release`."""


class EnginePaused(RuntimeError):
    """`submit` ended because the engine was paused; what is missing must be requested again."""
