"""What the text of an answer is: a number, words, or a formula for math-verify."""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_policysplit.rewards.final_answer import BOXED, final_answer
from megatron_policysplit.rewards.numerals import Numeral, read_numeral
from megatron_policysplit.rewards.plain_text import read_words, undecorated

# Units in plain text that math-verify takes off the end of a formula. Others would be read as
# products of their letters.
UNITS = frozenset(
    "foot feet ft inch inches yard yards mile miles mm cm dm km meter meters metre metres gm kg "
    "pound pounds lb lbs liter liters litre litres gal gallon gallons sec second seconds min "
    "minute minutes hr hour hours day days month months year years degree degrees deg cent cents "
    "rupee rupees mph kmph acre acres hectare hectares unit units square cubic percent sq".split()
) - {"foot"}
# Words that are mathematics, or join answers.
_MATHEMATICAL = frozenset(
    "and or mod sin cos tan cot sec csc log ln exp sqrt max min gcd lcm det deg infinity".split()
)
_COMMAND = re.compile(
    r"\\(?:begin|end)\s*\{[^{}]*\}|\\(?:text\w*|mbox|math[a-z]+|operatorname)\s*\{[^{}]*\}"
    r"|\\[A-Za-z]+"
)
_WORD = re.compile(r"(?<![^\W\d_])[^\W\d_]{2,}(?![^\W\d_])")
_SIDE_BY_SIDE = re.compile(r"(?<![_\d.])\d[\d.]*\s+\d")
_NOT_A_NUMBER = re.compile(r"[+-]?(?:nan|inf)", re.IGNORECASE)
# Names that are written without their backslash.
_BARE_FUNCTION = re.compile(r"(?<![\\A-Za-z])(sin|cos|tan|log|ln|exp)(?=\s*[\d_({\\])")
_BARE_PI = re.compile(r"([^A-Za-z\\]*)pi([^A-Za-z]*)")
_LONGEST = 2000  # characters of an answer whose decorations are looked for
_RIGHT_SIDE = re.compile(r"[^,;<>]*(?<![!<>:])=\s*([^=,;<>]+)")


@dataclass(frozen=True)
class Reading:
    """An answer as `math` reads it. Made by `read_answer`."""

    text: str  # without decorations
    numeral: Numeral | None
    words: list[str] | None  # comparable; None if it is no text without digits
    doubt: str | None  # why math-verify would read it as something else, if it would

    @property
    def is_formula(self) -> bool:
        return self.numeral is None and self.words is None


def read_answer(answer: str) -> Reading:
    """Read an answer: the contents of a box, the end of a response, or a reference answer."""
    text = undecorated(answer) if len(answer) <= _LONGEST else answer
    text = _BARE_PI.sub(r"\1\\pi \2", text) if _BARE_PI.fullmatch(text) else text
    text = _BARE_FUNCTION.sub(r"\\\1", text)
    numeral = read_numeral(text)
    words = None
    if numeral is None and not _NOT_A_NUMBER.fullmatch(text):
        words = read_words(text)
        if words in (["infinity"], ["+infinity"]):
            text, words = r"\infty", None
    doubt = None if numeral is not None or words is not None else _doubt(text)
    if doubt is not None and not re.search(r"[\d\n]", text) and text:
        # No digits, no lines: a text that is compared as such, such as "yes → no".
        words, doubt = [" ".join(text.split()).casefold()], None
    return Reading(text, numeral, words, doubt)


def read_reference(answer: str) -> Reading:
    """Read a reference answer: its last box, or what follows `####` (GSM8K), or all of it.

    Raises ValueError with the reason if it cannot be told what it is: text with digits, several
    lines, nothing, NaN or infinity as a float is written.
    """
    if BOXED.search(answer):
        answer = final_answer(answer) or ""
    elif "####" in answer:
        answer = answer.rpartition("####")[2]
    reading = read_answer(answer)
    if not reading.text:
        raise ValueError("it is empty")
    if _NOT_A_NUMBER.fullmatch(reading.text):
        raise ValueError("it is not a finite number")
    if reading.doubt is not None:
        raise ValueError(reading.doubt)
    if reading.words is not None and "\n" in reading.text:
        raise ValueError("it is text in several lines")
    return reading


def right_side(reading: Reading) -> Numeral | None:
    """The number on the right side of the equation that an answer is; None if it is none."""
    match = _RIGHT_SIDE.fullmatch(reading.text)
    if match is None or re.search(r"\b(?:and|or)\b", reading.text):
        return None
    return read_numeral(undecorated(match[1]))


def _doubt(text: str) -> str | None:
    """Why a text that is neither number nor words is no mathematics that math-verify can read."""
    if not text:
        return "it is empty"
    if "####" in text:
        return "it has several lines behind ####"
    bare = _COMMAND.sub(" ~ ", text)
    for match in _WORD.finditer(bare):
        if not _is_mathematics(bare, match):
            lines = " in several lines" * ("\n" in text)
            return f"it is text{lines} with the word {match[0]!r}"
    if _SIDE_BY_SIDE.search(bare):
        return "it has two numbers side by side"
    if re.search(r"\d\.\d+\.\d|\d[^\W\d_]+\d|\d\s*\*\*|–", bare):
        return "it is neither a number nor a formula"
    if re.search(r"\d\.\d{3},\d", bare):
        return "it has a point in front of a comma, which may be either's decimal sign"
    if re.search(r"~\s*\d", text) and text.lstrip().startswith("~"):
        return "it is an approximation"
    return None


def _is_mathematics(text: str, match: re.Match) -> bool:
    """Whether letters that stand together are a product, a function or a unit, and no word."""
    word = match[0]
    before, after = text[: match.start()], text[match.end() :]
    if word.lower() in _MATHEMATICAL or (word in UNITS and _only_units(after)):
        return True
    # Of letters that touch a number, a bracket or a sign, or that an operator stands next to, a
    # few make a product, such as 2xy or abc + 1.
    touches = re.search(r"[\d^_{}()\[\]|~]$", before) and re.match(r"$|\W|_", after)
    touches = touches or re.match(r"[\d^_({\[]", after)
    beside = re.search(r"[-+*/^=<>~]\s*$", before) or re.match(r"\s*[-+*/^=<>_({]", after)
    return (bool(touches) and len(word) <= 4) or (bool(beside) and not re.match(r"\s*\w", after))


def _only_units(text: str) -> bool:
    return all(word in UNITS for word in re.findall(r"[^\W\d_]+", text)) and not re.search(
        r"\d", text
    )
