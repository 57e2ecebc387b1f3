import json

import pyarrow
import pyarrow.parquet
import pytest

from megatron_policysplit.data.questions import Question, QuestionStream, drop_overlong, load_questions
from megatron_policysplit.errors import CheckpointError, DataError
from megatron_policysplit.rows import Mode

VERL = {
    "data_source": "gsm8k",
    "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}],
    "reward_model": {"style": "rule", "ground_truth": "4"},
    "extra_info": {"index": 7},
}
NEEDED = "needed are `prompt` .* or `messages` or `question`, and for the answer `reward_model` or `answer`"


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def questions(count):
    return [Question(index, [{"role": "user", "content": f"q{index}"}], "a", {}) for index in range(count)]


def ids(batch):
    return [question.id for question in batch]


def test_jsonl(tmp_path):
    user = [{"role": "user", "content": "1+1?"}]
    path = write(
        tmp_path / "a.jsonl",
        VERL,
        {"question": "1+1?", "answer": 2, "level": "easy"},
        "",
        {"messages": user, "answer": "2"},
        {"prompt": "1+1?", "answer": None},
        {"prompt": "1+1?", "reward_model": {"ground_truth": 2.5}},
    )
    loaded = load_questions(path)
    assert ids(loaded) == [0, 1, 2, 3, 4]
    assert loaded[0].messages == VERL["prompt"]
    assert [question.answer for question in loaded] == ["4", "2", "2", None, "2.5"]
    assert loaded[0].record == VERL
    assert loaded[1].record["level"] == "easy"
    assert all(question.messages == user for question in loaded[1:])


