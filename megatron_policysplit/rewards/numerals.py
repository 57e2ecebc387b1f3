"""Numbers as people, data sets and models write them, read exactly."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

# Below this, six decimals say too little of a number.
_SMALL = Fraction(1, 1000)
_DECIMALS = 6  # math-verify compares numbers with a decimal point to that many places

_LONGEST = 400  # characters of a text that is read as one number

_SEPARATOR = r"(?:,\\!|\\[,;:! ]|\{,\}|[, '_])"  # of thousands
_DIGITS = rf"(?:[1-9]\d{{0,2}}(?:{_SEPARATOR}\d{{3}})+(?!\d)|\d+)"
UNSIGNED = rf"(?:{_DIGITS}(?:\.\d+)?|\.\d+)"
_SIGNED = rf"[+-]?\s*{UNSIGNED}"
_FRACTION = re.compile(
    rf"\\[dtc]?frac\s*(?:\{{\s*({_SIGNED})\s*\}}|(\d))\s*(?:\{{\s*({_SIGNED})\s*\}}|(\d))"
)
_POWER_OF_TEN = (
    r"(?:[eE]([+-]?\d{1,3})|\s*(?:\*|\\times|\\cdot|x)\s*10\s*\^\s*"
    r"(?:\{\s*([+-]?\d{1,3})\s*\}|\(\s*([+-]?\d{1,3})\s*\)|([+-]?\d{1,3})))"
)
_DECIMAL = re.compile(rf"({UNSIGNED})(?:{_POWER_OF_TEN})?")
_SLASH = re.compile(rf"({UNSIGNED})\s*/\s*({UNSIGNED})")
_MIXED = re.compile(rf"({_DIGITS})\s+(\d+)\s*/\s*(\d+)")
_MIXED_LATEX = re.compile(rf"({_DIGITS})\s*(\\[dtc]?frac.*)")
_CURRENCY = r"(?:\\?\$|[€£¥₹])"
_FRAME = re.compile(
    rf"([+-]?)\s*{_CURRENCY}?\s*([+-]?)\s*(.*?)\s*"
    rf"(\\?%|percent|{_CURRENCY}|\^\s*\\circ|\^\s*\{{\s*\\circ\s*\}})?",
    re.DOTALL,
)
SCALES = {
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "dozen": 12,
    "hundred": 100,
}
_SCALE = re.compile(rf"({UNSIGNED})\s+({'|'.join(SCALES)})", re.IGNORECASE)


@dataclass(frozen=True)
class Numeral:
    """A number that was written out. Made by `read_numeral`."""

    value: Fraction  # before the percent sign is applied: 50 of 50 %
    is_decimal: bool  # whether it has a decimal point, so that it may have been rounded
    is_percent: bool

    def latex(self) -> str:
        """The number as math-verify reads it: a decimal as such, others as a fraction."""
        if self.is_decimal and _is_finite_decimal(self.value):
            text = _positional(self.value)
        elif self.value.denominator == 1:
            text = str(self.value.numerator)
        else:
            text = rf"\frac{{{self.value.numerator}}}{{{self.value.denominator}}}"
        return text + r"\%" * self.is_percent


def read_numeral(text: str) -> Numeral | None:
    """The number that a text is; None if it is anything else, or more than a number.

    Integers and decimals (.5, 1e-5, 3 \\times 10^5), thousands in groups (1,000 or 1\\,000 or
    1 000), fractions (3/4, \\frac34), mixed numbers (1 1/2), each with a sign, a currency, a
    percent or degree sign, or a word such as "million". Other units are not read.
    text: as `plain_text.plain` returns it, without white space around it.
    """
    if len(text) > _LONGEST:
        return None
    frame = _FRAME.fullmatch(text)
    sign = -1 if "-" in (frame[1], frame[2]) else 1
    if frame[1] and frame[2]:
        return None
    value = _magnitude(frame[3])
    if value is None:
        return None
    is_percent = (frame[4] or "").endswith(("%", "percent"))
    return Numeral(sign * value, "." in frame[3], is_percent)


def same_number(a: Numeral, b: Numeral) -> bool:
    """Whether two numbers are equal.

    Exactly, unless one has a decimal point: then both are rounded to six decimals, as math-verify
    does, so that 0.333333 is 1/3 and 0.33 is not. Numbers below 0.001 are rounded to six
    significant digits instead. A percentage equals the number before its sign and its hundredth: 50
    % is 50 and 1/2.
    """
    is_decimal = a.is_decimal or b.is_decimal
    values = [(a.value, b.value)]
    if a.is_percent and not b.is_percent:
        values.append((a.value / 100, b.value))
    if b.is_percent and not a.is_percent:
        values.append((a.value, b.value / 100))
    return any(x == y or (is_decimal and _rounded_equal(x, y)) for x, y in values)


def decimals_to_compare(smallest: float) -> int:
    """The decimals to which a number of the magnitude `smallest` (above 0) is compared."""
    if smallest >= _SMALL:
        return _DECIMALS
    return _DECIMALS - 1 - math.floor(math.log10(smallest))


def _rounded_equal(a: Fraction, b: Fraction) -> bool:
    larger = max(abs(a), abs(b))
    if larger >= _SMALL:
        decimals = _DECIMALS
    else:
        # By logarithms of integers: a float holds no 1e-400.
        exponent = math.log10(larger.numerator) - math.log10(larger.denominator)
        decimals = _DECIMALS - 1 - math.floor(exponent)
    return round(a, decimals) == round(b, decimals)


def _magnitude(text: str) -> Fraction | None:
    """The value of an unsigned number, without currency and percent."""
    if match := _DECIMAL.fullmatch(text):
        exponent = int(next((digits for digits in match.groups()[1:] if digits), "0"))
        return _fraction(match[1]) * Fraction(10) ** exponent
    if match := _SCALE.fullmatch(text):
        return _fraction(match[1]) * SCALES[match[2].lower()]
    if match := re.fullmatch(r"10\s*\^\s*(?:\{\s*([+-]?\d{1,3})\s*\}|([+-]?\d{1,3}))", text):
        return Fraction(10) ** int(match[1] or match[2])
    # Before the quotient: 5 419/500 is five and a fraction, not 5419 in 500ths.
    if match := _MIXED.fullmatch(text):
        return _mixed(match[1], _quotient(match[2], match[3]))
    if match := _SLASH.fullmatch(text):
        return _quotient(match[1], match[2])
    if match := _FRACTION.fullmatch(text):
        return _quotient(match[1] or match[2], match[3] or match[4])
    if match := _MIXED_LATEX.fullmatch(text):
        part = _FRACTION.fullmatch(match[2])
        return part and _mixed(match[1], _quotient(part[1] or part[2], part[3] or part[4]))
    return None


def _mixed(whole: str, part: Fraction | None) -> Fraction | None:
    """A whole number and a proper fraction behind it; anything else is no mixed number."""
    return _fraction(whole) + part if part is not None and 0 < part < 1 else None


def _quotient(numerator: str, denominator: str) -> Fraction | None:
    divisor = _fraction(denominator)
    return _fraction(numerator) / divisor if divisor else None


def _fraction(digits: str) -> Fraction:
    """The value of a signed decimal; separators of thousands go."""
    return Fraction(re.sub(rf"{_SEPARATOR}|\s", "", digits))


def _is_finite_decimal(value: Fraction) -> bool:
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


def _positional(value: Fraction) -> str:
    """A decimal without an exponent; its denominator divides a power of ten."""
    decimals = 0
    while (value * 10**decimals).denominator != 1:
        decimals += 1
    digits = str(abs(value.numerator * 10**decimals // value.denominator)).rjust(decimals + 1, "0")
    sign = "-" if value < 0 else ""
    whole, part = digits[: len(digits) - decimals], digits[len(digits) - decimals :]
    return f"{sign}{whole}.{part or '0'}"
