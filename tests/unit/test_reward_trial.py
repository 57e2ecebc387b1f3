"""A reward tried before a run, rewards that can never work, and the text that rewards see."""

import json
import sys

import pytest

from megatron_policysplit.data.questions import Question, load_questions
from megatron_policysplit.data.response_text import end_token_ids, response_text
from megatron_policysplit.errors import ConfigError, DataError, TrainingError
from megatron_policysplit.rewards import Graded, all_failed, load_reward
from megatron_policysplit.rewards.trial import OwnAnswer, RewardTrial, try_reward
from megatron_policysplit.rows import Mode, Rollout
from megatron_policysplit.training.grading_check import GradingCheck
from tests.support.toy_chat import make_chat_model


def tried(function, seconds, path, data) -> RewardTrial:
    """The trial of one set of questions."""
    (trial,) = try_reward(function, seconds, {path: data})
    return trial


MINE = """
import time

def alone(response):
    return 1.0

def four(data_source, solution, truth, extra):
    return 1.0

async def later(response, question):
    return 1.0

def lines(response, question):
    yield 1.0

def needs_a_level(response, question):
    return question.record["level"]

def hangs(response, question):
    time.sleep(100)

class Scorer:
    def __call__(self, response, question, scale=1.0):
        return scale * len(response)

scorer = Scorer()
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "trial_rewards.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("trial_rewards", None)
    while str(tmp_path) in sys.path:
        sys.path.remove(str(tmp_path))


def questions(*answers):
    return [Question(id, [{"role": "user", "content": "?"}], answer, {}) for id, answer in enumerate(answers)]


def test_own_answers_are_graded(mine):
    trial = tried("exact", 5.0, "data.path=q.jsonl", questions(None, "a", "b b", "c", "d"))
    assert trial.line() == "exact gives the first questions' own answers 1, 1, 1 as text"
    assert [own.question for own in trial.own_answers] == [1, 2, 3] and trial.warnings() == []
    trial = tried("trial_rewards:scorer", 5.0, "data.path=q.jsonl", questions("a", "bb"))
    assert trial.line() == (
        r"trial_rewards:scorer gives the first questions' own answers 1, 2 as text and 9, 10 in \boxed{}"
    )
    assert tried("trial_rewards:scorer", 5.0, "p", questions(None)).line() == (
        "trial_rewards:scorer (no question has an answer to try it on)"
    )


def test_gsm8k_answers_are_right():
    trial = tried("math", 5.0, "p", questions("1+2 is <<1+2=3>>3.\n#### 3", "2+2 is 4.\n#### 4"))
    assert trial.line() == r"math gives the first questions' own answers 1, 1 as text and 1, 1 in \boxed{}"
    assert trial.warnings() == []


def test_answers_that_math_reads_as_text_are_counted_and_named():
    data = questions("18 eggs", "Paris", r"\sqrt{2}", "18个", "3", "Yes", "A", "No")
    trial = tried("math", 5.0, "data.path=q.jsonl", data)
    assert trial.unreadable == [(0, "18 eggs"), (3, "18个")]
    unreadable, text = trial.warnings()
    assert unreadable == (
        "reward.function=math cannot read 2 of 8 answers of data.path=q.jsonl, whose responses all get 0 and a grading "
        "error: question 0: '18 eggs', question 3: '18个'; give a number, a formula or words without digits, or mark "
        r"it by \boxed{} or ####"
    )
    assert text == (
        "reward.function=math compares 4 of 8 answers of data.path=q.jsonl as plain text: question 1: 'Paris', "
        "question 5: 'Yes', question 6: 'A', ..."
    )


def test_answers_of_which_math_reads_none_are_refused():
    with pytest.raises(DataError) as error:
        tried("math", 5.0, "data.path=q.jsonl", questions("18 eggs", None, "about 18"))
    assert str(error.value) == (
        "reward.function=math can read none of the 2 answers of data.path=q.jsonl: question 0: '18 eggs', question 2: "
        r"'about 18'; give a number, a formula or words without digits, or mark it by \boxed{} or ####"
    )


def test_what_a_failing_reward_says(mine):
    failing = {"needs_a_level": "KeyError: 'level'", "hangs": "no result within the time limit of 0.5 s"}
    for name, error in failing.items():
        trial = tried(f"trial_rewards:{name}", 0.5, "data.path=q.jsonl", questions("a"))
        assert trial.line().endswith(r"own answers error as text and error in \boxed{}")
        assert trial.warnings() == [
            f"reward.function=trial_rewards:{name} fails on 2 of 2 own answers of data.path=q.jsonl, first on question "
            f"0: {error}"
        ]
    partly = [OwnAnswer(0, "a", False, Graded(0.5)), OwnAnswer(0, "b", True, Graded(0.0, "why"))]
    assert "fails on 1 of 2 own answers" in RewardTrial("f", "p", 1, partly).warnings()[0]


@pytest.mark.parametrize(
    "function, message",
    [
        ("math:sqrt", "cannot be called as f(response, question): it is f(x, /)"),
        ("trial_rewards:alone", "cannot be called as f(response, question): it is f(response)"),
        ("trial_rewards:four", "it is f(data_source, solution, truth, extra)"),
        ("trial_rewards:later", "returns no number when it is called, because it is async or a generator"),
        ("trial_rewards:lines", "returns no number when it is called, because it is async or a generator"),
    ],
)
def test_functions_that_can_never_work(mine, function, message):
    with pytest.raises(ConfigError) as error:
        load_reward(function)
    assert str(error.value).startswith(f"reward.function={function} ") and message in str(error.value)


def test_built_in_rewards_on_the_wrong_data():
    with pytest.raises(ConfigError) as error:
        tried("reasoning_gym", 5.0, "data.path=q.jsonl", questions("3"))
    assert str(error.value) == (
        "reward.function=reasoning_gym scores questions of reasoning_gym:NAME only, not those of data.path=q.jsonl; "
        "use math, exact or a function of your own"
    )
    for function in ("math", "exact"):
        with pytest.raises(ConfigError, match=f"reward.function={function} needs answers, and no question of p has"):
            tried(function, 5.0, "p", questions(None, None))
    sums = load_questions("reasoning_gym:chain_sum", {"size": 3})
    assert tried("reasoning_gym", 5.0, "p", sums).line().endswith("own answers 1, 1, 1 as text")


class Alone:
    """A layout of one rank."""

    calls = 0

    def broadcast_from_chief(self, value):
        self.calls += 1
        return value


def rollouts(*errors):
    return [
        Rollout(0, 0, Mode.NORMAL, i, [5], [-1.0], "stop", [(0, 0)], reward=0.0, reward_error=error)
        for i, error in enumerate(errors)
    ]


def test_a_first_batch_whose_gradings_all_fail_stops_the_run():
    layout = Alone()
    with pytest.raises(TrainingError) as error:
        GradingCheck(layout, "mine:f").check(rollouts("ValueError: no", "TypeError: x"), "the batch of step 1")
    assert str(error.value) == (
        "reward.function=mine:f failed on all 2 gradings (the first with ValueError: no) of the batch of step 1; "
        "nothing was trained on them; mend the function, or the data it needs"
    )
    check = GradingCheck(layout, "mine:f")
    check.check(rollouts("ValueError: no", None), "the batch of step 1")
    check.check(rollouts("ValueError: no", "ValueError: no"), "the batch of step 2")  # it has worked
    assert layout.calls == 2
    assert all_failed([]) is None and all_failed([None, "x"]) is None


def test_special_tokens_reach_the_reward(tmp_path):
    """Only stop tokens and padding at the end go; the text is what the tokens are, without added spaces."""
    from transformers import AutoTokenizer

    directory = make_chat_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<answer>", "</answer>"]})
    opening, closing = tokenizer.convert_tokens_to_ids(["<answer>", "</answer>"])
    ends = end_token_ids(directory, tokenizer)
    assert tokenizer.eos_token_id in ends and opening not in ends
    words = tokenizer("two and two", add_special_tokens=False).input_ids
    four = tokenizer("4", add_special_tokens=False).input_ids
    stop, padding = tokenizer.eos_token_id, tokenizer.pad_token_id
    padding = stop if padding is None else padding
    text = tokenizer.decode(words) + "<answer>" + tokenizer.decode(four) + "</answer>"
    tokens = [*words, opening, *four, closing]
    for tail in ([], [stop], [stop, padding, padding]):
        assert response_text(tokenizer, [*tokens, *tail], ends) == text
    # A stop token inside stays, and so does what is special at the end but ends nothing.
    assert response_text(tokenizer, [*four, stop, *four, stop], ends) == (
        tokenizer.decode(four) + tokenizer.decode([stop]) + tokenizer.decode(four)
    )
    assert response_text(tokenizer, [stop], ends) == response_text(tokenizer, [], ends) == ""
    gym = load_questions("reasoning_gym:chain_sum", {"size": 1})[0]
    right = tokenizer(gym.answer, add_special_tokens=False).input_ids
    shown = response_text(tokenizer, [*words, opening, *right, closing, stop], ends)
    assert load_reward("reasoning_gym")(shown, gym) == 1.0


def test_sums_pass_over_control_tokens():
    from examples.quickstart.sums import reward

    nine = Question(0, [], "9", json.loads("{}"))
    assert reward("4+5", nine) == reward("4<|user|>+5", nine) == 1.0
    assert reward("4+5<", nine) == reward("4 +5", nine) == reward("4+6", nine) == 0.0


def test_sets_of_questions_are_tried_by_one_process(monkeypatch):
    from megatron_policysplit.rewards import trial

    started = []

    class Counted(trial.RewardPool):
        def __init__(self, *arguments):
            started.append(arguments)
            super().__init__(*arguments)

    monkeypatch.setattr(trial, "RewardPool", Counted)
    first, second = try_reward(
        "math", 5.0, {"a": questions("1", "x^2", "Rome"), "b": questions(r"\frac{1}{2}", "no 5")}
    )
    assert len(started) == 1
    assert [own.graded.reward for own in first.own_answers] == [1.0, 1.0, 1.0, 1.0, 0.0, 1.0]
    assert first.words == [(2, "Rome")] and first.unreadable == [] and first.path == "a"
    assert second.unreadable == [(1, "no 5")] and second.questions == 2 and second.path == "b"
