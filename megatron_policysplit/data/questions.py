"""Questions from JSONL, Parquet or reasoning_gym, and the resumable stream of batches over them."""

from __future__ import annotations

import difflib
import random
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_policysplit.data.answers import answer_text
from megatron_policysplit.data.messages import read_messages, read_tools, refuse_lost_columns
from megatron_policysplit.data.read_rows import read_rows
from megatron_policysplit.errors import CheckpointError, DataError
from megatron_policysplit.rows import Mode

_GYM = "reasoning_gym:"
_NEEDED = (
    "`prompt` (text or messages) or `messages` or `question`, and for the answer `reward_model` or "
    "`answer`"
)
_SOURCES = ("prompt", "messages", "question")


@dataclass(frozen=True)
class Question:
    """One question with its reference answer. Made by `load_questions`, read by rewards, too."""

    id: int  # its index in the file or data set, the same in every run
    # At least one, each with a `role`, a text `content`, and what the row's message has besides.
    messages: list[dict[str, Any]]
    answer: str | None  # the reference answer; None where the task has many right answers
    record: dict[str, Any]  # the whole row it came from, for the reward function
    # Schemas of the functions that the chat template offers to the model; None: it offers none.
    tools: list[dict[str, Any]] | None = None


def load_questions(path: str, options: Mapping[str, Any] | None = None) -> list[Question]:
    """Load every question of a .jsonl or .parquet file or of `reasoning_gym:NAME`.

    options: for reasoning_gym only: size (default 500), seed (default 0) and the task's own. Raises
    DataError naming the file and line (the row for Parquet) of what cannot be used.
    """
    options = dict(options or {})
    if path.lower() == _GYM.rstrip(":") or path.lower().startswith(_GYM) != path.startswith(_GYM):
        raise DataError(f"{path} names no task; write {_GYM}NAME, such as {_GYM}chain_sum")
    if path.startswith(_GYM):
        return _load_gym(path.removeprefix(_GYM), options)
    if options:
        raise DataError(
            f"{path} takes no options, but {', '.join(sorted(options))} given; they are for "
            f"{_GYM}NAME"
        )
    columnar = path.lower().endswith(".parquet")
    questions = [
        _question(index, where, row, columnar) for index, (where, row) in enumerate(read_rows(path))
    ]
    if not questions:
        raise DataError(f"{path} holds no questions")
    return questions


class QuestionStream:
    """Batches of questions, shuffled anew each epoch by the seed, resumable at any batch.

    A batch may run over the end of an epoch. Over whole epochs every question comes equally often,
    and a batch holds a question twice only if it is larger than the set.
    """

    def __init__(self, questions: Sequence[Question], batch_questions: int, seed: int):
        if not questions:
            raise DataError("there are no questions to train on")
        self._questions = list(questions)
        self._batch_questions = batch_questions
        self._seed = seed
        self._fingerprint = _fingerprint(self._questions)
        self._epoch = 0
        self._position = 0
        self._order = self._shuffle(0)

    def next_batch(self) -> list[Question]:
        """The next `batch_questions` questions."""
        batch: list[int] = []
        while len(batch) < self._batch_questions:
            if self._position == len(self._order):
                self._epoch += 1
                self._position = 0
                self._order = self._defer(self._shuffle(self._epoch), set(batch))
            take = self._order[self._position :][: self._batch_questions - len(batch)]
            batch += take
            self._position += len(take)
        return [self._questions[index] for index in batch]

    def state(self) -> dict[str, int]:
        """A small JSON-able cursor for `restore`."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "questions": len(self._questions),
            "fingerprint": self._fingerprint,
            "batch_questions": self._batch_questions,
            "seed": self._seed,
        }

    def restore(self, state: Mapping[str, int]) -> None:
        """Go on after the batch at which `state` was taken.

        Raises CheckpointError if the questions, the batch size or the seed are not those of the
        state.
        """
        for name, value in self.state().items():
            if name not in state:
                raise CheckpointError(
                    f"the data cursor of the checkpoint lacks `{name}`; it is damaged"
                )
            if name not in ("epoch", "position") and state[name] != value:
                raise CheckpointError(
                    f"the checkpoint was made with {name}={state[name]} but the data now has "
                    f"{name}={value}; restore the data set and the data.* and run.seed keys of the "
                    "run, or start a new run"
                )
        if state["epoch"] < 0 or not 0 <= state["position"] <= len(self._questions):
            raise CheckpointError(
                f"the data cursor of the checkpoint is damaged: epoch {state['epoch']}, position "
                f"{state['position']}"
            )
        self._epoch, self._position = state["epoch"], state["position"]
        self._order = self._epoch_order(self._epoch)

    def _epoch_order(self, epoch: int) -> list[int]:
        """The order of an epoch, as `next_batch` makes it, from seed, epoch and batch size alone.

        Its start depends on the last questions of the epoch before (see `_defer`), whose order
        depends on the epoch before that, so all epochs are gone through.
        """
        order = self._shuffle(0)
        for number in range(1, epoch + 1):
            # Questions of the last epoch that the batch open at its end holds.
            carried = min(number * len(order) % self._batch_questions, len(order))
            order = self._defer(self._shuffle(number), set(order[len(order) - carried :]))
        return order

    def _defer(self, order: list[int], taken: set[int]) -> list[int]:
        """Move the questions that the open batch already holds behind what fills it up."""
        free = [index for index in order if index not in taken]
        fill = free[: self._batch_questions - len(taken)]
        filled = set(fill)
        return fill + [index for index in order if index not in filled]

    def _shuffle(self, epoch: int) -> list[int]:
        """The questions' indices in an order that depends on the seed and the epoch alone."""
        order = list(range(len(self._questions)))
        random.Random(f"{self._seed}/{epoch}").shuffle(order)
        return order


