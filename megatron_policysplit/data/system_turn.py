"""What a chat template does with a system message, found out by rendering marks.

A template is trusted only where its output shows that a system prompt arrives word for word and
changes nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_policysplit.data.chat_template import ChatTemplate, TemplateFailure, does_not_render
from megatron_policysplit.errors import ModelError
from megatron_policysplit.rows import Mode

# Texts that no template has: a system message, a question and an answer.
MARK = "zqmarkersystemzq"
_PROBE = "zqprobequestionzq"
_ANSWER = "zqprobeanswerzq"
_USER_PROBE = {"role": "user", "content": _PROBE}
SEPARATOR = "\n\n"


@dataclass(frozen=True)
class SystemTurn:
    """What a template does with the system turn: `before + text + after` for the probe question.

    Made by `inspect_system_turn`, read by `PromptBuilder`.
    """

    before: str
    after: str
    inserted: str  # the text it writes there by itself when, and only when, no message is given
    permanent: bool  # it writes a system turn with or without a message (Llama's dates)


def system_message(content: str) -> dict[str, str]:
    """A message of the system."""
    return {"role": "system", "content": content}


def text_before_prompt(inserted: str, drop: bool) -> str:
    """The text to put before a mode's prompt, which the template then no longer inserts."""
    return "" if drop or not inserted else inserted + SEPARATOR


def inspect_system_turn(
    template: ChatTemplate, prompts: Mapping[Mode, tuple[str, str]], drop: bool
) -> SystemTurn:
    """Compare the template's output with and without a system message that holds a mark.

    Without the message the template must either write nothing in its place, or a text of its own
    between the same two ends. Raises ModelError for anything else, and for a template whose prompt
    does not open the assistant's turn; ConfigError where its arguments make it fail.

    prompts: the system prompts, each with its configuration key. drop: modes.template_system=drop.
    """
    plain, marked = _render_probes(template)
    before, _, after = marked.partition(MARK)
    inserted = ""
    if not _is_cut(plain, marked):
        if not (
            plain.startswith(before)
            and plain.endswith(after)
            and len(plain) >= len(before) + len(after)
        ):
            raise ModelError(
                f"the chat template of {template.name} changes more than its system turn when a "
                "system message is given; put a chat_template.jinja that does not into that "
                "directory"
            )
        inserted = plain[len(before) : len(plain) - len(after)]
    turn = SystemTurn(
        before,
        after,
        inserted,
        permanent=plain == before + after and before != template.bos(before),
    )
    if drop and turn.permanent:
        raise ModelError(
            cannot_drop(template.name, "it writes text of its own into every system turn")
        )
    for mode, (prompt, key) in prompts.items():
        text = text_before_prompt(inserted, drop) + prompt
        prompted = [system_message(text), _USER_PROBE]
        try:
            rendered = template.render(prompted)
        except TemplateFailure as failure:
            raise template.blame(prompted, failure) or ModelError(
                f"the chat template of {template.name} fails on the {mode.value} prompt "
                f"({failure}); change {key} or the model's chat_template.jinja"
            ) from failure
        if rendered != before + text + after:
            raise ModelError(
                f"the chat template of {template.name} does not render the {mode.value} prompt "
                f"verbatim; change {key} or the model's chat_template.jinja"
            )
    _check_opening(template, plain)
    return turn


def _render_probes(template: ChatTemplate) -> tuple[str, str]:
    """The probe question's prompt without a system message, and with one that is the mark.

    Raises ModelError or ConfigError if the template does not render both, the mark included.
    """
    try:
        plain = template.render([_USER_PROBE])
    except TemplateFailure as failure:
        blamed = template.blame([_USER_PROBE], failure)
        raise blamed or ModelError(does_not_render(template.name, failure)) from failure
    system_probe = [system_message(MARK), _USER_PROBE]
    try:
        marked = template.render(system_probe)
    except TemplateFailure as failure:
        raise template.blame(system_probe, failure) or ModelError(
            f"the chat template of {template.name} refuses a system message ({failure}); use a "
            "model whose template takes one, or put a chat_template.jinja that renders it into "
            "that directory"
        ) from failure
    if MARK not in marked:
        raise ModelError(ignores_system(template.name))
    return plain, marked


def _check_opening(template: ChatTemplate, prompt: str) -> None:
    """Raise ModelError if the prompt does not open the assistant's turn.

    A template may ignore add_generation_prompt where the end of the user's turn is that opening, as
    Mistral's does. In a conversation with an answer, the answer then follows the prompt at once.
    """
    try:
        if template.render([_USER_PROBE], generation_prompt=False) != prompt:
            return
        answer = {"role": "assistant", "content": _ANSWER}
        answered = template.render([_USER_PROBE, answer], generation_prompt=False)
    except TemplateFailure:
        return  # it cannot be told where the template writes no answers
    if _ANSWER not in answered or not answered.startswith(prompt):
        return
    opening = answered[len(prompt) :].partition(_ANSWER)[0]
    if opening.strip():
        raise ModelError(
            f"the chat template of {template.name} ignores add_generation_prompt, so prompts lack "
            f"{opening!r}, which opens the assistant's turn; put a chat_template.jinja that writes "
            "it where add_generation_prompt is true into that directory"
        )


def find_turn_end(template: ChatTemplate, turn: SystemTurn) -> str:
    """The text that closes the system turn.

    It can be told only where the user turn opens as the system turn does but for the role. Raises
    ModelError elsewhere.
    """
    # What follows the message is the end of the system turn and the user turn's opening, up to the
    # probe question. Cutting the latter off needs to know it.
    bos = template.bos(turn.before)
    header = turn.before[len(bos) :]
    between = turn.after.partition(_PROBE)[0]
    user_header = header.replace("system", "user")
    if header.count("system") != 1 or not between.endswith(user_header) or between == user_header:
        raise ModelError(
            cannot_drop(template.name, "the end of its system turn cannot be told exactly")
        )
    return between[: -len(user_header)]


def _is_cut(short: str, long: str) -> bool:
    """Whether `short` is `long` with one piece cut out."""
    head = 0  # length of their common beginning
    while head < len(short) and head < len(long) and short[head] == long[head]:
        head += 1
    return len(short) <= len(long) and long.endswith(short[head:])


def ignores_system(name: str) -> str:
    """The error of a template that leaves the system message out."""
    return (
        f"the chat template of {name} ignores the system message, so all modes would have the "
        "same prompt; use a model whose template renders it, or put a chat_template.jinja that "
        "does into that directory"
    )


def cannot_drop(name: str, why: str) -> str:
    """The error of a template whose own system text cannot be left out."""
    return (
        f"modes.template_system=drop does not work with the chat template of {name}: {why}; use "
        "modes.template_system=keep"
    )
