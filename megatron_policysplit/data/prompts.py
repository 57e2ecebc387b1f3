"""The prompts of all modes, as token ids, built once from messages with the tokenizer's chat
template.

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

_MARK = "zqmarkersystemzq"
_PROBE = "zqprobequestionzq"
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
    """What a template does with the system turn: `before + text + after` for the probe question.

    inserted: the text it writes there by itself when no system message is given, and only then.
    permanent: it writes a system turn of its own whether or not a message is given (Llama's dates).
    """

    before: str
    after: str
    inserted: str
    permanent: bool


class PromptBuilder:
    """Prompts of all modes.

    tokenizer: a transformers tokenizer with a chat template.
    date: ISO date that templates see as today's; today where none is given. Keep `.date` with a
    run, so that a resumed run trains under the same prompts. Raises ConfigError for a wrong
    `modes.*` key, ModelError for a template that cannot carry a system prompt.
    """

    def __init__(self, tokenizer, config: ModesConfig, date: str | None = None):
        self.system_prompts = read_prompts(config)
        self.date = date or datetime.date.today().isoformat()
        self._tokenizer = tokenizer
        self._where = getattr(tokenizer, "name_or_path", "") or "this model"
        self._drop = config.template_system == "drop"
        reserved = [name for name in _RESERVED_KWARGS if name in config.chat_template_kwargs]
        if reserved:
            raise ConfigError(
                f"modes.chat_template_kwargs.{reserved[0]} is set by policysplit itself; remove it"
            )
        today = datetime.date.fromisoformat(self.date)
        self._kwargs = {"date_string": today.strftime("%d %b %Y"), **config.chat_template_kwargs}
        self._template = _pin_dates(self._read_template(), today, self._where)
        self._turn = self._inspect()
        self._turn_end = self._find_turn_end() if self._drop and self._turn.inserted else ""

    def build(self, messages: Messages) -> dict[Mode, list[int]]:
        """Token ids of every mode's prompt, generation prompt included."""
        texts = self.render(messages)
        return {
            mode: self._tokenizer(text, add_special_tokens=False)["input_ids"]
            for mode, text in texts.items()
        }

    def render(self, messages: Messages) -> dict[Mode, str]:
        """The text of every mode's prompt, control tokens and generation prompt included; normal
        first.

        Raises DataError where the template refuses the messages (roles out of order, for example).
        """
        import jinja2

        try:
            behind = {
                mode: self._behind(prompt, messages) for mode, prompt in self.system_prompts.items()
            }
            normal = self._normal(messages)
        except jinja2.TemplateError as error:
            roles = [message.get("role") for message in messages]
            raise DataError(
                f"the chat template of {self._where} refuses messages with the roles {roles}: "
                f"{error}"
            ) from error
        if normal in behind.values():
            raise ModelError(_ignores_system(self._where))
        return {Mode.NORMAL: normal, **behind}

    def _normal(self, messages: Messages) -> str:
        if not self._turn_end or _has_system(messages):
            return self._apply(messages)
        marked = self._apply([_system(_MARK), *messages])
        opening = self._turn.before + _MARK + self._turn_end
        if not marked.startswith(opening):
            raise ModelError(_cannot_drop(self._where, "its system turn depends on the messages"))
        return self._bos(marked) + marked[len(opening) :]

    def _behind(self, prompt: str, messages: Messages) -> str:
        if _has_system(messages):
            first = {**messages[0], "content": prompt + _SEPARATOR + messages[0]["content"]}
            return self._apply([first, *messages[1:]])
        kept = "" if self._drop or not self._turn.inserted else self._turn.inserted + _SEPARATOR
        return self._apply([_system(kept + prompt), *messages])

    def _apply(self, messages: Messages) -> str:
        return self._tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=self._template,
            tokenize=False,
            add_generation_prompt=True,
            **self._kwargs,
        )

    def _bos(self, text: str) -> str:
        bos = self._tokenizer.bos_token or ""
        return bos if text.startswith(bos) else ""

    def _read_template(self) -> str:
        if not self._tokenizer.chat_template:
            raise ModelError(
                f"the tokenizer of {self._where} has no chat template; put a chat_template.jinja "
                "into that directory or use an instruction-tuned model"
            )
        try:
            return self._tokenizer.get_chat_template()
        except ValueError as error:
            raise ModelError(
                f"the tokenizer of {self._where} has no default chat template: {error}"
            ) from error

    def _inspect(self) -> _SystemTurn:
        """Compare the template's output with and without a system message that holds a marker.

        Without the message the template either writes nothing in its place (the output is the other
        one with a piece cut out), or text of its own between the same two ends; anything else is
        refused.
        """
        import jinja2

        user = {"role": "user", "content": _PROBE}
        try:
            plain = self._apply([user])
        except jinja2.TemplateError as error:
            raise ModelError(
                f"the chat template of {self._where} does not render: {error}"
            ) from error
        try:
            marked = self._apply([_system(_MARK), user])
        except jinja2.TemplateError as error:
            raise ModelError(
                f"the chat template of {self._where} refuses a system message ({error}); use a "
                "model whose template takes one, or put a chat_template.jinja that renders it into "
                "that directory"
            ) from error
        if _MARK not in marked:
            raise ModelError(_ignores_system(self._where))
        before, _, after = marked.partition(_MARK)
        inserted = ""
        if not _is_cut(plain, marked):
            if not (
                plain.startswith(before)
                and plain.endswith(after)
                and len(plain) >= len(before) + len(after)
            ):
                raise ModelError(
                    f"the chat template of {self._where} changes more than its system turn when a "
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
                _cannot_drop(self._where, "it writes text of its own into every system turn")
            )
        kept = "" if self._drop or not inserted else inserted + _SEPARATOR
        for mode, prompt in self.system_prompts.items():
            if self._apply([_system(kept + prompt), user]) != before + kept + prompt + after:
                raise ModelError(
                    f"the chat template of {self._where} does not render the {mode.value} prompt "
                    f"verbatim; change {_prompt_key(mode)} or the model's chat_template.jinja"
                )
        return turn

    def _find_turn_end(self) -> str:
        """What closes the system turn, known only where the user turn opens like the system turn
        does.
        """
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
                _cannot_drop(self._where, "the end of its system turn cannot be told exactly")
            )
        return between[: -len(user_header)]


