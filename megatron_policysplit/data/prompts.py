"""The prompts of all modes as token ids, made of messages by the tokenizer's chat template.

Normal mode adds no system message of ours. High-entropy mode, and any mode of `modes.others`, puts
its prompt into the system turn: before the dataset's own system message where there is one, else
after the text the template inserts by itself (`modes.template_system=keep`) or in its place
(`drop`).
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_policysplit.config import ModesConfig
from megatron_policysplit.config.modes import modes_of, other_modes
from megatron_policysplit.data.chat_template import ChatTemplate, Messages, TemplateFailure, Tools
from megatron_policysplit.data.questions import Question
from megatron_policysplit.data.system_turn import (
    MARK,
    SEPARATOR,
    cannot_drop,
    find_turn_end,
    ignores_system,
    inspect_system_turn,
    system_message,
    text_before_prompt,
)
from megatron_policysplit.errors import ConfigError, DataError, ModelError
from megatron_policysplit.rows import Mode

DEFAULT_HIGH_ENTROPY_PROMPT = (
    "Look for a way into this problem that few others would try: choose an unfamiliar starting "
    "point, representation or order of steps, and work it out for yourself instead of reciting the "
    "usual method. Where several routes look open, pick freely among them, so that two attempts at "
    "the same question seldom read alike. Whatever the route, check the result, and state the "
    "final answer exactly and in the form the question asks for."
)

# Questions whose prompts are made into ids together. The tokenizer divides the texts among threads.
LOT = 500

Prompts = dict[int, dict[Mode, list[int]]]  # question id -> mode -> prompt ids


class PromptBuilder:
    """Builds the prompts of all modes with a tokenizer's chat template.

    Raises ConfigError for a wrong `modes.*` key, ModelError for a template that cannot carry a
    system prompt.

    tokenizer: a transformers tokenizer with a chat template.
    config: the keys of `modes`.
    date: ISO date that templates see as today's; None takes today. `.date` is kept with a run, and
    a resumed run then trains under the same prompts.
    vocab_size: rows of the model's embedding, which ids must be below; None where no model is.
    """

    def __init__(
        self,
        tokenizer,
        config: ModesConfig,
        date: str | None = None,
        *,
        vocab_size: int | None = None,
    ):
        self.system_prompts = read_prompts(config)
        self.date = date or datetime.date.today().isoformat()
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._drop = config.template_system == "drop"
        today = datetime.date.fromisoformat(self.date)
        self._template = ChatTemplate(tokenizer, config.chat_template_kwargs, today)
        prompts = {
            mode: (prompt, _prompt_key(mode)) for mode, prompt in self.system_prompts.items()
        }
        self._turn = inspect_system_turn(self._template, prompts, self._drop)
        has_text = self._drop and self._turn.inserted
        self._turn_end = find_turn_end(self._template, self._turn) if has_text else ""

    def build(self, messages: Messages, tools: Tools | None = None) -> dict[Mode, list[int]]:
        """Token ids of every mode's prompt, normal first.

        Raises DataError as `render` does, and for a prompt without ids or with one that the model
        has no embedding for.
        """
        [ids] = self._encode([self.render(messages, tools)])
        self._check_ids(ids)
        return ids

    def build_all(
        self,
        questions: Sequence[Question],
        advance: Callable[[int], None] = lambda count: None,
        *,
        source: str = "",
    ) -> Prompts:
        """The ids of every question's prompts by its id, as `build` makes them one by one.

        advance: called with a number of questions each time that those of so many are done.
        source: the questions' file or data set, for errors.
        Raises DataError and ConfigError as `render` does, naming the question.
        """
        prompts: Prompts = {}
        for start in range(0, len(questions), LOT):
            lot = questions[start : start + LOT]
            texts = []
            for question in lot:
                with _naming(question, source):
                    texts.append(self.render(question.messages, question.tools))
            for question, ids in zip(lot, self._encode(texts), strict=True):
                with _naming(question, source):
                    self._check_ids(ids)
                prompts[question.id] = ids
            advance(len(lot))
        return prompts

    def render(self, messages: Messages, tools: Tools | None = None) -> dict[Mode, str]:
        """Text of every mode's prompt with control tokens and generation prompt; normal first.

        tools: schemas of the functions that the template offers to the model.
        Raises DataError where the template refuses the messages, for example roles out of order, or
        leaves something out that they hold; ConfigError where modes.chat_template_kwargs make it
        refuse them.
        """
        name = self._template.name
        try:
            prompted = {
                mode: self._render_with(prompt, messages, tools)
                for mode, prompt in self.system_prompts.items()
            }
            normal = self._render_normal(messages, tools)
        except TemplateFailure as failure:
            roles = [message.get("role") for message in messages]
            raise self._template.blame(messages, failure, tools) or DataError(
                f"the chat template of {name} refuses messages with the roles {roles}: {failure}"
            ) from failure
        if normal in prompted.values():
            raise ModelError(ignores_system(name))
        self._check_written(messages, tools, normal)
        return {Mode.NORMAL: normal, **prompted}

    def _render_normal(self, messages: Messages, tools: Tools | None) -> str:
        """The normal mode's prompt, with or without a system text that the template inserts."""
        if not self._turn_end or _has_system(messages):
            return self._template.render(messages, tools)
        # A template cannot be told to leave its text out: put a mark in its place, then cut the
        # whole system turn out.
        marked = self._template.render([system_message(MARK), *messages], tools)
        opening = self._turn.before + MARK + self._turn_end
        if not marked.startswith(opening):
            reason = "its system turn depends on the messages"
            raise ModelError(cannot_drop(self._template.name, reason))
        return self._template.bos(marked) + marked[len(opening) :]

    def _render_with(self, prompt: str, messages: Messages, tools: Tools | None) -> str:
        """The prompt of a mode with a system prompt of its own."""
        if _has_system(messages):
            first = {**messages[0], "content": prompt + SEPARATOR + messages[0]["content"]}
            return self._template.render([first, *messages[1:]], tools)
        text = text_before_prompt(self._turn.inserted, self._drop) + prompt
        return self._template.render([system_message(text), *messages], tools)

    def _check_written(self, messages: Messages, tools: Tools | None, normal: str) -> None:
        """Raise DataError for what the messages hold and the prompt `normal` does not.

        An id only links a call to its result, and most templates leave it out. Templates that write
        reasoning leave out that of earlier turns, as models expect it.
        """
        keys = dict.fromkeys(key for message in messages for key in message)
        unchecked = {"role", "content", "tool_call_id"}
        if "reasoning_content" in self._template.source:
            unchecked.add("reasoning_content")
        without = {
            key: (
                [{name: message[name] for name in message if name != key} for message in messages],
                tools,
            )
            for key in keys
            if key not in unchecked
        }
        if tools is not None:
            without["tools"] = (messages, None)
        for key, given in without.items():
            try:
                is_lost = self._render_normal(*given) == normal
            except TemplateFailure:
                continue  # it needs the key
            if is_lost:
                raise DataError(
                    f"the chat template of {self._template.name} never writes `{key}`, which would "
                    "be lost; remove it from the rows, or put a chat_template.jinja that writes it "
                    "into that directory"
                )

    def _encode(self, texts: Sequence[Mapping[Mode, str]]) -> list[dict[Mode, list[int]]]:
        """The ids of the texts of every mode."""
        flat = [text for by_mode in texts for text in by_mode.values()]
        ids = iter(self._tokenizer(flat, add_special_tokens=False)["input_ids"] if flat else [])
        return [{mode: next(ids) for mode in by_mode} for by_mode in texts]

    def _check_ids(self, prompts: Mapping[Mode, Sequence[int]]) -> None:
        """Raise DataError for a prompt that the model cannot read."""
        for mode, ids in prompts.items():
            if not ids:
                raise DataError(
                    f"the {mode.value} prompt has no tokens, as the tokenizer of "
                    f"{self._template.name} makes none of its text; use the model's own tokenizer"
                )
            largest = max(ids)
            if self._vocab_size is not None and largest >= self._vocab_size:
                token = self._tokenizer.convert_ids_to_tokens(largest)
                raise DataError(
                    f"the {mode.value} prompt has the token {token!r} of id {largest}, and the "
                    f"embedding of {self._template.name} ends at vocab_size={self._vocab_size}; "
                    "remove the token from the tokenizer's files, or use the model's own tokenizer"
                )


