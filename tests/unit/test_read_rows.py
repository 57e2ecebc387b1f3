"""Files of questions as other programs write them: what can be read is, and the rest is named."""

import datetime
import json
from decimal import Decimal

import numpy
import pyarrow
import pyarrow.parquet
import pytest

from megatron_policysplit.data.questions import QuestionStream, load_questions
from megatron_policysplit.data.read_rows import read_rows
from megatron_policysplit.errors import DataError

GOOD = {"question": "1+1?", "answer": "2"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome", "day": None}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CHAT = [
    {"role": "user", "content": "weather?", "name": "ann"},
    {"role": "assistant", "content": None, "reasoning_content": "I ask.", "tool_calls": [CALL]},
    {"role": "tool", "content": "21 C", "tool_call_id": "x", "name": None},
]


def jsonl(tmp_path, *rows):
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (tmp_path / "a.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    return str(tmp_path / "a.jsonl")


def parquet(tmp_path, table):
    if isinstance(table, dict):
        table = pyarrow.table(table)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    return str(tmp_path / "a.parquet")


def refusal(path):
    with pytest.raises(DataError) as raised:
        load_questions(path)
    return str(raised.value).replace(path, "FILE")


# --- files ------------------------------------------------------------------------------------------


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_the_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\r\n")
    (question,) = load_questions(str(tmp_path / "a.jsonl"))
    assert question.messages == [{"role": "user", "content": "1+1?"}] and question.answer == "2"


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"question": "caf\xe9", "answer": "2"}', "FILE:2 is not UTF-8 text (byte 18 of the line); save"),
        (
            b'{"a":' * 200_000 + b"1" + b"}" * 200_000,
            "FILE:2 is nested too deeply to be read, over 100 levels; flatten it",
        ),
        (
            b'{"question": "x", "answer": ' + b"1" * 5000 + b"}",
            "FILE:2 has a number that is too long; write it as text",
        ),
        (b'{"question": "x", "answer": "1", "answer": "2"}', "FILE:2 has the key `answer` twice; keep one"),
        (b"[", "write one object a line: jq -c '.[]' for a list"),
        (b"[1]", "FILE:2 is a JSON list; every line must be one JSON object"),
        (b"null", "FILE:2 is a JSON null; every line must be one JSON object"),
        (b"question,answer", "FILE:2 is not JSON (Expecting value"),
        (b"\0" * 64, "FILE:2 has NUL bytes, as a file that a crash cut has; restore the file"),
        (
            b'{"question": "x", "answer": "1", "z": ' + b"[" * 900 + b"]" * 900 + b"}",
            "FILE:2 is nested too deeply to be read, over 100 levels; flatten it",
        ),
    ],
    ids=lambda value: value[:30].decode(errors="replace") if isinstance(value, bytes) else None,
)
def test_a_line_that_cannot_be_read_is_named(tmp_path, line, message):
    assert message in refusal(jsonl(tmp_path, GOOD, line))


def test_files_of_other_kinds_say_what_to_do(tmp_path):
    import gzip

    (tmp_path / "a.jsonl").write_bytes(gzip.compress(json.dumps(GOOD).encode()))
    assert refusal(str(tmp_path / "a.jsonl")) == "FILE is compressed; decompress it"
    (tmp_path / "a.jsonl.gz").write_bytes(b"")
    assert "a.jsonl.gz is neither .jsonl nor .parquet nor reasoning_gym:NAME; decompress it" in refusal(
        str(tmp_path / "a.jsonl.gz")
    ).replace("FILE", "a.jsonl.gz")
    (tmp_path / "a.json").write_text(json.dumps([GOOD]))
    assert "jq -c '.[]' FILE > FILE.jsonl" in refusal(str(tmp_path / "a.json"))
    (tmp_path / "set").mkdir()
    assert refusal(str(tmp_path / "set")) == "FILE is a directory; give a file in it, a .jsonl or .parquet file"
    (tmp_path / "set" / "train-0.parquet").touch()
    assert refusal(str(tmp_path / "set")).endswith("give a file in it, such as train-0.parquet")
    assert "is not a readable Parquet file" in refusal(str(tmp_path / "set" / "train-0.parquet"))


