"""Reference answers of rows: numbers as decimals, what is refused with its file and line."""

import json
from decimal import Decimal

import numpy
import pyarrow
import pyarrow.parquet
import pytest

from megatron_policysplit.data.questions import load_questions
from megatron_policysplit.errors import DataError
from megatron_policysplit.rewards import load_reward


def answers(path) -> list[str | None]:
    return [question.answer for question in load_questions(str(path))]


def write(path, *values: str):
    path.write_text("".join(f'{{"question": "?", "answer": {value}}}\n' for value in values))
    return path


def test_numbers_in_json(tmp_path):
    written = {
        "0.00001": "0.00001",
        "1e-05": "0.00001",
        "1e20": "100000000000000000000",
        "123456789012345678901234567890": "123456789012345678901234567890",
        "18.0": "18",
        "2.50": "2.5",
        "-0.0": "0",
        "0.1": "0.1",
        "1e23": "1" + 23 * "0",
        "null": None,
        '"007"': "007",
        '"1e-05"': "1e-05",
    }
    assert answers(write(tmp_path / "q.jsonl", *written)) == list(written.values())
    math = load_reward("math")
    small = load_questions(str(tmp_path / "q.jsonl"))[0]
    for response in (r"\boxed{0.00001}", r"\boxed{10^{-5}}", r"\boxed{1e-05}"):
        assert math(response, small) == 1.0
    (tmp_path / "nested.jsonl").write_text(json.dumps({"prompt": "?", "reward_model": {"ground_truth": 1e-7}}))
    assert answers(tmp_path / "nested.jsonl") == ["0.0000001"]


@pytest.mark.parametrize(
    "value, said",
    [("NaN", "nan"), ("Infinity", "inf"), ("-Infinity", "-inf"), ("1e400", "inf")],
)
def test_what_is_not_finite_is_refused(tmp_path, value, said):
    path = write(tmp_path / "q.jsonl", "1", value)
    with pytest.raises(DataError) as error:
        answers(path)
    assert str(error.value) == (
        f"{path}:2: `answer` is {said}, not a finite number; give the right answer, or null where the task has many"
    )


@pytest.mark.parametrize("kind", ["float16", "float32", "float64"])
@pytest.mark.parametrize("nested", [False, True])
def test_float_columns(tmp_path, kind, nested):
    """The decimals that were written, where pyarrow makes 0.10000000149011612 of them."""
    decimals = ["0.1", "0.00001", "18", "-2.5", "0.333"]
    column = pyarrow.array(numpy.array([float(text) for text in decimals], dtype=kind))
    if nested:
        column = pyarrow.StructArray.from_arrays([column], ["ground_truth"])
    name = "reward_model" if nested else "answer"
    path = tmp_path / "q.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"question": ["?"] * 5, name: column}), path)
    assert answers(path) == decimals
    for text, answer in zip(decimals, answers(path), strict=True):
        assert numpy.dtype(kind).type(answer) == numpy.dtype(kind).type(text)


def test_other_columns(tmp_path):
    path = tmp_path / "q.parquet"

    def write_column(*values, kind=None):
        table = pyarrow.table({"question": ["?"] * len(values), "answer": pyarrow.array(values, type=kind)})
        pyarrow.parquet.write_table(table, path)
        return path

    # What pandas makes of integers of which one is missing.
    assert answers(write_column(18.0, None, 3.0)) == ["18", None, "3"]
    exact = load_reward("exact")
    assert exact("18", load_questions(str(path))[0]) == 1.0
    assert answers(write_column(Decimal("18.00"), Decimal("0.10"))) == ["18", "0.1"]
    assert answers(write_column(2**60)) == [str(2**60)]
    with pytest.raises(DataError, match="row 2: `answer` is nan, not a finite number"):
        answers(write_column(1.5, float("nan"), kind=pyarrow.float32()))
