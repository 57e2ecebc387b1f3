"""eval.judge as it is configured, which responses it gets, and `policysplit eval --judge`."""

import json

import pytest
from typer.testing import CliRunner

from megatron_policysplit.cli import main as cli
from megatron_policysplit.config.checks import check_config
from megatron_policysplit.config.load import load_config
from megatron_policysplit.data.questions import Question
from megatron_policysplit.errors import ConfigError, JudgeError
from megatron_policysplit.evaluation.judge_client import Verdict
from megatron_policysplit.evaluation.verdicts import failures, judge_metrics, question_text, with_verdicts
from megatron_policysplit.training.preflight import preflight
from tests.support.judge_server import KEY, MODEL, serving
from tests.support.toy_chat import make_chat_model

NEEDED = ("model.path=m", "data.path=d", "run.dir=r", "eval.path=e")
JUDGE = ("eval.judge.url=http://host:1/v1", f"eval.judge.model={MODEL}")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def data(tmp_path):
    rows = [{"question": f"What is {i}+1?", "answer": i + 1} for i in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "data.jsonl"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with serving() as server:
        yield server
    assert server.wrong == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [f"eval.judge.url={url}"],
            "eval.judge.url=" + url + " is not an address; it is of the form http://host:port/v1",
        )
        for url in ("host:8000", "ftp://host/v1", "http:///v1")
    ]
    + [
        (
            ["eval.judge.url=http://h:port/v1"],
            "eval.judge.url is not an address; it is of the form http://host:port/v1",
        ),
        (["eval.judge.url=http://me:hush@h/v1"], "eval.judge.url must hold neither a user name nor a query; use http:"),
        (
            ["eval.judge.url=http://h/v1?key=hush"],
            "eval.judge.url must hold neither a user name nor a query; use http:",
        ),
        (
            ["eval.judge.url=http://h/v1/chat/completions"],
            "eval.judge.url=http://h/v1/chat/completions is not the base; leave /chat/completions out",
        ),
        (["eval.judge.model=null"], "eval.judge.url is set but not eval.judge.model; give the name of a model on"),
        (
            ["eval.judge.prompt='{response}'", "eval.judge.prompt_file=p"],
            "eval.judge.prompt and eval.judge.prompt_file are both set; keep one of them",
        ),
        (["eval.path=null"], "eval.judge.url is set but there is no evaluation; set eval.path to its questions, or"),
        (
            ["eval.judge.samples=9"],
            "eval.judge.samples=9 is more than the eval.samples=8 responses to a question; lower the one or raise",
        ),
    ],
)
def test_keys_that_do_not_fit_each_other(overrides, message):
    with pytest.raises(ConfigError) as error:
        check_config(load_config(None, [*NEEDED, *JUDGE, *overrides]))
    assert str(error.value).startswith(message) and "hush" not in str(error.value)
    assert check_config(load_config(None, [*NEEDED, *JUDGE, *overrides, "eval.judge.url=null"])) == []


def test_good_keys_are_accepted():
    for url in ("http://host:8000/v1/", "https://api.example.com/v1", "http://[::1]:5/v1"):
        assert check_config(load_config(None, [*NEEDED, *JUDGE, f"eval.judge.url={url}"])) == []


def test_prompt_and_key_are_looked_at_before_the_start(model, data, monkeypatch):
    needed = (f"model.path={model}", f"data.path={data}", "run.dir=r", f"eval.path={data}", "data.batch_questions=2")

    def looked_at(*overrides):
        config = load_config(None, [*needed, *JUDGE, *overrides])
        return preflight(config).lines(config)

    line = f"judge    {MODEL} at http://host:1/v1, 2 responses per mode to 16 questions of an evaluation at most"
    assert line in looked_at()
    assert not any(line.startswith("judge") for line in looked_at("eval.judge.url=null"))
    with pytest.raises(ConfigError, match="^eval.judge.prompt has no {response}"):
        looked_at("eval.judge.prompt=Rate it.")
    with pytest.raises(ConfigError, match="^eval.judge.api_key_variable=NO_KEY: that environment variable is not set"):
        looked_at("eval.judge.api_key_variable=NO_KEY")
    monkeypatch.setenv("BAD_KEY", "hush hush")
    with pytest.raises(ConfigError, match="^eval.judge.api_key_variable=BAD_KEY: the key in it has a blank") as error:
        looked_at("eval.judge.api_key_variable=BAD_KEY")
    assert "hush" not in str(error.value)


