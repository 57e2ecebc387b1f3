"""The final answer of a response: its last box, or else the last expression with a number."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_policysplit.rewards.numerals import SCALES, UNSIGNED
from megatron_policysplit.rewards.plain_text import closing_brace, plain

BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
# Of a long line only what surrounds its last digit is looked at, in characters.
_BEFORE, _AFTER = 1000, 100
_LONGEST = 300  # characters of an expression that is taken from running text

# What ends an expression in running text: delimiters, tags, arrows, bullets, text in mathematics.
_BREAKS = re.compile(
    r"</?[A-Za-z][^<>]*>|[-=]+>|\\[()\[\]\\]|\$|\*\*|\\(?:boxed|fbox)\s*\{"
    r"|\\(?:text|mbox|quad|qquad|implies|Rightarrow|rightarrow|to|therefore|begin|end)(?![A-Za-z])"
    r"|[`\"#&→⇒]|^\s*>|^\s*[-+*]\s|\.\.+"
)
_CURRENCY = re.compile(r"\\\$|(?<=[-+])\s?[$€£¥₹](?=[\d.])")
_TOKEN = re.compile(
    rf"""
    (?P<name>(?<![\\A-Za-z])[^\W\d_]+[-–]?\d[\w.]*)
    | (?P<number>{UNSIGNED}(?:[eE][+-]?\d+(?![^\W_]))?)
    | (?P<command>\\(?:[A-Za-z]+|[%{{}}|,;:! ]))
    | (?P<function>(?:sqrt|sin|cos|tan|log|ln|exp|abs|gcd|lcm|min|max)(?=\s*[({{_]))
    | (?P<variable>(?<=\d)[abcnxyz]{{2,3}}(?![^\W\d_])|(?<![^\W\d_])[^\W\d_](?![^\W\d_]|'))
    | (?P<word>[^\W\d_]+)
    | (?P<space>[ \t]+)
    | (?P<operator>[-+*/^_=<>!%|:,()\[\]{{}}–])
    | (?P<other>.)
    """,
    re.VERBOSE,
)
_OPEN, _CLOSE = tuple("([{"), tuple(")]}")
_RELATION = re.compile(r"(?<![<>!:=])=(?!=)|\\(?:approx|equiv)(?![A-Za-z])")
_SCALE = re.compile(rf"\s+(?:{'|'.join([*SCALES, 'percent'])})\b", re.IGNORECASE)
_INEQUALITY = re.compile(r"[<>]|\\(?:le|ge|lt|gt|ne)q?(?![A-Za-z])")


def final_answer(response: str) -> str | None:
    """The contents of the last closed `\\boxed{..}`, else the last expression with a number.

    Without a box, the response is read from its end for an expression that has a digit: numbers,
    LaTeX commands, single letters, operators and brackets that stand together. It is taken whole or
    not at all, because a part of it would mean something else: "2^10" and "3-5" are read as they
    stand, and "2x" is not 2. Of an equation its last right side is taken, of "(1, 2)" the pair. A
    number in front of a word is the number ("5 eggs"), unless the word multiplies it ("5 million");
    letters in front of a digit make a name of both ("H2", "COVID-19"), which is passed over. An
    exclamation mark behind a number ends a sentence.

    Returns None where there is no such expression, or where it cannot be said what it is: a hyphen
    with a word and a space on its left and a space on its right, an inequality or an operator that
    lacks a side, or more than 300 characters.
    """
    for match in reversed(list(BOXED.finditer(response))):
        end = closing_brace(response, match.end())
        if end is not None:
            return response[match.end() : end]
    for line in reversed(response.splitlines()):
        line = plain(line)
        last_digit = max((at for at, sign in enumerate(line) if sign.isdigit()), default=None)
        if last_digit is None:
            continue
        line = _CURRENCY.sub("", line[max(0, last_digit - _BEFORE) : last_digit + _AFTER])
        for part in reversed(_BREAKS.split(line)):
            for start, end in reversed(list(_expressions(part))):
                if any(sign.isdigit() for sign in part[start:end]):
                    if end - start > _LONGEST:
                        return None
                    return _complete(part[start:end], part[:start], part[end:])
    return None


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    start: int
    end: int


_NOTHING = _Token("other", "", 0, 0)


def _expressions(text: str) -> Iterator[tuple[int, int]]:
    """Where the expressions of a line begin and end."""
    tokens = [
        _Token(match.lastgroup, match[0], match.start(), match.end())
        for match in _TOKEN.finditer(text)
    ]
    begun: list[_Token] = []  # the expression that is being read
    depth = 0
    for index, token in enumerate(tokens):
        if token.kind == "space":
            continue
        is_member = _is_member(tokens, index, depth)
        if begun and not (is_member and _joins(begun[-1], token, tokens, index)):
            yield begun[0].start, begun[-1].end
            begun, depth = [], 0
            is_member = _is_member(tokens, index, depth)
        if is_member:
            begun.append(token)
            depth = max(0, depth + (token.text in _OPEN) - (token.text in _CLOSE))
    if begun:
        yield begun[0].start, begun[-1].end


def _is_member(tokens: list[_Token], index: int, depth: int) -> bool:
    """Whether a token can be a part of an expression where it stands."""
    token, before, after = tokens[index], _at(tokens, index - 1), _at(tokens, index + 1)
    if token.kind == "variable":
        # "x = 5" and "2x", not "I got a 5".
        touches = {before.kind, after.kind} & {"number", "command"} or any(
            side.kind == "operator" and side.text not in ",:%!" for side in (before, after)
        )
        return bool(touches) or any(
            side.kind == "operator" and side.text in "+-*/^=<>"
            for side in (_beyond_space(tokens, index, -1), _beyond_space(tokens, index, 1))
        )
    if token.text in (",", ":"):
        between_digits = before.kind == after.kind == "number"
        return between_digits or (token.text == "," and depth > 0)
    if token.text == "|":  # the bars of an absolute value, not of a table
        return any(side is not _NOTHING and side.kind != "space" for side in (before, after))
    return token.kind in ("number", "command", "function", "operator")


def _joins(last: _Token, token: _Token, tokens: list[_Token], index: int) -> bool:
    """Whether a token goes on with the expression that ends with `last`."""
    if last.end == token.start:
        return True
    if {last.kind, token.kind} & {"operator", "command"}:
        return not (last.text in _CLOSE and token.text in _OPEN)
    if last.kind == "number" and "_" in (_at(tokens, index - 2).text, _at(tokens, index - 3).text):
        return True  # \log_2 8
    # 3 1/2
    return last.kind == token.kind == "number" and _at(tokens, index + 1).text == "/"


def _at(tokens: list[_Token], index: int) -> _Token:
    return tokens[index] if 0 <= index < len(tokens) else _NOTHING


def _beyond_space(tokens: list[_Token], index: int, step: int) -> _Token:
    neighbour = _at(tokens, index + step)
    return _at(tokens, index + 2 * step) if neighbour.kind == "space" else neighbour


def _complete(expression: str, before: str, after: str) -> str | None:
    """An expression without what only surrounds it; None if it lacks a side.

    before, after: the text on its left and its right.
    """
    sides = _RELATION.split(expression)
    text = _balanced(sides[-1].strip().strip("*_– ").removesuffix("!"))
    if not any(sign.isdigit() for sign in text):
        return None
    text = re.sub(r"\s*[-+*:,]$", "", text)  # a dash, a list that goes on in words
    is_bare = len(sides) == 1  # what stands on its left is prose, no equation
    if re.match(r"[-+]\s", text) and is_bare and re.search(r"\w\s+$", before):
        return None
    if re.search(r"[\^/_<>]$", text) or re.match(r"[\^/,]|\\(?:times|cdot|div)", text):
        return None
    if is_bare and (_INEQUALITY.match(text) or re.match(r"[-+]", text) and before[-1:].isalnum()):
        return None
    scale = _SCALE.match(after)
    return text + (scale[0] if scale else "")


def _balanced(text: str) -> str:
    """`text` without brackets at its ends that have no counterpart, or that only enclose it."""
    text = text.strip()
    while text:
        text = text.rstrip("([{ ")
        depth, unmatched = [], None
        for position, sign in enumerate(text):
            if sign in _OPEN:
                depth.append(position)
            elif sign in _CLOSE:
                if depth:
                    depth.pop()
                elif unmatched is None:
                    unmatched = position
        if unmatched is not None and unmatched == len(text.rstrip(")]}")):
            text = text[:unmatched].strip()
        elif depth and depth[0] == 0:
            text = text[1:].strip()
        elif match := re.fullmatch(r"\(([^()\[\]{},]*)\)", text):
            text = match[1].strip()
        else:
            break
    return text