@pytest.mark.parametrize(
    "name, content, remedy",
    [
        ("a.jsonl", json.dumps(GOOD).encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
        ("a.jsonl", b"PAR1\x15\x04", "is a Parquet file; call it .parquet"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid", "is a pointer of Git LFS, not the data"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid", "is a pointer of Git LFS, not the data"),
        ("a.parquet", b"PARE\x15\x04", "is encrypted; decrypt it"),
    ],
)
def test_a_file_under_the_name_of_another_kind_says_what_it_is(tmp_path, name, content, remedy):
    (tmp_path / name).write_bytes(content)
    assert f"FILE {remedy}" in refusal(str(tmp_path / name))


def test_paths_that_name_no_file(tmp_path):
    assert "cannot be read (File name too long); check the path" in refusal(str(tmp_path / ("x" * 300 + ".jsonl")))
    with pytest.raises(DataError, match="the path of the questions is empty; give a .jsonl or .parquet file"):
        load_questions("")


def test_capital_suffixes_and_joined_files(tmp_path):
    line = json.dumps(GOOD).encode()
    (tmp_path / "a.JSONL").write_bytes(b"\xef\xbb\xbf" + line + b"\n\xef\xbb\xbf" + line)
    assert len(load_questions(str(tmp_path / "a.JSONL"))) == 2


def test_rows_of_a_hundred_levels_are_read(tmp_path):
    inner = b"[" * 99 + b"]" * 99
    (question,) = load_questions(jsonl(tmp_path, b'{"question": "x", "answer": "1", "z": ' + inner + b"}"))
    assert json.dumps(question.record["z"]).encode() == inner
    assert "nested too deeply" in refusal(jsonl(tmp_path, b'{"question": "x", "answer": "1", "z": [' + inner + b"]}"))
    many = {"question": "[" * 500, "answer": "1", "z": [{"a": []}] * 500}
    assert load_questions(jsonl(tmp_path, many))[0].record == many


def test_a_file_without_permission_is_named(tmp_path, monkeypatch):
    path = jsonl(tmp_path, GOOD)
    monkeypatch.setattr(
        "pathlib.Path.open", lambda *args, **kwargs: (_ for _ in ()).throw(PermissionError(13, "denied"))
    )
    assert refusal(path) == "FILE cannot be read (denied); check the path and its permissions"


@pytest.mark.parametrize("path", ["reasoning_gym:", "reasoning_gym", "Reasoning_Gym:chain_sum"])
def test_a_task_of_reasoning_gym_must_be_named(path):
    with pytest.raises(DataError, match="names no task; write reasoning_gym:NAME, such as reasoning_gym:chain_sum"):
        load_questions(path)


# --- Parquet ----------------------------------------------------------------------------------------


def test_a_column_that_python_cannot_hold_is_named(tmp_path):
    table = {"question": ["x", "y"], "answer": ["1", "2"], "at": pyarrow.array([1, 2], pyarrow.timestamp("ns"))}
    assert "FILE: the column `at` of type timestamp[ns] cannot be read in rows 1 to 2" in refusal(
        parquet(tmp_path, table)
    )
    broken = pyarrow.Array.from_buffers(
        pyarrow.string(),
        1,
        [None, pyarrow.py_buffer(numpy.array([0, 2], "int32").tobytes()), pyarrow.py_buffer(b"\xff\xfe")],
    )
    message = refusal(parquet(tmp_path, {"question": broken, "answer": ["1"]}))
    assert message.startswith("FILE: the column `question` of type string cannot be read in rows 1 to 1 (")
    assert message.endswith("repair the column, store it as text or drop it")
    mars = {"question": ["x"], "answer": ["1"], "at": pyarrow.array([1], pyarrow.timestamp("us", tz="Mars/Phobos"))}
    assert "FILE: the column `at` of type timestamp[us, tz=Mars/Phobos] cannot be read" in refusal(
        parquet(tmp_path, mars)
    )
    seconds = {"question": ["x"], "answer": ["1"], "at": [datetime.datetime(2026, 1, 2, 3, 4, 5)]}
    (question,) = load_questions(parquet(tmp_path, seconds))
    assert question.record["at"] == datetime.datetime(2026, 1, 2, 3, 4, 5)


def test_a_damaged_page_is_not_a_missing_file(tmp_path):
    path = parquet(tmp_path, {"question": ["x"], "answer": ["1"]})
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[20:40] = b"\xff" * 20
    (tmp_path / "a.parquet").write_bytes(content)
    assert refusal(path).startswith("FILE is not a readable Parquet file (") and refusal(path).endswith("; restore it")


def test_narrow_floats_are_their_shortest_decimals(tmp_path):
    table = {
        "question": ["x", "x", "x"],
        "answer": pyarrow.array([0.1, None, 3.0e-5], pyarrow.float32()),
        "half": pyarrow.array(numpy.array([0.1, 1.0, 2.5], "float16")),
    }
    rows = [row for _, row in read_rows(parquet(tmp_path, table))]
    assert [row["answer"] for row in rows] == [0.1, None, 3.0e-5]
    assert [row["half"] for row in rows] == [0.1, 1.0, 2.5]


def test_columns_of_other_layouts(tmp_path):
    table = {
        "question": pyarrow.array(["x", "y"]).dictionary_encode(),
        "answer": pyarrow.array([Decimal("2.50"), Decimal("1E+3")], pyarrow.decimal128(8, 2)),
        "text": pyarrow.array(["a", "b"], pyarrow.large_string()),
    }
    loaded = load_questions(parquet(tmp_path, table))
    assert [question.messages[0]["content"] for question in loaded] == ["x", "y"]
    assert [float(question.answer) for question in loaded] == [2.5, 1000.0]
    assert loaded[0].record["text"] == "a"
    twice = pyarrow.table([["x"], ["y"], ["1"]], names=["question", "question", "answer"])
    assert refusal(parquet(tmp_path, twice)) == "FILE has two columns `question`; rename one"


# --- messages ---------------------------------------------------------------------------------------


def test_what_a_template_reads_of_messages_is_kept(tmp_path):
    row = {"messages": CHAT, "tools": [TOOL], "answer": "21"}
    (question,) = load_questions(jsonl(tmp_path, row))
    assert question.messages == [
        {"role": "user", "content": "weather?", "name": "ann"},
        {"role": "assistant", "content": "", "reasoning_content": "I ask.", "tool_calls": [CALL]},
        {"role": "tool", "content": "21 C", "tool_call_id": "x"},
    ]
    assert question.tools == [TOOL]
    without_null = json.loads(json.dumps(CALL))
    del without_null["function"]["arguments"]["day"]
    (columnar,) = load_questions(parquet(tmp_path, pyarrow.Table.from_pylist([row])))
    assert columnar.messages[1]["tool_calls"] == [without_null]
    assert columnar.messages[::2] == question.messages[::2]


def test_a_resumed_run_knows_its_messages_and_tools_again(tmp_path):
    def fingerprint(row):
        return QuestionStream(load_questions(jsonl(tmp_path, row)), 1, 0).state()["fingerprint"]

    row = {"messages": CHAT, "tools": [TOOL], "answer": "21"}
    changed = {**CHAT[0], "name": "bob"}
    rows = [row, {**row, "tools": []}, {**row, "messages": [changed, *CHAT[1:]]}]
    assert len({fingerprint(row) for row in rows}) == 3 and fingerprint(row) == fingerprint(row)


@pytest.mark.parametrize(
    "row, message",
    [
        (
            {"messages": [{"role": "user", "content": "x", "images": ["a.png"]}]},
            "with the key `images`, which would be lost",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "tool_call": {}}]},
            "with the key `tool_call`, which would be lost",
        ),
        ({"messages": [{"role": "user", "content": None}]}, "whose content is not text; only text is supported"),
        ({"messages": [CHAT[0], {**CHAT[1], "tool_calls": "weather()"}, CHAT[2]]}, "whose `tool_calls` is not a list"),
        ({"messages": [{"role": "system", "content": "Be brief."}]}, "`messages` has no message of the user"),
        (
            {"messages": [{"role": "developer", "content": "x"}]},
            "without a role of system, user, assistant, tool; its role is 'developer'",
        ),
        ({"messages": [{"from": "human", "value": "x"}]}, "call its `from` role, with human as user and gpt as"),
        ({"messages": [{"text": "x"}]}, "assistant, tool; its keys are text"),
        ({"messages": ["x"]}, "assistant, tool; it is text"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "only text is supported, and it is a list"),
        ({"messages": [{"role": "user", "content": "x", "name": 3}]}, "whose `name` is a number; it must be text"),
        (
            {"messages": [CHAT[0], {**CHAT[1], "reasoning_content": ["a"]}, CHAT[2]]},
            "whose `reasoning_content` is a list; it must be text",
        ),
        ({"prompt": {"role": "user", "content": "x"}}, "neither text nor a list of messages but an object"),
        ({"prompt": []}, "neither text nor a list of messages but an empty list"),
        ({"prompt": str(CHAT)}, "`prompt` is a list of messages written as text; store the list itself"),
        ({"prompt": json.dumps(CHAT[0])}, "`prompt` is a list of messages written as text"),
        ({"prompt": "\ufeff" + json.dumps(CHAT)}, "`prompt` is a list of messages written as text"),
        ({"prompt": "<image> what?", "images": ["a.png"]}, "`images` is not empty, and only text is supported"),
        ({"prompt": "what?", "videos": [{"path": "a.mp4"}]}, "`videos` is not empty, and only text is supported"),
        ({"question": "x", "system": "Be brief."}, "`system` would not reach the model; put it first in `messages`"),
        ({"question": "x", "system_prompt": "Be brief."}, "`system_prompt` would not reach the model"),
        ({"question": ""}, "`question` is empty; write the question or remove the row"),
        ({"question": " \n\t"}, "`question` is empty; write the question or remove the row"),
        ({"prompt": json.dumps(CHAT)}, "`prompt` is a list of messages written as text; store the list itself"),
        ({"prompt": "x", "tools": json.dumps([TOOL])}, "`tools` is text; it must be a list of function schemas"),
        ({"prompt": "x", "tools": ["weather"]}, "`tools` is a list; it must be a list of function schemas"),
        ({"question": None}, "`question` is null; write the question or remove the row"),
        ({"question": "x", "reward_model": '{"ground_truth": "2"}'}, "`reward_model` is text; it must be a mapping"),
        ({"question": "1+2 \ud83d"}, "`question` has half of a character (U+D83D at position 5)"),
        (
            {"messages": [CHAT[0], {**CHAT[1], "reasoning_content": "\udc00"}, CHAT[2]]},
            "`messages` has half of a character",
        ),
        ({"question": "x", "tools": [{"name": "\ud83d"}]}, "`tools` has half of a character"),
    ],
)
def test_a_row_that_would_train_something_else_is_refused(tmp_path, row, message):
    error = refusal(jsonl(tmp_path, GOOD, {"answer": "2"} | row))
    assert error.startswith("FILE:2: ") and message in error


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2, 3]: what is the sum?",
        "[[1, 2], [3, 4]]",
        '[{"x": 1}]',
        "[",
        "x" * 100_000,
        "{'role': 'admin'} is a dict of Python; what is its length?",
        '{"role": "admin"}',
    ],
)
def test_a_question_that_only_looks_like_json_is_a_question(tmp_path, text):
    (question,) = load_questions(jsonl(tmp_path, {"question": text, "answer": "2"}))
    assert question.messages == [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    "row",
    [
        {"question": "x", "images": [], "system": None, "system_prompt": " "},
        {"question": "x", "images": "ubuntu:24.04", "system": 3},
        {"messages": [{"role": "system", "content": "Be brief."}, CHAT[0]], "system": "Be brief."},
    ],
)
def test_columns_that_nothing_is_lost_with(tmp_path, row):
    (question,) = load_questions(jsonl(tmp_path, {**row, "answer": "2"}))
    assert question.record == {**row, "answer": "2"}


def test_half_of_a_character_elsewhere_does_no_harm(tmp_path):
    (question,) = load_questions(jsonl(tmp_path, {"question": "x\u0000y", "answer": "\ud83d", "note": "\udc00"}))
    assert question.answer == "\ud83d" and question.record["note"] == "\udc00"
    QuestionStream([question], 1, 0)
