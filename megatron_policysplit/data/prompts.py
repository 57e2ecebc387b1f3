"""The prompts of all modes as token ids, made of messages by the tokenizer's chat template.

Normal mode adds no system message of ours. High-entropy mode, and any mode of `modes.others`, puts
its prompt into the system turn: before the dataset's own system message where there is one, else
after the text the template inserts by itself (`modes.template_system=keep`) or in its place
(`drop`).
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_policysplit.config import ModesConfig
from megatron_policysplit.config.modes import modes_of, other_modes
from megatron_policysplit.errors import ConfigError, DataError, ModelError
from megatron_policysplit.rows import Mode

DEFAULT_HIGH_ENTROPY_PROMPT = (
    "Look for a way into this problem that few others would try: choose an unfamiliar starting "
    "point, representation or order of steps, and work it out for yourself instead of reciting the "
    "usual method. Where several routes look open, pick freely among them, so that two attempts at "
    "the same question seldom read alike. Whatever the route, check the result, and state the "
    "final answer exactly and in the form the question asks for."
)

# Texts that no template has: a system message and a question, to find out what a template does.
_MARK = "zqmarkersystemzq"
_PROBE = "zqprobequestionzq"
_USER_PROBE = {"role": "user", "content": _PROBE}
_SEPARATOR = "\n\n"
_RESERVED_KWARGS = (
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "tokenize",
)
_STRFTIME = re.compile(r"""strftime_now\(\s*(?:format\s*=\s*)?(["'])([^"']*)\1\s*\)""")

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class _SystemTurn:
    """What a template does with the system turn: `before + text + after` for the probe question."""

    before: str
    after: str
    inserted: str  # the text it writes there by itself when, and only when, no message is given
    permanent: bool  # it writes a system turn with or without a message (Llama's dates)


class PromptBuilder:
    """Builds the prompts of all modes with a tokenizer's chat template.

    Raises ConfigError for a wrong `modes.*` key, ModelError for a template that cannot carry a
    system prompt.

    tokenizer: a transformers tokenizer with a chat template.
    config: the keys of `modes`.
    date: ISO date that templates see as today's; None takes today. `.date` is kept with a run, and
    a resumed run then trains under the same prompts.
    """

    def __init__(self, tokenizer, config: ModesConfig, date: str | None = None):
        self.system_prompts = read_prompts(config)
        self.date = date or datetime.date.today().isoformat()
        self._tokenizer = tokenizer
        self._name = getattr(tokenizer, "name_or_path", "") or "this model"
        self._drop = config.template_system == "drop"
        reserved = [name for name in _RESERVED_KWARGS if name in config.chat_template_kwargs]
        if reserved:
            raise ConfigError(
                f"modes.chat_template_kwargs.{reserved[0]} is set by policysplit itself; remove it"
            )
        today = datetime.date.fromisoformat(self.date)
        # Llama's templates take the date from a variable, others from strftime_now.
        self._kwargs = {"date_string": today.strftime("%d %b %Y"), **config.chat_template_kwargs}
        self._template = _pin_dates(self._read_template(), today, self._name)
        self._turn = self._inspect()
        self._turn_end = self._find_turn_end() if self._drop and self._turn.inserted else ""

    def build(self, messages: Messages) -> dict[Mode, list[int]]:
        """Token ids of every mode's prompt, normal first; raises DataError as `render` does."""
        texts = self.render(messages)
        return {
            mode: self._tokenizer(text, add_special_tokens=False)["input_ids"]
            for mode, text in texts.items()
        }

    def render(self, messages: Messages) -> dict[Mode, str]:
        """Text of every mode's prompt with control tokens and generation prompt; normal first.

        Raises DataError where the template refuses the messages, for example roles out of order.
        """
        import jinja2

        try:
            prompted = {
                mode: self._render_with(prompt, messages)
                for mode, prompt in self.system_prompts.items()
            }
            normal = self._render_normal(messages)
        except jinja2.TemplateError as error:
            roles = [message.get("role") for message in messages]
            raise DataError(
                f"the chat template of {self._name} refuses messages with the roles {roles}: "
                f"{error}"
            ) from error
        if normal in prompted.values():
            raise ModelError(_ignores_system(self._name))
        return {Mode.NORMAL: normal, **prompted}

    def _render_normal(self, messages: Messages) -> str:
        """The normal mode's prompt, with or without a system text that the template inserts."""
        if not self._turn_end or _has_system(messages):
            return self._apply(messages)
        # A template cannot be told to leave its text out: put a mark in its place, then cut the
        # whole system turn out.
        marked = self._apply([_system(_MARK), *messages])
        opening = self._turn.before + _MARK + self._turn_end
        if not marked.startswith(opening):
            raise ModelError(_cannot_drop(self._name, "its system turn depends on the messages"))
        return self._bos(marked) + marked[len(opening) :]

    def _render_with(self, prompt: str, messages: Messages) -> str:
        """The prompt of a mode with a system prompt of its own."""
        if _has_system(messages):
            first = {**messages[0], "content": prompt + _SEPARATOR + messages[0]["content"]}
            return self._apply([first, *messages[1:]])
        text = self._text_before_prompt(self._turn.inserted) + prompt
        return self._apply([_system(text), *messages])

    def _text_before_prompt(self, inserted: str) -> str:
        """The text to put before a mode's prompt, which the template then no longer inserts."""
        return "" if self._drop or not inserted else inserted + _SEPARATOR

    def _apply(self, messages: Messages) -> str:
        """The text that the chat template makes of messages."""
        return self._tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=self._template,
            tokenize=False,
            add_generation_prompt=True,
            **self._kwargs,
        )

    def _bos(self, text: str) -> str:
        """The begin-of-sequence token if `text` begins with it, else nothing."""
        bos = self._tokenizer.bos_token or ""
        return bos if text.startswith(bos) else ""

    def _read_template(self) -> str:
        """The tokenizer's chat template; ModelError if it has none."""
        if not self._tokenizer.chat_template:
            raise ModelError(
                f"the tokenizer of {self._name} has no chat template; put a chat_template.jinja "
                "into that directory or use an instruction-tuned model"
            )
        try:
            return self._tokenizer.get_chat_template()
        except ValueError as error:
            raise ModelError(
                f"the tokenizer of {self._name} has no default chat template: {error}"
            ) from error

    def _inspect(self) -> _SystemTurn:
        """Compare the template's output with and without a system message that holds a mark.

        Without the message the template must either write nothing in its place, or a text of its
        own between the same two ends. Raises ModelError for anything else.
        """
        plain, marked = self._render_probes()
        before, _, after = marked.partition(_MARK)
        inserted = ""
        if not _is_cut(plain, marked):
            if not (
                plain.startswith(before)
                and plain.endswith(after)
                and len(plain) >= len(before) + len(after)
            ):
                raise ModelError(
                    f"the chat template of {self._name} changes more than its system turn when a "
                    "system message is given; put a chat_template.jinja that does not into that "
                    "directory"
                )
            inserted = plain[len(before) : len(plain) - len(after)]
        turn = _SystemTurn(
            before,
            after,
            inserted,
            permanent=plain == before + after and before != self._bos(before),
        )
        if self._drop and turn.permanent:
            raise ModelError(
                _cannot_drop(self._name, "it writes text of its own into every system turn")
            )
        for mode, prompt in self.system_prompts.items():
            text = self._text_before_prompt(inserted) + prompt
            if self._apply([_system(text), _USER_PROBE]) != before + text + after:
                raise ModelError(
                    f"the chat template of {self._name} does not render the {mode.value} prompt "
                    f"verbatim; change {_prompt_key(mode)} or the model's chat_template.jinja"
                )
        return turn

    def _render_probes(self) -> tuple[str, str]:
        """The probe question's prompt without a system message, and with one that is the mark.

        Raises ModelError if the template does not render both, the mark included.
        """
        import jinja2

        try:
            plain = self._apply([_USER_PROBE])
        except jinja2.TemplateError as error:
            raise ModelError(
                f"the chat template of {self._name} does not render: {error}"
            ) from error
        try:
            marked = self._apply([_system(_MARK), _USER_PROBE])
        except jinja2.TemplateError as error:
            raise ModelError(
                f"the chat template of {self._name} refuses a system message ({error}); use a "
                "model whose template takes one, or put a chat_template.jinja that renders it into "
                "that directory"
            ) from error
        if _MARK not in marked:
            raise ModelError(_ignores_system(self._name))
        return plain, marked

    def _find_turn_end(self) -> str:
        """The text that closes the system turn.

        It can be told only where the user turn opens as the system turn does but for the role.
        Raises ModelError elsewhere.
        """
        # What follows the message is the end of the system turn and the user turn's opening, up to
        # the probe question. Cutting the latter off needs to know it.
        bos = self._bos(self._turn.before)
        header = self._turn.before[len(bos) :]
        between = self._turn.after.partition(_PROBE)[0]
        user_header = header.replace("system", "user")
        if (
            header.count("system") != 1
            or not between.endswith(user_header)
            or between == user_header
        ):
            raise ModelError(
                _cannot_drop(self._name, "the end of its system turn cannot be told exactly")
            )
        return between[: -len(user_header)]


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
        return Path(file).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(
            f"{source} cannot be read ({error.strerror}); give the path of a text file"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source} is not UTF-8 text; save it as UTF-8") from error


def _pin_dates(template: str, today: datetime.date, name: str) -> str:
    """Replace a template's calls of strftime_now, which give the current time, by a pinned date.

    Raises ModelError naming the model if a call cannot be replaced.
    """
    midnight = datetime.datetime.combine(today, datetime.time())
    pinned = _STRFTIME.sub(lambda match: json.dumps(midnight.strftime(match[2])), template)
    if re.search(r"strftime_now\s*\(", pinned):
        raise ModelError(
            f"the chat template of {name} calls strftime_now with a computed format, so its date "
            "cannot be pinned; write the format out in its chat_template.jinja"
        )
    return pinned


def _system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


def _has_system(messages: Messages) -> bool:
    return bool(messages) and messages[0]["role"] == "system"


def _is_cut(short: str, long: str) -> bool:
    """Whether `short` is `long` with one piece cut out."""
    head = 0  # length of their common beginning
    while head < len(short) and head < len(long) and short[head] == long[head]:
        head += 1
    return len(short) <= len(long) and long.endswith(short[head:])


def _ignores_system(name: str) -> str:
    return (
        f"the chat template of {name} ignores the system message, so all modes would have the "
        "same prompt; use a model whose template renders it, or put a chat_template.jinja that "
        "does into that directory"
    )


def _cannot_drop(name: str, why: str) -> str:
    return (
        f"modes.template_system=drop does not work with the chat template of {name}: {why}; use "
        "modes.template_system=keep"
    )
