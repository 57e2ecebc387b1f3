"""Answers and rewards: what was graded wrongly without a word, and rewards that can never work."""

import json


def write(path, *rows: dict):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_gsm8k_answers(work):
    rows = [{"question": "1+2", "answer": "One and two make <<1+2=3>>3.\n#### 3"}] * 4
    write(work / "gsm.jsonl", *rows)
    output = work.accepted("config", "base.yaml", "data.path=gsm.jsonl", "reward.function=math")
    assert r"math gives the first questions' own answers 1, 1, 1 as text and 1, 1, 1 in \boxed{}" in output
    write(work / "eggs.jsonl", *[{"question": "?", "answer": "18 eggs"}] * 3, {"question": "?", "answer": "18"})
    changes = ("data.path=eggs.jsonl", "reward.function=math", "train.steps=1")
    assert "math cannot read 3 of 4 answers of data.path=eggs.jsonl" in work.accepted("train", "base.yaml", *changes)
    errors = [json.loads(line) for line in (work / "runs/base/reward_errors.jsonl").read_text().splitlines()]
    assert len(errors) == 12 and "it is text with the word 'eggs'" in errors[0]["reward_error"]


def test_numbers_as_answers(work):
    write(work / "small.jsonl", *[{"question": "?", "answer": 0.00001}] * 4)
    output = work.accepted("config", "base.yaml", "data.path=small.jsonl", "reward.function=math")
    assert "own answers 1, 1, 1 as text and 1, 1, 1" in output
    (work / "nan.jsonl").write_text('{"question": "?", "answer": 1}\n{"question": "?", "answer": NaN}\n')
    for command in (
        ("config", "base.yaml", "data.path=nan.jsonl"),
        ("eval", "--model", "model", "--data", "nan.jsonl"),
    ):
        assert "nan.jsonl:2: `answer` is nan, not a finite number; give the right answer" in work.refused(*command)


def test_rewards_that_never_work(work):
    (work / "mine.py").write_text(
        "def alone(response):\n    return 1.0\n\n\n"
        "def needs_a_level(response, question):\n    return question.record['level']\n"
    )
    error = work.refused("train", "base.yaml", "reward.function=reasoning_gym")
    assert "scores questions of reasoning_gym:NAME only, not those of data.path=q.jsonl" in error
    error = work.refused("train", "base.yaml", "reward.function=math:sqrt")
    assert "cannot be called as f(response, question): it is f(x, /)" in error
    error = work.refused("config", "base.yaml", "reward.function=mine:alone")
    assert "cannot be called as f(response, question): it is f(response)" in error
    error = work.refused("train", "base.yaml", "reward.function=mine:needs_a_level", code=1)
    assert (
        "mine:needs_a_level failed on all 16 gradings (the first with KeyError: 'level') of the batch of step 1"
        in error
    )


def test_an_evaluation_whose_gradings_all_fail(work):
    (work / "mine.py").write_text("def bad(response, question):\n    return question.record['level']\n")
    model = ("eval", "--model", "model", "--data", "q.jsonl", "--samples", "1", "--max-tokens", "4")
    assert "not those of --data q.jsonl" in work.refused(*model, "--reward", "reasoning_gym")
    result = work.run(*model, "--reward", "mine:bad", "--output", "numbers.json")
    assert result.returncode == 1 and "grading errors" in result.stdout
    assert "error: --reward mine:bad failed on all 34 gradings (the first with KeyError: 'level')" in result.stderr
    assert json.loads((work / "numbers.json").read_text())["modes"]["normal"]["grading_errors"] == 17


def test_special_tokens_are_shown(work):
    """A tag that is a special token reaches the reward and the screen."""
    from transformers import AutoTokenizer

    model = work.copy_model("tagged")
    tokenizer = AutoTokenizer.from_pretrained(model)
    # The token "+" as a special one: the model writes it in nearly every response.
    tokenizer.add_special_tokens({"additional_special_tokens": ["+"]})
    tokenizer.save_pretrained(model)
    assert "+" in tokenizer.all_special_tokens
    (work / "mine.py").write_text("def plus(response, question):\n    return float('+' in response)\n")
    model = ("--model", "tagged", "--max-tokens", "8")
    assert "+" in work.accepted("generate", *model, "--samples", "4", "9")
    arguments = ("--data", "q.jsonl", "--samples", "2", "--reward", "mine:plus", "--output", "numbers.json")
    work.accepted("eval", *model, *arguments)
    assert json.loads((work / "numbers.json").read_text())["modes"]["normal"]["accuracy"] > 0.5