def test_parquet_equals_jsonl(tmp_path):
    rows = [VERL, {**VERL, "reward_model": {"style": "rule", "ground_truth": "5"}}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert load_questions(str(tmp_path / "a.parquet")) == load_questions(write(tmp_path / "a.jsonl", *rows))


def test_utf8(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"question": "π ≈ ?", "answer": "3,14…"}'.encode())
    assert load_questions(str(tmp_path / "a.jsonl"))[0].messages[0]["content"] == "π ≈ ?"


@pytest.mark.parametrize(
    "row, message",
    [
        ("{", r"a.jsonl:2 is not JSON"),
        ('"text"', r"a.jsonl:2 is a JSON text; every line must be one JSON object"),
        ({"query": "1+1?", "answer": "2"}, "a.jsonl:2 has the columns answer, query; " + NEEDED),
        ({"question": "1+1?"}, "a.jsonl:2 has the columns question; " + NEEDED),
        ({}, r"a.jsonl:2 has the columns \(none\)"),
        ({"question": None, "answer": "2"}, "a.jsonl:2: `question` is null; write the question or remove the row"),
        ({"prompt": 3, "answer": "2"}, "a.jsonl:2: `prompt` is neither text nor a list of messages"),
        ({"prompt": [], "answer": "2"}, "a.jsonl:2: `prompt` is neither text nor"),
        ({"prompt": ["x"], "answer": "2"}, "a.jsonl:2: `prompt` has a message without a role"),
        ({"prompt": [{"role": "boss", "content": "x"}], "answer": "2"}, "has a message without a role of system"),
        ({"prompt": [{"role": "user", "content": [{}]}], "answer": "2"}, "whose content is not text"),
        ({"messages": [{"role": "assistant", "content": "x"}], "answer": "2"}, "ends with an assistant message"),
        ({"prompt": "x", "reward_model": {"style": "rule"}}, "a.jsonl:2: `reward_model` has no `ground_truth`"),
        ({"prompt": "x", "answer": ["2"]}, "a.jsonl:2: `answer` is a list; it must be text or a number"),
    ],
)
def test_bad_row_is_named(tmp_path, row, message):
    path = write(tmp_path / "a.jsonl", {"question": "1+1?", "answer": "2"}, row)
    with pytest.raises(DataError, match=message):
        load_questions(path)


def test_bad_parquet_row_is_named(tmp_path):
    table = pyarrow.Table.from_pylist([{"question": "a", "answer": "b"}, {"question": None, "answer": "b"}])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet row 2: `question` is null"):
        load_questions(str(tmp_path / "a.parquet"))


def test_bad_files(tmp_path):
    with pytest.raises(DataError, match="missing.jsonl does not exist"):
        load_questions(str(tmp_path / "missing.jsonl"))
    with pytest.raises(DataError, match="a.csv is neither .jsonl nor .parquet nor reasoning_gym:NAME"):
        load_questions(str(tmp_path / "a.csv"))
    with pytest.raises(DataError, match="empty.jsonl holds no questions"):
        load_questions(write(tmp_path / "empty.jsonl", ""))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(DataError, match="broken.parquet is not a readable Parquet file"):
        load_questions(str(tmp_path / "broken.parquet"))
    with pytest.raises(DataError, match="a.jsonl takes no options, but size given"):
        load_questions(write(tmp_path / "a.jsonl", VERL), {"size": 3})


def test_reasoning_gym():
    import reasoning_gym

    loaded = load_questions("reasoning_gym:chain_sum", {"size": 4, "max_terms": 2})
    reference = reasoning_gym.create_dataset("chain_sum", size=4, seed=0, max_terms=2)
    assert ids(loaded) == [0, 1, 2, 3]
    for question, entry in zip(loaded, reference, strict=True):
        assert question.messages == [{"role": "user", "content": entry["question"]}]
        assert question.answer == entry["answer"]
        assert reference.score_answer(question.answer, question.record) == 1.0
    other = load_questions("reasoning_gym:chain_sum", {"size": 4, "max_terms": 2, "seed": 9})
    assert other[0].messages != loaded[0].messages
    assert len(load_questions("reasoning_gym:chain_sum")) == 500


def test_reasoning_gym_errors():
    with pytest.raises(DataError, match="reasoning_gym:chain_sums is not a task .* did you mean chain_sum"):
        load_questions("reasoning_gym:chain_sums")
    with pytest.raises(DataError, match="does not take the options .*terms"):
        load_questions("reasoning_gym:chain_sum", {"terms": 2})
    with pytest.raises(DataError, match="does not take the options .*size must be positive"):
        load_questions("reasoning_gym:chain_sum", {"size": 0})


@pytest.mark.parametrize("count, batch", [(7, 3), (5, 5), (4, 6), (10, 7), (3, 8), (1, 4), (6, 4), (8, 2)])
def test_stream_loses_and_doubles_nothing(count, batch):
    stream = QuestionStream(questions(count), batch, seed=1)
    drawn = []
    for _ in range(4 * count):
        new = ids(stream.next_batch())
        assert len(new) == batch
        assert batch > count or len(set(new)) == batch
        drawn += new
    epochs = [drawn[start : start + count] for start in range(0, len(drawn) - count + 1, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert count < 5 or len({tuple(epoch) for epoch in epochs}) > 1


@pytest.mark.parametrize("count, batch", [(7, 3), (5, 5), (4, 6), (10, 7), (3, 8)])
def test_stream_resumes_anywhere(count, batch):
    stream = QuestionStream(questions(count), batch, seed=2)
    states, batches = [], []
    for _ in range(20):
        states.append(json.loads(json.dumps(stream.state())))
        batches.append(ids(stream.next_batch()))
    for start in range(20):
        resumed = QuestionStream(questions(count), batch, seed=2)
        resumed.restore(states[start])
        assert [ids(resumed.next_batch()) for _ in batches[start:]] == batches[start:]


def test_stream_order_depends_on_the_seed():
    first, again, other = (QuestionStream(questions(20), 20, seed) for seed in (0, 0, 1))
    order = ids(first.next_batch())
    assert order == ids(again.next_batch()) != list(range(20))
    assert order != ids(other.next_batch())


def test_stream_refuses_another_data_set():
    state = QuestionStream(questions(7), 3, seed=1).state()
    with pytest.raises(CheckpointError, match="made with questions=7 but the data now has questions=8"):
        QuestionStream(questions(8), 3, seed=1).restore(state)
    with pytest.raises(CheckpointError, match="made with batch_questions=3 but the data now has batch_questions=2"):
        QuestionStream(questions(7), 2, seed=1).restore(state)
    with pytest.raises(CheckpointError, match="made with seed=1"):
        QuestionStream(questions(7), 3, seed=2).restore(state)
    changed = [*questions(6), Question(6, [{"role": "user", "content": "new"}], "a", {})]
    with pytest.raises(CheckpointError, match="fingerprint"):
        QuestionStream(changed, 3, seed=1).restore(state)
    with pytest.raises(CheckpointError, match="lacks `epoch`"):
        QuestionStream(questions(7), 3, seed=1).restore({"position": 1})
    with pytest.raises(CheckpointError, match="is damaged: epoch 0, position 9"):
        QuestionStream(questions(7), 3, seed=1).restore({**state, "position": 9})
    with pytest.raises(DataError, match="no questions to train on"):
        QuestionStream([], 3, seed=1)


def test_drop_overlong_measures_the_longer_mode():
    lengths = {index: {Mode.NORMAL: 5 + index, Mode.HIGH_ENTROPY: 10 + index} for index in range(3)}
    lengths[1] = {Mode.NORMAL: 20, Mode.HIGH_ENTROPY: 6}
    kept, dropped = drop_overlong(questions(3), lengths, 12)
    assert (ids(kept), dropped) == ([0, 2], 1)
    assert drop_overlong(questions(3), lengths, 11)[1] == 2
    with pytest.raises(DataError, match="data.max_prompt_tokens=9 drops all 3 questions; the shortest needs 10"):
        drop_overlong(questions(3), lengths, 9)
