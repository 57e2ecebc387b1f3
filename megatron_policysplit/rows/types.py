"""Rollouts and training rows: who sampled a response, and under which prompts it is trained.

A `Rollout` is one sampled response. A `Row` is that response, token for token, behind the prompt of
one training mode. Rows carry a key and are never identified by position, so they can be shuffled,
balanced over replicas and packed freely.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

RIGHT = 0.5  # a reward above this counts as a right answer


@dataclass(frozen=True)
class Mode:
    """A prompt under which the one set of weights acts as one of several policies.

    A row's mode is the prompt it is trained under, not the one its response was sampled with. Every
    run has NORMAL and HIGH_ENTROPY; `modes.others` in the configuration adds further modes.
    """

    value: str  # the mode's name

    NORMAL: ClassVar[Mode]
    HIGH_ENTROPY: ClassVar[Mode]


Mode.NORMAL, Mode.HIGH_ENTROPY = MODES = (Mode("normal"), Mode("high_entropy"))


@dataclass
class Rollout:
    """One sampled response. Made by a rollout engine; rewards are filled in by the graders.

    Raises ValueError for a response without tokens, or with log-probs or a mask of another length.
    """

    batch: int  # number of the rollout batch
    question: int  # id of the question
    mode: Mode  # whose prompt the response was sampled with
    sample: int  # number of the response among those to the question in this mode
    tokens: list[int]  # response token ids, including the end-of-sequence token
    engine_logprobs: list[float]  # of each token, at the sampling temperature, nats
    finish_reason: str  # "stop" or "length"
    weight_versions: list[tuple[int, int]]  # spans (first token, version of the weights from there)
    loss_mask: list[int] = field(default_factory=list)  # 1 for every trained token; all by default
    reward: float = 0.0
    reward_error: str | None = None  # why grading failed; the reward is then 0
    auxiliary: bool = False  # of a method's second rollout, not at its mode's temperature

    def __post_init__(self):
        self.loss_mask = self.loss_mask or [1] * len(self.tokens)
        if not len(self.tokens) == len(self.engine_logprobs) == len(self.loss_mask) > 0:
            raise ValueError(
                f"rollout {self.key} has {len(self.tokens)} tokens, {len(self.engine_logprobs)} "
                f"log-probs and {len(self.loss_mask)} mask entries; they must be equal and at "
                "least one"
            )

    @property
    def key(self) -> tuple[int, int, str, int]:
        """(batch, question, sampling mode, sample), unique within a run."""
        return (self.batch, self.question, self.mode.value, self.sample)


@dataclass(frozen=True)
class SecondRollout:
    """A method's request for more responses to a batch's first questions, at another temperature.

    Made by `Method.second_rollout`; right responses become auxiliary rows.
    """

    temperature: float  # as a multiple of the sampling mode's temperature
    questions: int  # number of questions that are answered again
    samples: int  # responses to each of them, in every sampling mode
    most: int | None = None  # upper bound of the right responses that are trained; None: all


class RowKey(NamedTuple):
    """Identity of a row within a run. Rows are sorted by it."""

    batch: int
    question: int
    training_mode: str  # name of the mode whose prompt the response is trained under
    sampling_mode: str  # name of the mode whose prompt the response was sampled with
    sample: int  # the rollout's number among those to the question in its sampling mode
    auxiliary: bool = False

    @property
    def group(self) -> tuple[int, int, str, bool]:
        """Key of the advantage group: the rows of a question under one training mode.

        Auxiliary rows are in a group of their own.
        """
        return (*self[:3], self.auxiliary)

    def under(self, mode: Mode) -> RowKey:
        """The same response under another training mode."""
        return self._replace(training_mode=mode.value)


@dataclass
class Row:
    """A rollout behind the prompt of one training mode. Made by `share_rollouts`."""

    key: RowKey
    prompt: Sequence[int]  # token ids of the training mode's prompt
    rollout: Rollout  # its tokens follow the prompt, the same ids under every mode

    @property
    def mode(self) -> Mode:
        """The training mode."""
        return Mode(self.key.training_mode)

    @property
    def length(self) -> int:
        """Number of tokens of prompt and response."""
        return len(self.prompt) + len(self.rollout.tokens)

    @property
    def response_length(self) -> int:
        """Number of tokens of the response, T in the shapes of other modules."""
        return len(self.rollout.tokens)

    @property
    def auxiliary(self) -> bool:
        return self.rollout.auxiliary

    @property
    def on_policy(self) -> bool:
        """Whether the response was sampled under this row's prompt, at its mode's temperature."""
        return self.mode == self.rollout.mode and not self.auxiliary


def share_rollouts(
    rollouts: Iterable[Rollout],
    prompts: Mapping[int, Mapping[Mode, Sequence[int]]],
    training_modes: Sequence[Mode] = MODES,
) -> list[Row]:
    """Rollout sharing (Policy Split, Eq. 10): every response under the prompt of every mode.

    prompts: question id -> mode -> prompt token ids. Returns one row for each rollout and training
    mode, sorted by key, so the result does not depend on the order in which an engine finished.
    """
    rows = []
    for rollout in rollouts:
        for mode in training_modes:
            key = RowKey(
                batch=rollout.batch,
                question=rollout.question,
                training_mode=mode.value,
                sampling_mode=rollout.mode.value,
                sample=rollout.sample,
                auxiliary=rollout.auxiliary,
            )
            rows.append(Row(key, prompts[rollout.question][mode], rollout))
    rows.sort(key=lambda row: row.key)
    return rows


def modes_in(rows: Iterable[Row]) -> list[Mode]:
    """The training modes of `rows`: normal, high-entropy, then the others by name."""

    def rank(mode: Mode) -> tuple[int, str]:
        return (MODES.index(mode) if mode in MODES else len(MODES), mode.value)

    return sorted({row.mode for row in rows}, key=rank)
