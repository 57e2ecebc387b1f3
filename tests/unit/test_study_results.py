"""What docs/study_results.md says is what the checked-in study found."""

import json
from pathlib import Path

import pytest

from benchmarks.study_tables import RESULT, interval, tables
from megatron_policysplit.study.config import load_study

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def report():
    return json.loads((ROOT / RESULT).read_text())


def test_every_table_of_the_page_is_in_the_report(report):
    page = (ROOT / "docs/study_results.md").read_text().splitlines()
    for title, lines in tables(report).items():
        missing = [line for line in lines if line not in page]
        assert not missing, f"{title}: {missing[0]}; python -m benchmarks.study_tables prints the tables"


def test_the_study_is_that_of_the_example(report, monkeypatch):
    monkeypatch.chdir(ROOT)
    study = load_study("examples/quickstart/study.yaml")
    assert {run.name: "finished" for run in study.runs} == {name: run["state"] for name, run in report["runs"].items()}
    assert (study.baseline, len(study.seeds)) == (report["baseline"], 5)


def test_intervals():
    found = {"mean": 0.5, "low": 0.25, "high": 0.75}
    assert interval(found) == "0.50 [0.25, 0.75]"
    assert interval(found, "+") == "+0.50 [+0.25, +0.75]"
    assert interval({"mean": 0.5, "low": None, "high": None}) == "0.50" and interval(None) == "-"
