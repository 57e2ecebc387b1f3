"""What `math` grades right and wrong. The right grades are worked out by hand, or by fractions and sympy."""

import random
import time
from fractions import Fraction

import pytest
import sympy

from megatron_policysplit.data.questions import Question
from megatron_policysplit.rewards.final_answer import final_answer
from megatron_policysplit.rewards.math import reward
from megatron_policysplit.rewards.numerals import read_numeral, same_number
from megatron_policysplit.rewards.plain_text import plain, read_words, undecorated


def grade(gold: str, response: str) -> float:
    return reward(response, Question(3, [{"role": "user", "content": "?"}], gold, {}))


def box(text: str) -> str:
    return f"\\boxed{{{text}}}"


@pytest.mark.parametrize(
    "gold, answer",
    [
        # letters are text
        ("ACB", "BCA"),
        ("HTTH", "THHT"),
        ("listen", "silent"),
        ("No", "On"),
        ("Paris, Rome", "Paris, More"),
        ("A", "a"),
        ("A", "B"),
        ("Yes", "No"),
        # small numbers
        (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}"),
        ("0.0000001", "0.0000002"),
        ("0", "0.0000001"),
        ("1e-400", "2e-400"),
        (r"1+2^{-99}", r"1+2^{-98}"),
        (r"2^{-99}x", r"2^{-98}x"),
        (r"\{2^{-99},1\}", r"\{2^{-98},1\}"),
        (r"\sqrt{2}\cdot 10^{-8}", "0.0000000141422"),
        ("0.33", r"\frac13"),
        (r"\frac13", "0.33"),
        # what math-verify reads a part of, or as a product
        ("1", "1 1/2"),
        ("0", "1 000"),
        ("156", "12 13"),
        ("0.36", "1.2.3"),
        ("5", "5!"),
        ("2", "2xy"),
        ("22", "2²"),
        # order and brackets
        ("(1,2)", "2,1"),
        ("(1,2)", "[1,2]"),
        ("6", "6, 7"),
        ("6", r"x \ne 6"),
    ],
)
def test_wrong_answers_in_a_box(gold, answer):
    assert grade(gold, box(answer)) == 0.0