@contextmanager
def _naming(question: Question, source: str) -> Iterator[None]:
    """Name the question in a DataError or ConfigError."""
    try:
        yield
    except (ConfigError, DataError) as error:
        of = f" of {source}" if source else ""
        raise type(error)(f"question {question.id}{of}: {error}") from error


def _has_system(messages: Messages) -> bool:
    return bool(messages) and messages[0]["role"] == "system"


def read_prompt(config: ModesConfig) -> str:
    """The system prompt of the high-entropy mode, from its key, its file or our own default.

    Raises ConfigError for two of them, a file that cannot be read and an empty text.
    """
    text, file = config.high_entropy_prompt, config.high_entropy_prompt_file
    if text is not None and file is not None:
        raise ConfigError(
            "modes.high_entropy_prompt and modes.high_entropy_prompt_file are both set; remove one "
            "of them"
        )
    source = "modes.high_entropy_prompt"
    if file is not None:
        source = f"modes.high_entropy_prompt_file={file}"
        text = _read_text(file, source)
    if text is None:
        return DEFAULT_HIGH_ENTROPY_PROMPT
    if not text.strip():
        raise ConfigError(f"{source} is empty; write a prompt or remove the key to use the default")
    return text.strip()


def read_prompts(config: ModesConfig) -> dict[Mode, str]:
    """The system prompts of the modes that have one. Raises ConfigError for one without use."""
    prompts = {Mode.HIGH_ENTROPY: read_prompt(config)}
    for mode, entry in other_modes(config).items():
        key = _prompt_key(mode)
        if (entry.prompt is None) == (entry.prompt_file is None):
            raise ConfigError(
                f"modes.others.{mode.value} needs a prompt or a prompt_file, and not both"
            )
        text = entry.prompt
        if text is None:
            key = f"modes.others.{mode.value}.prompt_file={entry.prompt_file}"
            text = _read_text(entry.prompt_file, key)
        if not text.strip():
            raise ConfigError(
                f"{key} is empty; write a prompt, since the mode without one is the normal mode"
            )
        if same := [earlier for earlier, prompt in prompts.items() if prompt == text.strip()]:
            raise ConfigError(
                f"{key} is the prompt of the {same[0].value} mode, too; modes differ by their "
                "prompts"
            )
        prompts[mode] = text.strip()
    return prompts


