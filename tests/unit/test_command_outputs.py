"""What commands write at the end: the report of runs, and files that `--output` names."""

import json
import os
from pathlib import Path

import pytest

from megatron_policysplit.errors import ConfigError, DataError
from tests.support.commands import invoke


def test_report_of_runs(tmp_path):
    runs = [tmp_path / "a" / "grpo", tmp_path / "a" / "split", tmp_path / "b" / "split"]
    for number, run in enumerate(runs):
        run.mkdir(parents=True)
        evaluation = {f"eval/normal/{name}": 0.1 + number / 10 for name in ("accuracy", "entropy_nats")}
        records = [{"kind": "eval", "step": step, **evaluation} for step in (0, 5)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert invoke("report", *runs).strip() == str(runs[0] / "report.html")
    page = (runs[0] / "report.html").read_text()
    assert "grpo" in page and str(runs[1]) in page and str(runs[2]) in page
    assert invoke("report", runs[1], "--output", tmp_path / "one.html").strip() == str(tmp_path / "one.html")
    assert (tmp_path / "one.html").read_text().startswith("<!doctype html>")
    with pytest.raises(DataError, match="does not exist; give the directory of a run"):
        invoke("report", tmp_path / "no")
    with pytest.raises(DataError) as error:
        invoke("report", tmp_path / "a")
    listed = f"{runs[0]} {runs[1]}"
    assert str(error.value) == f"{tmp_path / 'a'} is not a run but holds runs; give one or more of them: {listed}"


@pytest.mark.parametrize("command", ["eval", "report"])
def test_an_output_that_cannot_be_written_is_told_before_the_work(command, tmp_path, monkeypatch):
    given = {"eval": ["--model", tmp_path / "model", "--data", tmp_path / "no.jsonl"], "report": [tmp_path]}[command]
    missing = tmp_path / "no" / "out"
    with pytest.raises(
        ConfigError, match=f"^--output {missing}: the directory {missing.parent} does not exist; create"
    ):
        invoke(command, *given, "--output", missing)
    with pytest.raises(ConfigError, match=f"^--output {tmp_path} is a directory; give the name of a file$"):
        invoke(command, *given, "--output", tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK or path != tmp_path)
    with pytest.raises(
        ConfigError, match=f"^--output {tmp_path / 'out'} cannot be written: no permission; give another"
    ):
        invoke(command, *given, "--output", tmp_path / "out")


def test_a_run_directory_that_cannot_be_written_asks_for_an_output(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK or path != tmp_path)
    with pytest.raises(ConfigError, match=f"^--output {tmp_path / 'report.html'} cannot be written: no permission; "):
        invoke("report", tmp_path)


def test_an_output_replaces_an_older_result_alone(tmp_path):
    from megatron_policysplit.cli.options import check_output

    def check(path, inputs=()):
        check_output(path, inputs, lambda file: file.read_text() == "older")

    file, link, questions = tmp_path / "x", tmp_path / "link", tmp_path / "q.jsonl"
    questions.write_text("older")  # even if it looks like a result
    link.symlink_to(questions)
    check(file, [questions, "reasoning_gym:chain_sum"])
    for path in (questions, link, tmp_path / ".." / tmp_path.name / "q.jsonl"):
        with pytest.raises(ConfigError, match=f"^--output .* is {questions}, which the command reads; give another"):
            check(path, [questions])
    for content, replaceable in (("", True), ("older", True), ("notes", False)):
        file.write_text(content)
        if replaceable:
            check(file)
        else:
            with pytest.raises(ConfigError, match=f"^--output {file} exists and is no older result of this command"):
                check(file)
    check(Path(os.devnull))