@pytest.mark.parametrize(
    "gold, answer",
    [
        ("1000", r"1\,000"),
        ("1000", "1,000"),
        ("1000", "1 000"),
        ("10080", r"10{,}080"),
        ("12", "１２"),
        ("12", "١٢"),  # Arabic-Indic digits
        ("-3", "−3"),
        ("-3", "–3"),
        ("0.5", "½"),
        ("1 1/2", r"1\frac{1}{2}"),
        ("1.5", "1 1/2"),
        ("4", "2²"),
        (r"\sqrt{2}", "√2"),
        (r"2\pi", "2π"),
        ("2 pi", r"2\pi"),
        ("5000000", "5 million"),
        ("0.00001", "10^{-5}"),
        ("0.00001", "1e-05"),
        ("100000000000000000000", "10^{20}"),
        ("300000", r"3 \times 10^5"),
        (r"\frac{1}{3}", "0.333333"),
        ("0.333333", r"\frac13"),
        (r"\frac{1}{3000}", "0.000333333"),
        ("50%", "50"),
        ("50%", "0.5"),
        ("12.5", r"12.5\%"),
        ("$18", r"\$18.00"),
        ("18 kg", "18"),
        ("18", r"18 \text{ eggs}"),
        ("Paris", "paris"),
        ("New York", r"\text{New  York}"),
        ("A", "(A)"),
        ("A", r"\text{A}"),
        ("A and C", "C, A"),
        ("2xy", "2yx"),
        ("abc+1", "1+abc"),
        ("ab", r"a \cdot b"),
        ("x=5", "5"),
        (r"\infty", "infinity"),
        (r"\log_2 8", "3"),
        ("sin(30)", r"\sin(30)"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        # as math-verify, Qwen2.5-Math and DeepScaleR
        ("(1,2)", "1,2"),
        ("6", "5=6"),
        ("6", "x = 6"),
    ],
)
def test_right_answers_in_a_box(gold, answer):
    assert grade(gold, box(answer)) == 1.0


@pytest.mark.parametrize(
    "gold, value",
    [
        ("One and two make <<1+2=3>>3.\n#### 3", "3"),
        ("He pays $1,200.\n#### 1,200", "1200"),
        ("#### -18", "-18"),
        ("so \\boxed{18} #### 3", "18"),
        ("18.", "18"),
        ("= 18", "18"),
        ("Answer: 18", "18"),
        ("The final answer is $18$.", "18"),
        ("**18**", "18"),
        ("**Answer:** 18", "18"),
        ("`18`", "18"),
        ('"18"', "18"),
        ("<answer>18</answer>", "18"),
        (r"\(18\)", "18"),
        (r"\[ 18 \]", "18"),
        ("$$18$$", "18"),
        ("１８", "18"),
        ("1 1/2", "3/2"),
        (r"\text{18}", "18"),
    ],
)
def test_decorated_reference_answers(gold, value):
    assert grade(gold, box(value)) == 1.0
    assert grade(gold, f"it is {value}") == 1.0
    assert grade(gold, box(f"{value}1")) == 0.0


@pytest.mark.parametrize(
    "gold, reason",
    [
        ("18 eggs", "it is text with the word 'eggs'"),
        ("18 dollars", "it is text with the word 'dollars'"),
        ("18 or more", "it is text with the word 'more'"),
        ("18 (approximately)", "it is text with the word 'approximately'"),
        ("~18", "it is an approximation"),
        ("July 4", "it is text with the word 'July'"),
        ("3 hours 20 minutes", "it is text with the word 'hours'"),
        ("18个", "math-verify reads it as text"),
        ("12 13", "it has two numbers side by side"),
        ("1.2.3", "it is neither a number nor a formula"),
        ("0x1F", "it is neither a number nor a formula"),
        ("3–5", "it is neither a number nor a formula"),
        ("1.234,56", "a point in front of a comma"),
        ("One and two make 3.\nSo three.", "it is text in several lines with the word 'One'"),
        ("first\nsecond", "it is text in several lines"),
        ("#### Step\n then 5", "it is text in several lines with the word 'Step'"),
        ("nan", "it is not a finite number"),
        ("NaN", "it is not a finite number"),
        ("-inf", "it is not a finite number"),
        ("1/0", "it is not a finite number"),
        ("", "it is empty"),
        ("3 apples ####", "it is empty"),
    ],
)
def test_reference_answers_that_cannot_be_read(gold, reason):
    with pytest.raises(ValueError) as error:
        grade(gold, box("18"))
    message = str(error.value)
    assert message.startswith(f"math cannot read the answer {gold!r} of question 3: ") and reason in message
    assert message.endswith(r"give a number, a formula or words without digits, or mark it by \boxed{} or ####")


@pytest.mark.parametrize(
    "response, expected",
    [
        ("x = .5", ".5"),
        ("answer: −3", "-3"),
        ("answer: –3", "-3"),
        (r"the answer is \frac{3}{4}", r"\frac{3}{4}"),
        (r"So $\frac{3}{4}$.", r"\frac{3}{4}"),
        ("it is ½ of it", r"\frac{1}{2}"),
        ("1e5", "1e5"),
        ("about 1.5e-3.", "1.5e-3"),
        (r"1\,000 eggs", r"1\,000"),
        ("1 000 eggs", "1 000"),
        ("３/４", "3/4"),
        # whole, never a part
        ("2^10", "2^10"),
        ("3-5", "3-5"),
        ("3–5", "3–5"),
        ("so it is 2x + 3", "2x + 3"),
        ("it is 2x", "2x"),
        (r"we get 2\sqrt{3}", r"2\sqrt{3}"),
        (r"\log_2 8", r"\log_2 8"),
        ("the point is (1, 2)", "(1, 2)"),
        ("at 12:30", "12:30"),
        ("version 1.2.3", "1.2.3"),
        ("so x > 5", "x > 5"),
        ("|-5|", "|-5|"),
        ("f(5)", "f(5)"),
        ("5 million people", "5 million"),
        ("3 1/2 cups", "3 1/2"),
        # what surrounds it goes
        ("3 + 4 = 7 apples", "7"),
        ("The answer is **18**.", "18"),
        ("**-5**", "-5"),
        ("#### 18", "18"),
        ("<answer>5</answer>", "5"),
        ("18 (approximately)", "18"),
        ("it costs -$5!", "-5"),
        ("- 5 apples", "5"),
        ("x = - 5", "- 5"),
        ("| total | 5 |", "5"),
        ("1, 2 and 3", "3"),
        ("5kg", "5"),
        ("in 10km/h", "10"),
        ("I got a 5", "5"),
        ("x ≈ 3.14", "3.14"),
        ("1. First\n2. Second\n\nI hope it helps :)", "2"),
        # names are passed over; nothing where it cannot be said
        ("3 atoms of H2O", "3"),
        ("5 cases of COVID-19", "5"),
        ("Final answer - 5", None),
        ("it is < 5", None),
        ("no number", None),
        ("", None),
    ],
)
def test_the_last_expression(response, expected):
    assert final_answer(response) == expected


@pytest.mark.parametrize(
    "gold, response, expected",
    [
        ("0.5", "x = .5", 1.0),
        ("5", "x = .5", 0.0),
        ("-3", "answer: −3", 1.0),
        ("3", "answer: −3", 0.0),
        (r"\frac34", r"$\frac{3}{4}$", 1.0),
        ("4", r"the answer is \frac{3}{4}", 0.0),
        ("1e5", "1e5", 1.0),
        ("1024", "2^10", 1.0),
        ("10", "2^10", 0.0),
        ("-2", "3-5", 1.0),
        ("5", "3-5", 0.0),
        ("5", "x > 5", 0.0),
        ("2", "it is (1, 2)", 0.0),
        ("2", "it is 2x", 0.0),
    ],
)
def test_without_a_box(gold, response, expected):
    assert grade(gold, response) == expected


def test_numbers_are_fractions():
    """Numbers written in many ways, against Python's fractions."""
    draw = random.Random(3)
    for _ in range(300):
        value = Fraction(draw.randint(-(10**6), 10**6), draw.choice((1, 1, 3, 7, 10, 1000)))
        sign, size = "-" * (value < 0), abs(value)
        whole, rest = divmod(size, 1)
        written = [f"{value.numerator}/{value.denominator}", rf"{sign}\frac{{{size.numerator}}}{{{size.denominator}}}"]
        if rest and whole:
            written.append(f"{sign}{whole} {rest.numerator}/{rest.denominator}")
        if size.denominator == 1:
            written += [f"{int(value):,}", f"{int(value):,}".replace(",", r"\,"), f"{value}.0", f"{sign}${size}"]
        for text in written:
            assert read_numeral(text).value == value, text
        assert same_number(read_numeral(written[0]), read_numeral(written[1]))
    for digits in range(1, 30):
        small, double = read_numeral(f"1e-{digits}"), read_numeral(f"0.{'0' * (digits - 1)}2")
        assert not same_number(small, double) and same_number(small, small), digits


def test_equal_expressions_as_sympy_has_them():
    x = sympy.Symbol("x")
    for left, right in (((x + 1) ** 2, x**2 + 2 * x + 1), (sympy.sqrt(12), 2 * sympy.sqrt(3))):
        assert sympy.simplify(left - right) == 0
        assert grade(sympy.latex(left), box(sympy.latex(right))) == 1.0
        assert grade(sympy.latex(left), box(sympy.latex(right + 1))) == 0.0


def test_what_is_no_number():
    for text in ("", "x", "5 eggs", "1,00", "1.2.3", "--5", "1/0", "5-3", "9" * 500, "1e99999", "2\\frac{5}{2}"):
        assert read_numeral(text) is None, text


def test_words():
    assert read_words("Rome, Paris") == read_words("paris and rome") == ["paris", "rome"]
    assert read_words("A") == ["A"] and read_words("a") == ["a"]
    assert read_words("Don't know.") == ["don't know"]
    for text in ("x-y", "f(x)", "n!", "a/b", "18 eggs", r"\pi", ""):
        assert read_words(text) is None, text


def test_unicode_and_decorations():
    assert plain("x² − ½ × ４") == r"x^{2} - \frac{1}{2} \times  4"
    assert undecorated("**Answer:** `$18$`.") == "18"


def test_a_grading_is_quick():
    """Numbers and words do not wait for sympy; a hostile text takes no longer than a long one."""
    grade("18", "18")
    started = time.perf_counter()
    for i in range(200):
        grade(str(i), f"we add and get {i} eggs")
    assert (time.perf_counter() - started) / 200 < 0.005
    hostile = ("(" * 50_000 + "1", "1 " * 50_000, "-" * 50_000 + "1", "a1" * 50_000, "1," * 50_000, "9^" * 50_000 + "9")
    for text in (*hostile, "\\boxed{" * 2000 + "1"):
        started = time.perf_counter()
        grade("18", text)
        assert time.perf_counter() - started < 2, text[:10]
