"""A judge model in the evaluations of whole runs: its scores in the logs, its failures, its absence at the start."""

import json
import signal

import pytest

from tests.support import e2e
from tests.support.judge_server import KEY, MODEL, serving

SHORT = (
    "train.steps=1",
    "train.warmup_steps=0",
    "eval.every=1",
    "checkpoint.hugging_face=false",
    "eval.prompts={low: be brief}",
)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("TEST_JUDGE_KEY", KEY)
    with serving() as server:
        server.reply = lambda prompt: f"Hm.\nScore: {1 + len(prompt) % 10}"
        yield server
    assert server.wrong == []


def keys(server, **more):
    settings = {"url": server.url, "model": MODEL, "api_key_variable": "TEST_JUDGE_KEY", "questions": 2} | more
    return tuple(f"eval.judge.{name}={value}" for name, value in settings.items())


def written(directory) -> str:
    files = (path for path in directory.rglob("*") if path.suffix in (".jsonl", ".yaml", ".log", ".txt"))
    return "".join(path.read_text() for path in files)


def test_scores_are_logged_and_failures_counted(config, server, tmp_path):
    """Two questions x two samples x three prompts twice; the second time the server is mostly out of order."""
    server.script = [None] * (1 + 12) + ["no score"] + [503] * 100
    run = e2e.train_by_command(config, tmp_path / "run", *SHORT, *keys(server, concurrency=1, retries=0))
    first, last = e2e.metrics(run.directory, "eval")
    records = [json.loads(line) for line in (run.directory / "rollouts" / "eval_000000.jsonl").open()]
    judged = [record for record in records if "judge" in record]
    assert {(r["question"], r["sample"]) for r in judged} == {(q, s) for q in (0, 1) for s in (0, 1)}
    assert len(judged) == 8 and len(records) == 3 * 4 * 2
    for mode in ("normal", "high_entropy"):
        own = [record["judge"]["score"] for record in judged if record["mode"] == mode]
        assert first[f"eval/{mode}/judge_score"] == sum(own) / 4
    for record in judged:
        asked = [prompt for prompt in server.prompts if f"<response>\n{record['response']}\n</response>" in prompt]
        lengths = {1 + len(prompt) % 10 for prompt in asked if f"<question>\n{14 + record['question']}\n<" in prompt}
        assert record["judge"] == {"score": lengths.pop(), "reply": f"Hm.\nScore: {record['judge']['score']}"} | {
            "error": None
        }
    assert 1 <= first["eval/low/judge_score"] <= 10
    for name in ("normal", "high_entropy", "low"):
        assert first[f"eval/{name}/judge_unparsed"] == first[f"eval/{name}/judge_failed"] == 0
        assert f"eval/{name}/judge_score" not in last
    assert last["eval/normal/judge_unparsed"] == 1 and last["eval/normal/judge_failed"] == 3
    assert last["eval/high_entropy/judge_failed"] == last["eval/low/judge_failed"] == 4
    assert first["time/judge_s"] > 0
    text = run.text()
    assert f"judge    {MODEL} at {server.url}, 2 responses per mode to 2 questions of an evaluation" in text
    assert f"11 of 12 responses were not judged (judge_failed); the first: the judge at {server.url}/chat/comp" in text
    assert len(server.seen) == 1 + 12 + 1 + 3  # the trial, one evaluation, a reply, and three that failed in a row
    assert KEY not in text + written(tmp_path)


def test_a_judge_that_refuses_is_told_before_anything_is_loaded(config, server, tmp_path):
    server.script = [401]
    run = e2e.train(config, tmp_path / "run", *SHORT, *keys(server), code=2)
    (error,) = run.errors
    assert error.startswith(f"error: the judge at {server.url}/chat/completions answered 401 (")
    assert "environment variable TEST_JUDGE_KEY, which eval.judge.api_key_variable names" in error
    assert KEY not in run.text() + written(tmp_path)
    assert e2e.metrics(run.directory) == []


def test_a_signal_during_the_judging_stops_the_run_and_it_is_judged_later(config, server, tmp_path):
    run = e2e.start(config, tmp_path / "run", *SHORT, *keys(server))
    # The trial of the start, answered: while the server is paused it would be held.
    run.wait_for(lambda: len(server.seen) == 1 and not server.holding)
    server.paused.set()
    run.wait_for(lambda: len(server.prompts) > 0)
    run.rank(0).send_signal(signal.SIGTERM)
    assert run.finish() == 75, run.text()
    server.paused.clear()
    assert e2e.metrics(run.directory) == []
    again = e2e.train(config, tmp_path / "run", *SHORT, *keys(server))
    assert [record["step"] for record in e2e.metrics(again.directory, "eval")] == [0, 1]
    assert all("eval/normal/judge_score" in record for record in e2e.metrics(again.directory, "eval"))
