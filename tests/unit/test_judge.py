"""The judge's client against a real HTTP server: what it sends, reads, repeats and gives up on."""

import asyncio
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime, formatdate

import pytest

from megatron_policysplit.config import JudgeConfig
from megatron_policysplit.errors import ConfigError, JudgeError
from megatron_policysplit.evaluation.judge_client import (
    GIVE_UP_AFTER,
    JudgeClient,
    Verdict,
    fill,
    judge_measures,
    parse_score,
    retry_after_seconds,
)
from megatron_policysplit.evaluation.judge_prompt import DEFAULT_JUDGE_PROMPT
from tests.support.judge_server import KEY, MODEL, completion, serving

PAIRS = [(f"Question {i}?", f"Response {i}.") for i in range(12)]


@pytest.fixture
def server():
    with serving() as server:
        yield server
    assert server.wrong == []


@pytest.fixture
def make(server):
    """make(keys of eval.judge) -> Judge that waits little before it repeats a request."""

    def build(key=KEY, backoff_seconds=0.001, **keys):
        settings = {"url": server.url, "model": MODEL, "api_key_variable": "JUDGE_KEY", "timeout_seconds": 30.0}
        return JudgeClient(JudgeConfig(**(settings | keys)), key, backoff_seconds=backoff_seconds)

    return build


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 60))


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Fresh.\nScore: 8", 8),
        ("score:10\n\n  ", 10),
        ("**Score:** 3/10", 3),
        ("**Score: 1**.", 1),
        ("Score: 4\nScore: 9.", 9),
        ("", None),
        ("I would say 8.", None),
        ("Score: 8\nThank you for reading.", None),
        ("Score: N", None),
        ("Score: 0", None),
        ("Score: 11", None),
        ("Score: 8.5", None),
        ("Score: 8 or 9", None),
        ("Score: -3", None),
        ("Score: 3/5", None),
        ("My score: 7", None),
    ],
)
def test_a_score_is_read_from_the_last_line_or_not_at_all(reply, score):
    assert parse_score(reply) == score


def test_braces_of_the_texts_mean_nothing():
    template = 'Q={question} R={response} {"json": {}} {question}'
    filled = fill(template, "{response}?", r"\1 {question}")
    assert filled == 'Q={response}? R=\\1 {question} {"json": {}} {response}?'


def test_scores_in_the_order_asked_and_the_prompt_that_was_sent(server, make):
    server.reply = lambda prompt: f"Thought.\nScore: {1 + int(prompt.split('Response ')[1].split('.')[0]) % 10}"
    verdicts = run(make(concurrency=3).judge(PAIRS))
    assert [verdict.score for verdict in verdicts] == [1 + i % 10 for i in range(12)]
    assert sorted(server.prompts) == sorted(fill(DEFAULT_JUDGE_PROMPT, *pair) for pair in PAIRS)
    assert verdicts[0] == Verdict(1, "Thought.\nScore: 1", None)
    assert run(make().judge([])) == []


def test_a_template_and_settings_of_ones_own(server, make, tmp_path):
    server.extra, server.key = {}, None
    (tmp_path / "judge.txt").write_text("Rate {response} as a limerick.")
    keys = {"max_tokens": None, "temperature": None, "prompt_file": str(tmp_path / "judge.txt")}
    verdicts = run(make(key=None, **keys).judge([("q", "There was")]))
    assert verdicts[0].score == 7 and server.prompts == ["Rate There was as a limerick."]


def test_concurrency_is_bounded_while_requests_wait_to_be_repeated_too(server, make):
    server.hold_seconds, server.script = 0.01, [503] * 6
    verdicts = run(make(concurrency=4).judge(PAIRS))
    assert [verdict.score for verdict in verdicts] == [7] * 12
    assert server.most == 4 and len(server.seen) == 12 + 6


@pytest.mark.parametrize(
    "passing",
    [
        408,
        500,
        502,
        503,
        504,
        {"choices": []},
        {"error": "busy"},
        completion(None) | {"choices": [{"message": 3}]},
    ],
    ids=str,
)
def test_what_may_pass_is_asked_again(server, make, passing):
    server.script = [passing, passing]
    assert [verdict.score for verdict in run(make(retries=2).judge(PAIRS[:1]))] == [7]
    assert len(server.seen) == 3 and server.seen[0] == server.seen[1] == server.seen[2]


def test_retry_after_in_seconds_or_as_a_date():
    assert (retry_after_seconds("7"), retry_after_seconds(None), retry_after_seconds("soon")) == (7, 0, 0)
    later = datetime.now(UTC) + timedelta(seconds=100)
    assert 90 < retry_after_seconds(format_datetime(later, usegmt=True)) <= 100
    assert retry_after_seconds(formatdate(time.time() - 100, usegmt=True)) == 0


def test_waits_double_or_are_as_long_as_the_server_asks(server, make, monkeypatch):
    waits, sleep = [], asyncio.sleep

    async def remember(seconds):
        waits.append(seconds)
        await sleep(0)

    judge = make(backoff_seconds=4.0, retries=4)
    server.script = [503, 503, (429, {"Retry-After": "33"}), (429, {"Retry-After": "4000"})]
    monkeypatch.setattr("megatron_policysplit.evaluation.judge_client.asyncio.sleep", remember)
    assert run(judge.check()).score == 7
    assert [wait for wait in waits if wait] == [4, 8, 33, 60]  # the server's own sleeps are of 0 seconds


