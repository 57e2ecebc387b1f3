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
    """One set of weights, one policy a mode. The mode of a row is its prompt, never who sampled it.

    value: its name. NORMAL and HIGH_ENTROPY are there in every run; `modes.others` names further
    ones.
    """

    value: str

    NORMAL: ClassVar[Mode]
    HIGH_ENTROPY: ClassVar[Mode]


Mode.NORMAL, Mode.HIGH_ENTROPY = MODES = (Mode("normal"), Mode("high_entropy"))


@dataclass
class Rollout:
    """One sampled response.

    tokens: response token ids, the end-of-sequence token kept.
    engine_logprobs: the engine's log-prob of each token at the sampling temperature, nats.
    loss_mask: 1 for every token that is trained.
    weight_versions: spans (first token, version): which weights sampled which tokens.
    finish_reason: "stop" or "length". reward_error: why grading failed, if it did (the reward is
    then 0).
    auxiliary: of a method's second rollout, at a temperature that is not its mode's.
    """

    batch: int
    question: int
    mode: Mode
    sample: int
    tokens: list[int]
    engine_logprobs: list[float]
    finish_reason: str
    weight_versions: list[tuple[int, int]]
    loss_mask: list[int] = field(default_factory=list)
    reward: float = 0.0
    reward_error: str | None = None
    auxiliary: bool = False

    def __post_init__(self):
        self.loss_mask = self.loss_mask or [1] * len(self.tokens)
        if not len(self.tokens) == len(self.engine_logprobs) == len(self.loss_mask) > 0:
            raise ValueError(
                f"rollout {self.key} has {len(self.tokens)} tokens, {len(self.engine_logprobs)} "
                "log-probs and "
                f"{len(self.loss_mask)} mask entries; they must be equal and at least one"
            )

    @property
    def key(self) -> tuple[int, int, str, int]:
        return (self.batch, self.question, self.mode.value, self.sample)


@dataclass(frozen=True)
class SecondRollout:
    """What a method asks for besides a batch: more responses to its first questions, at another
    temperature.

    temperature: times that of the mode that samples. questions: how many are answered again.
    samples: for each of them, in every sampling mode. most: right ones that are trained; None: all.
    """

    temperature: float
    questions: int
    samples: int
    most: int | None = None


class RowKey(NamedTuple):
    """(batch, question, training mode, sampling mode, sample, auxiliary): sampling mode and sample
    name the rollout.
    """

    batch: int
    question: int
    training_mode: str
    sampling_mode: str
    sample: int
    auxiliary: bool = False

    @property
    def group(self) -> tuple[int, int, str, bool]:
        """Advantage group: the same question under the same training mode (algorithms.md A.1);
        auxiliary rows apart.
        """
        return (*self[:3], self.auxiliary)

    def under(self, mode: Mode) -> RowKey:
        """The same response under another training mode."""
        return self._replace(training_mode=mode.value)


@dataclass
class Row:
    """A rollout behind the prompt of one training mode: `prompt` ids of that mode + the same
    response ids.
    """

    key: RowKey
    prompt: Sequence[int]
    rollout: Rollout

    @property
    def mode(self) -> Mode:
        return Mode(self.key.training_mode)

    @property
    def length(self) -> int:
        """Tokens of prompt and response."""
        return len(self.prompt) + len(self.rollout.tokens)

    @property
    def response_length(self) -> int:
        return len(self.rollout.tokens)

    @property
    def auxiliary(self) -> bool:
        return self.rollout.auxiliary

    @property
    def on_policy(self) -> bool:
        """Whether the response was sampled under this row's own prompt, at its mode's temperature."""
        return self.mode == self.rollout.mode and not self.auxiliary


def share_rollouts(
    rollouts: Iterable[Rollout],
    prompts: Mapping[int, Mapping[Mode, Sequence[int]]],
    training_modes: Sequence[Mode] = MODES,
) -> list[Row]:
    """Rollout sharing (paper Eq. 10): every response under the prompt of every training mode.

    prompts: question id -> mode -> prompt token ids. Returns the rows sorted by key, so the result
    does not depend on the order in which an engine finished.
    """
    rows = []
    for rollout in rollouts:
        for mode in training_modes:
            named = (
                rollout.batch,
                rollout.question,
                mode.value,
                rollout.mode.value,
                rollout.sample,
            )
            key = RowKey(*named, rollout.auxiliary)
            rows.append(Row(key, prompts[rollout.question][mode], rollout))
    rows.sort(key=lambda row: row.key)
    return rows


def modes_in(rows: Iterable[Row]) -> list[Mode]:
    """The training modes of `rows`, normal and high-entropy first, then by name."""
    found = {row.mode for row in rows}
    return sorted(
        found, key=lambda mode: (MODES.index(mode) if mode in MODES else len(MODES), mode.value)
    )