def _prompt_key(mode: Mode) -> str:
    """The configuration key of a mode's system prompt."""
    if mode == Mode.HIGH_ENTROPY:
        return "modes.high_entropy_prompt"
    return f"modes.others.{mode.value}.prompt"


def read_eval_prompts(prompts: Mapping[str, Any], modes: ModesConfig) -> dict[str, str]:
    """The texts of eval.prompts by name. Raises ConfigError for an unusable name or text."""
    texts, mode_names = {}, [mode.value for mode in modes_of(modes)]
    for name, entry in prompts.items():
        key = f"eval.prompts.{name}"
        if not re.fullmatch(r"[A-Za-z0-9_-]+", str(name)) or name in mode_names:
            raise ConfigError(
                f"{key} cannot be a name in the logs; use letters, digits, '_' and '-', and not "
                "the name of a mode"
            )
        is_file = isinstance(entry, Mapping) and list(entry) == ["file"]
        if is_file and isinstance(entry["file"], str):
            texts[name] = _read_text(entry["file"], f"{key}.file={entry['file']}")
        elif isinstance(entry, str):
            texts[name] = entry.strip()
        else:
            raise ConfigError(
                f"{key}={entry} is neither a text nor {{file: PATH}}; without a prompt of ours is "
                f"the normal mode"
            )
        if not texts[name]:
            raise ConfigError(
                f"{key} is empty; write a prompt or remove it, the normal mode has none of ours"
            )
    return texts


def _read_text(file: str, source: str) -> str:
    """Read a UTF-8 file; ConfigError naming `source`, the key with its value, if that fails."""
    try:
        # Editors of Windows put a byte order mark first, which is no part of the prompt.
        return Path(file).read_text(encoding="utf-8-sig").strip()
    except OSError as error:
        raise ConfigError(
            f"{source} cannot be read ({error.strerror}); give the path of a text file"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source} is not UTF-8 text; save it as UTF-8") from error