def test_a_time_limit_is_repeated_then_counted(server, make):
    server.paused.set()
    verdicts = run(make(timeout_seconds=0.05, retries=1).judge(PAIRS[:1]))
    server.paused.clear()
    assert verdicts[0].score is None and verdicts[0].reply is None
    assert verdicts[0].error.startswith(f"the judge at {server.url}/chat/completions gave no answer in 2 attempts ")
    assert "eval.judge.timeout_seconds=0.05" in verdicts[0].error and len(server.seen) == 2
    assert judge_measures(verdicts) == {"judge_unparsed": 0, "judge_failed": 1}


def test_one_failure_does_not_keep_the_others_from_being_asked(server, make):
    server.script = [
        "Score: 2",
        503,
        503,
        "Score: 4",
        "no idea",
        completion("Score: 1", "length"),
        completion(None),
        422,
    ]
    verdicts = run(make(concurrency=1, retries=1).judge(PAIRS[:8]))
    assert [verdict.score for verdict in verdicts] == [2, None, 4, None, None, None, None, 7]
    assert [verdict.reply for verdict in verdicts[3:6]] == ["no idea", "Score: 1", ""]
    assert [verdict.error is None for verdict in verdicts] == [True, False, True, True, True, True, False, True]
    assert "answered 422" in verdicts[6].error
    assert judge_measures(verdicts) == {"judge_score": 13 / 3, "judge_unparsed": 3, "judge_failed": 2}


def test_a_judge_that_is_gone_is_not_asked_for_everything(server, make):
    server.script = [503] * 100
    verdicts = run(make(concurrency=1, retries=1).judge(PAIRS))
    assert len(server.seen) == 2 * GIVE_UP_AFTER
    assert all(verdict.error for verdict in verdicts)
    assert verdicts[GIVE_UP_AFTER].error.startswith("not asked any more, because the judge at ")
    server.script = [503, 503, 503, 503, "Score: 1"] * 2  # with answers in between it goes on
    verdicts = run(make(concurrency=1, retries=1).judge(PAIRS[:6]))
    assert [verdict.score for verdict in verdicts] == [None, None, 1, None, None, 1]


@pytest.mark.parametrize(
    ("status", "keys", "remedy"),
    [
        (401, {}, "put a key that may use eval.judge.model=judge-7b into the environment variable JUDGE_KEY, which "),
        (403, {}, "put a key that may use eval.judge.model=judge-7b into the environment variable JUDGE_KEY, which "),
        (401, {"api_key_variable": None}, "set eval.judge.api_key_variable to the name of a variable that holds its"),
        (
            404,
            {},
            "eval.judge.url must be the base, such as http://host:port/v1, and eval.judge.model=judge-7b a model",
        ),
        (307, {}, "set eval.judge.url to the address that it redirects to"),
        (400, {}, "see whether it knows eval.judge.model and takes such requests"),
    ],
)
def test_a_refusal_is_one_sentence_and_is_not_repeated(server, make, caplog, capfd, status, keys, remedy):
    judge = make(**keys)
    server.script = [status]
    with pytest.raises(JudgeError) as error:
        run(judge.check())
    start = f'the judge at {server.url}/chat/completions answered {status} ({{"error": {{"message": "status {status};'
    assert str(error.value).startswith(start) and f"; {remedy}" in str(error.value) and "\n" not in str(error.value)
    assert len(server.seen) == 1
    shown = [str(error.value), repr(error.value), repr(judge), caplog.text, *capfd.readouterr()]
    assert "you sent ***" in shown[0] and not any(KEY in text for text in shown)


def test_a_key_that_is_refused_during_the_work_ends_it(server, make):
    server.script = ["Score: 5", 401]
    verdicts = run(make(concurrency=1).judge(PAIRS))
    assert len(server.seen) == 2 and verdicts[0].score == 5
    assert "JUDGE_KEY" in verdicts[1].error and all("JUDGE_KEY" in verdict.error for verdict in verdicts[2:])
    assert not any(KEY in (verdict.error or "") for verdict in verdicts)


def test_a_server_that_is_not_there(server, make):
    with pytest.raises(JudgeError, match="/chat/completions gave no answer in 2 attempts .*eval.judge.url is right"):
        run(make(url="http://127.0.0.1:9/v1", retries=1).check())


def test_measures_without_any_score():
    assert judge_measures([Verdict(reply="?"), Verdict(error="gone")]) == {"judge_unparsed": 1, "judge_failed": 1}


def test_prompts_that_cannot_be_used(tmp_path):
    def refused(**keys):
        with pytest.raises(ConfigError) as error:
            JudgeClient(JudgeConfig(url="http://host", model="m", **keys))
        return str(error.value)

    assert refused(
        prompt="Rate it."
    ) == "eval.judge.prompt has no {response}; write that where the response to judge" + (" belongs")
    file = tmp_path / "p.txt"
    assert refused(prompt_file=str(file)).startswith(f"eval.judge.prompt_file={file} cannot be read (No such file")
    file.write_bytes(b"\xff{response}")
    assert refused(prompt_file=str(file)).startswith(f"eval.judge.prompt_file={file} cannot be read (it is not UTF-8)")
