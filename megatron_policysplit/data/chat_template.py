"""A model's chat template: its text, the arguments it gets, and what it makes of messages.

A template is a program of the model's author. Whatever goes wrong in it is told in one sentence.
"""

from __future__ import annotations

import datetime
import difflib
import inspect
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_policysplit.data.tokenizer import read_json
from megatron_policysplit.errors import ConfigError, ModelError

Message = Mapping[str, Any]  # `role`, `content`, and what else the template reads
Messages = Sequence[Message]
Tools = Sequence[Mapping[str, Any]]  # schemas of functions

# Names that policysplit, transformers or jinja2 give a meaning to, whatever the template reads. The
# parameters of the installed transformers' apply_chat_template are added once it is imported.
_TAKEN = frozenset(
    "add_generation_prompt chat_template continue_final_message conversation conversations "
    "documents kwargs max_length messages padding raise_exception return_assistant_tokens_mask "
    "return_dict return_tensors sanitize_control_tokens self strftime_now tokenize "
    "tokenizer_kwargs tools truncation".split()
)
_STRFTIME = re.compile(r"""strftime_now\(\s*(?:format\s*=\s*)?(["'])([^"']*)\1\s*\)""")
_KEY = "modes.chat_template_kwargs"


class TemplateFailure(Exception):
    """A template that refuses its input or fails on it; says why in words of the template's."""


class ChatTemplate:
    """A tokenizer's chat template with its arguments, its date pinned.

    Raises ModelError for a tokenizer without a template and for a template that cannot be read,
    ConfigError for an argument that is not the user's to set or that the template never reads.

    tokenizer: of transformers. kwargs: modes.chat_template_kwargs. today: the templates' date.
    """

    def __init__(self, tokenizer, kwargs: Mapping[str, Any], today: datetime.date):
        self.name = getattr(tokenizer, "name_or_path", "") or "this model"
        self._tokenizer = tokenizer
        self.source = _pin_dates(self._read(), today, self.name)
        parameters = inspect.signature(tokenizer.apply_chat_template).parameters
        special = tokenizer.special_tokens_map
        _check_kwargs(kwargs, self.source, self.name, taken=parameters, special=special)
        self._given = dict(kwargs)
        # Llama's templates take the date from a variable, others from strftime_now.
        self._kwargs = {"date_string": today.strftime("%d %b %Y"), **kwargs}

    def render(
        self, messages: Messages, tools: Tools | None = None, *, generation_prompt: bool = True
    ) -> str:
        """The text that the template makes of messages.

        generation_prompt: whether the text ends with the opening of the assistant's turn.
        Raises TemplateFailure for whatever goes wrong in the template.
        """
        return self._render(messages, tools, self._kwargs, generation_prompt)

    def blame(
        self, messages: Messages, failure: TemplateFailure, tools: Tools | None = None
    ) -> ConfigError | None:
        """The error for modes.chat_template_kwargs if messages fail on them; None if not on them.

        tools: those of the row that failed.
        """
        if not self._given:
            return None
        kwargs = {name: self._kwargs[name] for name in self._kwargs if name not in self._given}
        remedy = "change the value, or remove it"
        try:
            self._render(messages, tools, kwargs, True)
        except TemplateFailure as other:
            if str(other) == str(failure):
                return None
            remedy = "change the value"  # the template needs one
        return ConfigError(
            f"{_KEY}={self._given}: the chat template of {self.name} fails with it ({failure}); "
            f"{remedy}"
        )

    def bos(self, text: str) -> str:
        """The begin-of-sequence token if `text` begins with it, else nothing."""
        bos = self._tokenizer.bos_token or ""
        return bos if text.startswith(bos) else ""

    def _render(
        self,
        messages: Messages,
        tools: Tools | None,
        kwargs: Mapping[str, Any],
        generation_prompt: bool,
    ) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=None if tools is None else [dict(tool) for tool in tools],
                chat_template=self.source,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **kwargs,
            )
            text.encode()  # a literal can hold half a surrogate pair, which no tokenizer takes
            return text
        # A template can raise anything: its own errors, jinja2's, and those of Python that its
        # expressions meet, such as TypeError, ZeroDivisionError and RecursionError.
        except Exception as error:
            raise TemplateFailure(_words(error)) from error

    def _read(self) -> str:
        if not self._tokenizer.chat_template:
            raise ModelError(
                f"the tokenizer of {self.name} has no chat template; put a chat_template.jinja "
                "into that directory or use an instruction-tuned model"
            )
        try:
            return self._tokenizer.get_chat_template()
        except ValueError as error:
            raise ModelError(
                f"the tokenizer of {self.name} has no default chat template: {error}"
            ) from error


def check_template_files(model_path: str | Path, kwargs: Mapping[str, Any]) -> None:
    """Raise a UserError for a template that is no Jinja or for an argument that it cannot take.

    Reads files only, so that a training tells before it starts processes; `ChatTemplate` checks the
    same and more. Leaves it to that where the files hold several templates.
    """
    directory = Path(model_path)
    settings = read_json(directory / "tokenizer_config.json")
    file = directory / "chat_template.jinja"
    source = file.read_text(encoding="utf-8") if file.is_file() else settings.get("chat_template")
    if isinstance(source, str):
        special = [name for name in settings if name.endswith("_token")]
        _check_kwargs(kwargs, source, str(model_path), special=special)


def _check_kwargs(
    kwargs: Mapping[str, Any],
    source: str,
    name: str,
    *,
    taken: Collection[str] = (),
    special: Collection[str] = (),
) -> None:
    """Raise ConfigError for an argument that would be overwritten, misread or lost.

    Raises ModelError for a template that cannot be read. taken: further names that are not the
    user's. special: variables of special tokens, which are not worth a hint.
    """
    taken = _TAKEN.union(taken)
    readable = _variables(source, name)
    for key in kwargs:
        if key in taken:
            raise ConfigError(f"{_KEY}.{key} is set by policysplit itself; remove it")
        if key in readable:
            continue
        others = sorted(readable - taken - set(special))
        near = difflib.get_close_matches(str(key), others, n=1)
        if near:
            hint = f"did you mean {near[0]}?"
        else:
            hint = f"it reads {', '.join(others)}" if others else "it reads no variable"
            hint = f"remove it ({hint})"
        raise ConfigError(f"{_KEY}.{key}: the chat template of {name} never reads it; {hint}")


def _variables(source: str, name: str) -> frozenset[str]:
    """The variables that the template reads and does not make itself."""
    from jinja2 import Environment, TemplateError, meta, nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        """The block with which templates mark what the assistant says."""

        tags = {"generation"}

        def parse(self, parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = Environment(extensions=["jinja2.ext.loopcontrols", Generation])
    try:
        return frozenset(meta.find_undeclared_variables(environment.parse(source)))
    except (TemplateError, RecursionError) as error:
        raise ModelError(does_not_render(name, _words(error))) from error


def does_not_render(name: str, why: object) -> str:
    """The sentence about a template that fails whatever it gets."""
    return (
        f"the chat template of {name} does not render: {why}; put a chat_template.jinja that does "
        "into that directory"
    )


def _words(error: Exception) -> str:
    """What a template's error says, in one line; Python's own errors with their kind."""
    import jinja2

    kind, text = type(error).__name__, " ".join(str(error).split())
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"line {error.lineno}: {text}"
    if isinstance(error, jinja2.TemplateError) and text:
        return text
    return f"{kind}: {text}" if text else kind


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
