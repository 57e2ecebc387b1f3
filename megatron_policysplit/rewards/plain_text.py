"""Texts that mean the same, written in one way: Unicode's mathematics, decorations, words.

`plain` is for any text; `undecorated` and `read_words` are for a text that is an answer and nothing
else, such as a reference answer or the contents of a box.
"""

from __future__ import annotations

import re
import unicodedata

# Characters that a model or a data set writes for what LaTeX has a command or ASCII a sign for.
_SYMBOLS = {
    "−": "-",
    "﹣": "-",
    "‐": "-",
    "‑": "-",
    "⁄": "/",
    "∕": "/",
    "×": r"\times ",
    "÷": r"\div ",
    "·": r"\cdot ",
    "⋅": r"\cdot ",
    "∙": r"\cdot ",
    "π": r"\pi ",
    "∞": r"\infty ",
    "°": r"^{\circ}",
    "≤": r"\le ",
    "≥": r"\ge ",
    "≠": r"\ne ",
    "≈": r"\approx ",
    "±": r"\pm ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "“": '"',
    "”": '"',
    "‘": "'",
    "’": "'",
}
_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n", strict=True))
_SUPERSCRIPT = re.compile(f"[{''.join(_SUPERSCRIPTS)}]+")
_ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|([0-9]+(?:\.[0-9]+)?|[A-Za-z]))")
# An en dash is a minus sign where it stands before a number and behind nothing that it could join.
_EN_DASH_MINUS = re.compile(r"(?<![\w)\]}.,])–(?=[\d.\\])")
_INVISIBLE = re.compile("[\u00ad\u200b-\u200d\u2060\ufeff]")

_GROUP = re.compile(r"\\(?:text|mbox|mathrm|mathbf|textbf|textit|textrm|textnormal|mathit)\s*\{")
_WRAPPED = (
    re.compile(r"\$\$([^$]*)\$\$"),
    re.compile(r"\$([^$]*)\$"),
    re.compile(r"\\\(((?:(?!\\[()]).)*)\\\)", re.DOTALL),
    re.compile(r"\\\[((?:(?!\\[\[\]]).)*)\\\]", re.DOTALL),
    re.compile(r"\*\*([^*]*)\*\*"),
    re.compile(r"\*([^*]*)\*"),
    re.compile(r"__([^_]*)__"),
    re.compile(r"`+([^`]*)`+"),
    re.compile(r'"([^"]*)"'),
    re.compile(r"'([^']*)'"),
    re.compile(r"<answer>(.*)</answer>", re.DOTALL | re.IGNORECASE),
    re.compile(r"\{([^{},;]*)\}"),
    re.compile(r"\(([A-Za-z])\)"),  # a letter of a multiple choice
)
_PREFIX = re.compile(
    r"[*_]*(?:the\s+)?(?:final\s+|correct\s+)?(?:answer|ans|result)\s*[*_]*\s*"
    r"(?:is\b\s*:?|:|=)\s*(?:[*_]+\s+)?",
    re.IGNORECASE,
)
_FULL_STOP = re.compile(r"(?<![.…])[.。]\s*$|[,;]\s*$")

_ITEM_SEPARATOR = re.compile(r"\s*(?:[,;&]|\band\b|\bor\b)\s*", re.IGNORECASE)
# Letters (and marks that belong to them) joined by a hyphen, a slash or an apostrophe.
_WORD = r"[^\W\d_]+(?:'[^\W\d_]+)*'?"
_WORDS = re.compile(
    rf"{_WORD}(?:(?:\s+|[.:]\s*|\s*[-/]\s*|\s+\(\s*|\)\s+){_WORD})*(?:\s*\))?"
    r"(?:\.|(?<=[^\W\d_][^\W\d_])[!?])?"
)
_LETTERS_AND_OPERATOR = re.compile(r"(?<![^\W\d_])[^\W\d_]\s*[-/]|[-/]\s*[^\W\d_](?![^\W\d_])")


def plain(text: str) -> str:
    """`text` with Unicode's digits, signs and spaces as ASCII or LaTeX; what it means is the same.

    Full-width characters, digits of other scripts, U+2212 and its like, superscripts, vulgar
    fractions, roots of a number or letter. An en dash is a minus sign only before a number and
    behind nothing that it could join: in "3–5" it stays what it is.
    """
    if text.isascii():
        return text
    text = _EN_DASH_MINUS.sub("-", _INVISIBLE.sub("", text))
    text = _SUPERSCRIPT.sub(
        lambda match: f"^{{{''.join(_SUPERSCRIPTS[sign] for sign in match[0])}}}", text
    )
    text = _ROOT.sub(lambda match: rf"\sqrt{{{match[1] or match[2]}}}", text)
    return "".join(map(_plain_character, text))


def _plain_character(character: str) -> str:
    if character.isascii():
        return character
    if "！" <= character <= "～":  # full-width ASCII
        return chr(ord(character) - 0xFEE0)
    if character in _SYMBOLS:
        return _SYMBOLS[character]
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    if character.isspace():
        return " " if character not in "\u2028\u2029\u0085" else "\n"
    fraction = unicodedata.normalize("NFKC", character) if character in "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞" else ""
    if fraction:
        numerator, denominator = fraction.split("⁄")
        return rf"\frac{{{numerator}}}{{{denominator}}}"
    return character


def undecorated(answer: str) -> str:
    """An answer without what surrounds it and means nothing.

    That is white space, dollars and the other delimiters of mathematics, Markdown's stars and
    backticks, quotation marks, `<answer>` tags, `\\text{..}` around the whole, "The answer is",
    "Answer:", a leading "=", a full stop at the end, and parentheses around a single letter.
    """
    text = plain(answer).strip()
    while True:
        stripped = _FULL_STOP.sub("", text).strip()
        stripped = _PREFIX.sub("", stripped, count=1) if _PREFIX.match(stripped) else stripped
        if re.match(r"=(?!=)", stripped):
            stripped = stripped[1:].strip()
        for pattern in _WRAPPED:
            if match := pattern.fullmatch(stripped):
                stripped = match[1].strip()
        group = _GROUP.match(stripped)
        if group and closing_brace(stripped, group.end()) == len(stripped) - 1:
            stripped = stripped[group.end() : -1].strip()
        if stripped == text:
            return text
        text = stripped


def closing_brace(text: str, start: int) -> int | None:
    """Where the brace is that closes the one before `start`; None if nothing does."""
    depth = 1
    for position in range(start, len(text)):
        if text[position] in "{}" and text[position - 1] != "\\":
            depth += 1 if text[position] == "{" else -1
            if depth == 0:
                return position
    return None


def read_words(text: str) -> list[str] | None:
    """The words of an answer without digits and mathematics, made comparable; None of another.

    An answer of several, such as "Rome, Paris" or "A and C", is a sorted list of them. Upper and
    lower case are the same, but for an answer of single letters: "A" is not "a", which may be two
    variables. text: as `undecorated` returns it.
    """
    items = [item for item in _ITEM_SEPARATOR.split(text) if item.strip()]
    if not items or not all(
        _WORDS.fullmatch(item.strip()) and not _LETTERS_AND_OPERATOR.search(item) for item in items
    ):
        return None
    return sorted(map(_comparable, items))


def _comparable(words: str) -> str:
    tokens = unicodedata.normalize("NFC", words).strip(" .:!?'").split()
    if all(len(token) == 1 for token in tokens):
        return " ".join(tokens)
    return " ".join(tokens).casefold()