def _fingerprint(questions: Sequence[Question]) -> int:
    """A checksum of ids, messages and answers, by which a resumed run knows its questions again."""
    checksum = 0
    for question in questions:
        parts = (question.id, question.messages, question.answer)
        parts += () if question.tools is None else (question.tools,)
        checksum = zlib.crc32(repr(parts).encode(), checksum)
    return checksum


def drop_overlong(
    questions: Sequence[Question],
    prompt_lengths: Mapping[int, Mapping[Mode, int]],
    max_prompt_tokens: int,
) -> tuple[list[Question], int]:
    """Drop questions whose longest prompt exceeds `max_prompt_tokens`.

    Returns the questions that remain and the number of those dropped. Raises DataError if none
    remains. prompt_lengths: question id -> mode -> tokens.
    """
    longest = {question.id: max(prompt_lengths[question.id].values()) for question in questions}
    remaining = [question for question in questions if longest[question.id] <= max_prompt_tokens]
    if questions and not remaining:
        raise DataError(
            f"data.max_prompt_tokens={max_prompt_tokens} drops all {len(questions)} questions; the "
            f"shortest needs {min(longest.values())} tokens in its longer mode"
        )
    return remaining, len(questions) - len(remaining)


def _question(index: int, where: str, row: dict, columnar: bool) -> Question:
    """Make a question of a row. Raises DataError naming `where` it stands.

    columnar: whether it is a row of a Parquet file (see `read_messages`).
    """
    source = next((name for name in _SOURCES if row.get(name) is not None), None)
    if source is None or not ("reward_model" in row or "answer" in row):
        if source is None and (empty := [name for name in _SOURCES if name in row]):
            raise DataError(f"{where}: `{empty[0]}` is null; write the question or remove the row")
        raise DataError(
            f"{where} has the columns {', '.join(sorted(row)) or '(none)'}; needed are {_NEEDED}"
        )
    messages = read_messages(where, source, row[source], columnar=columnar)
    refuse_lost_columns(where, row, messages)
    return Question(
        index,
        messages,
        answer_text(where, row, _NEEDED),
        row,
        read_tools(where, row.get("tools"), columnar=columnar),
    )


def _load_gym(name: str, options: dict[str, Any]) -> list[Question]:
    """The questions of a reasoning_gym task. Raises DataError for a wrong name or option."""
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if not name:
        raise DataError(f"{_GYM} names no task; write {_GYM}NAME, such as {_GYM}chain_sum")
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=3, cutoff=0.4)
        hint = (
            f"did you mean {' or '.join(near)}?"
            if near
            else "see the names in reasoning_gym's gallery"
        )
        raise DataError(f"{_GYM}{name} is not a task of reasoning_gym; {hint}")
    options = {"size": 500, "seed": 0, **options}
    try:
        entries = list(reasoning_gym.create_dataset(name, **options))
    except (TypeError, ValueError, AssertionError) as error:
        raise DataError(f"{_GYM}{name} does not take the options {options}: {error}") from error
    questions = []
    for index, entry in enumerate(entries):
        # Some scorers depend on the task's options, so a record carries them.
        record = {**entry, "reasoning_gym": {"name": name, "options": options}}
        message = {"role": "user", "content": entry["question"]}
        questions.append(Question(index, [message], entry["answer"], record))
    return questions