def read_prompt(config: ModesConfig) -> str:
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
    """The system prompts of the modes that have one, checked. Raises ConfigError."""
    prompts = {Mode.HIGH_ENTROPY: read_prompt(config)}
    for mode, given in other_modes(config).items():
        key = _prompt_key(mode)
        if (given.prompt is None) == (given.prompt_file is None):
            raise ConfigError(
                f"modes.others.{mode.value} needs a prompt or a prompt_file, and not both"
            )
        text = given.prompt
        if text is None:
            key = f"modes.others.{mode.value}.prompt_file={given.prompt_file}"
            text = _read_text(given.prompt_file, key)
        if not text.strip():
            raise ConfigError(
                f"{key} is empty; write a prompt, since the mode without one is the normal mode"
            )
        if same := [other for other, prompt in prompts.items() if prompt == text.strip()]:
            raise ConfigError(
                f"{key} is the prompt of the {same[0].value} mode, too; modes differ by their "
                "prompts"
            )
        prompts[mode] = text.strip()
    return prompts


def _prompt_key(mode: Mode) -> str:
    return (
        "modes.high_entropy_prompt"
        if mode == Mode.HIGH_ENTROPY
        else f"modes.others.{mode.value}.prompt"
    )


def read_eval_prompts(prompts: Mapping[str, Any], modes: ModesConfig) -> dict[str, str]:
    """The texts of eval.prompts by name. Raises ConfigError for a name or a text that cannot be
    used.
    """
    texts, taken = {}, [mode.value for mode in modes_of(modes)]
    for name, given in prompts.items():
        key = f"eval.prompts.{name}"
        if not re.fullmatch(r"[A-Za-z0-9_-]+", str(name)) or name in taken:
            raise ConfigError(
                f"{key} cannot be a name in the logs; use letters, digits, '_' and '-', and not "
                "the name of a mode"
            )
        if (
            isinstance(given, Mapping)
            and list(given) == ["file"]
            and isinstance(given["file"], str)
        ):
            texts[name] = _read_text(given["file"], f"{key}.file={given['file']}")
        elif isinstance(given, str):
            texts[name] = given.strip()
        else:
            raise ConfigError(
                f"{key}={given} is neither a text nor {{file: PATH}}; without a prompt of ours is "
                "the normal mode"
            )
        if not texts[name]:
            raise ConfigError(
                f"{key} is empty; write a prompt or remove it, the normal mode has none of ours"
            )
    return texts


def _read_text(file: str, source: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(
            f"{source} cannot be read ({error.strerror}); give the path of a text file"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source} is not UTF-8 text; save it as UTF-8") from error


def _pin_dates(template: str, today: datetime.date, where: str) -> str:
    """Replace calls of strftime_now by the pinned date: transformers answers them with the current
    time.
    """
    midnight = datetime.datetime.combine(today, datetime.time())
    pinned = _STRFTIME.sub(lambda match: json.dumps(midnight.strftime(match[2])), template)
    if re.search(r"strftime_now\s*\(", pinned):
        raise ModelError(
            f"the chat template of {where} calls strftime_now with a computed format, so its date "
            "cannot be pinned; write the format out in its chat_template.jinja"
        )
    return pinned


def _system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


def _has_system(messages: Messages) -> bool:
    return bool(messages) and messages[0]["role"] == "system"


def _is_cut(short: str, long: str) -> bool:
    """Whether `short` is `long` with one piece cut out."""
    head = 0
    while head < len(short) and head < len(long) and short[head] == long[head]:
        head += 1
    return len(short) <= len(long) and long.endswith(short[head:])


def _ignores_system(where: str) -> str:
    return (
        f"the chat template of {where} ignores the system message, so all modes would have the "
        "same prompt; use a model whose template renders it, or put a chat_template.jinja that "
        "does into that directory"
    )


def _cannot_drop(where: str, why: str) -> str:
    return (
        f"modes.template_system=drop does not work with the chat template of {where}: {why}; use "
        "modes.template_system=keep"
    )