def test_the_question_is_that_of_the_user_or_the_whole_conversation():
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    assert question_text(Question(0, turns[1:], None, {})) == "Why?"
    assert question_text(Question(0, turns, None, {})) == "system: Be brief.\n\nuser: Why?"
    call = {"function": {"name": "weather", "arguments": {"city": "Köln"}}}
    asked = [{"role": "user", "content": "Rain?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    assert question_text(Question(0, [*asked, {"role": "tool", "content": "no"}], None, {})) == (
        'user: Rain?\n\nassistant: {"function": {"name": "weather", "arguments": {"city": "Köln"}}}\n\ntool: no'
    )


def test_verdicts_in_metrics_and_records():
    verdicts = {
        ("normal", 3, 0): Verdict(4, "Score: 4"),
        ("normal", 3, 1): Verdict(7, "Score: 7"),
        ("low", 3, 0): Verdict(None, "?"),
        ("low", 3, 1): Verdict(error="gone"),
    }
    assert judge_metrics(verdicts) == {
        "eval/normal/judge_score": 5.5,
        "eval/normal/judge_unparsed": 0.0,
        "eval/normal/judge_failed": 0.0,
        "eval/low/judge_unparsed": 1.0,
        "eval/low/judge_failed": 1.0,
    }
    records = [{"mode": "normal", "question": 3, "sample": sample} for sample in (1, 2)]
    judged = with_verdicts(records, verdicts)
    assert judged == [records[0] | {"judge": {"score": 7, "reply": "Score: 7", "error": None}}, records[1]]
    assert failures(list(verdicts.values())) == "1 of 4 responses were not judged (judge_failed); the first: gone"
    assert failures([Verdict(4, "Score: 4")]) is None


def evaluate(model, data, *arguments):
    given = ["eval", "--model", model, "--data", data, "--reward", "exact", "--samples", 2, "--questions", 3]
    given += ["--max-tokens", 4, "--workers", 1, *arguments]
    return CliRunner().invoke(cli.app, [str(argument) for argument in given], catch_exceptions=False)


def judge_options(server, **keys):
    settings = {"url": server.url, "model": MODEL, "api_key_variable": "JUDGE_KEY"} | keys
    return [word for name, value in settings.items() for word in ("--judge", f"{name}={value}")]


def test_eval_with_a_judge(model, data, server, tmp_path):
    server.script = [None, "Score: 3", "I cannot say", 503]  # the trial, and the normal mode's of question 0 and 1
    output = tmp_path / "numbers.json"
    options = judge_options(server, questions=2, samples=1, retries=0, concurrency=1)
    result = evaluate(model, data, *options, "--mode", "normal", "--output", output)
    assert result.exit_code == 0, result.output
    numbers = json.loads(output.read_text())
    assert numbers["modes"]["normal"]["judge"] == {"judge_score": 3.0, "judge_unparsed": 1, "judge_failed": 0}
    assert numbers["judge"]["url"] == server.url and numbers["judge"]["questions"] == 2
    assert "judge's score (1 to 10)" in result.stdout and "3.000" in result.stdout
    assert [prompt.split("<question>\n")[1].split("\n")[0] for prompt in server.prompts] == [
        "What is 0+1?",
        "What is 1+1?",
    ]
    assert KEY not in output.read_text() + result.output

    server.script = ["perhaps", 503, None, None, None]
    result = evaluate(model, data, *judge_options(server, questions=2, samples=1, retries=0, concurrency=1))
    assert "warning: the judge judge-7b gave a trial response no score that can be read" in result.stderr
    assert "warning: 1 of 4 responses were not judged (judge_failed); the first: the judge at http:" in result.stderr
    assert KEY not in result.output


def test_eval_with_a_judge_that_cannot_be_used(model, data, server):
    with pytest.raises(ConfigError, match="^--judge needs the address of a server"):
        evaluate(model, data, "--judge", f"model={MODEL}")
    with pytest.raises(ConfigError, match="^unknown key eval.judge.sample; did you mean eval.judge.samples"):
        evaluate(model, data, "--judge", "sample=3")
    with pytest.raises(ConfigError, match="^eval.judge.url is set but not eval.judge.model"):
        evaluate(model, data, "--judge", f"url={server.url}")
    server.script = [404]
    with pytest.raises(JudgeError, match="answered 404 .* eval.judge.model=judge-7b a model that it serves$"):
        evaluate(model, data, *judge_options(server))
