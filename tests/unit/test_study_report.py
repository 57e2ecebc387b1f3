"""The study report's numbers against computations by hand, and its page as one valid file."""

import base64
import csv
import json
import math
from xml.etree import ElementTree

import pytest

from megatron_policysplit.errors import ConfigError, DataError
from megatron_policysplit.study.numbers import Finished, finished_runs, study_numbers
from megatron_policysplit.study.report import curves, measure_title, write_study_report
from tests.unit.test_report import Page
from tests.unit.test_study import make_study, run

SVG = "{http://www.w3.org/2000/svg}svg"
T1, T2 = 12.7062047, 4.3026527  # 97.5% quantiles of t with 1 and 2 degrees of freedom, from tables


def made(study, values: dict[str, dict[int, float]]) -> list[Finished]:
    """Finished runs with one evaluation each."""
    by_name = {one.name: one for one in study.runs}
    return [
        Finished(by_name[f"{method}/seed_{seed}"], [], [{"step": 3, "kind": "eval", "eval/normal/accuracy": value}], 1)
        for method, seeds in values.items()
        for seed, value in seeds.items()
    ]


def test_differences_are_paired_by_seed(tmp_path):
    study = make_study(tmp_path, seeds=[0, 1, 2, 3])
    runs = made(study, {"grpo": {0: 0.1, 1: 0.5, 2: 0.9}, "policy_split": {0: 0.2, 1: 0.7, 2: 1.2, 3: 9.0}})
    found = study_numbers(study, runs)["measures"]["eval/normal/accuracy"]
    grpo, split = found["grpo"], found["policy_split"]
    assert grpo["difference"] is None
    assert grpo["estimate"]["mean"] == pytest.approx(0.5)
    assert grpo["estimate"]["high"] - 0.5 == pytest.approx(T2 * 0.4 / math.sqrt(3))
    assert split["estimate"]["mean"] == pytest.approx((0.2 + 0.7 + 1.2 + 9) / 4)
    # seed 3 has no baseline; the differences 0.1, 0.2, 0.3 are far surer than those of two independent means
    difference = split["difference"]
    assert (difference["n"], difference["mean"]) == (3, pytest.approx(0.2))
    assert difference["high"] - difference["mean"] == pytest.approx(T2 * 0.1 / math.sqrt(3))
    assert difference["low"] == pytest.approx(0.2 - T2 * 0.1 / math.sqrt(3))


def test_without_a_shared_seed_or_with_one_there_is_no_interval(tmp_path):
    study = make_study(tmp_path, seeds=[0, 1])
    found = study_numbers(study, made(study, {"grpo": {0: 0.1}, "policy_split": {1: 0.2}}))["measures"]
    assert found["eval/normal/accuracy"]["policy_split"]["difference"] is None
    one = study_numbers(study, made(study, {"grpo": {0: 0.25}, "policy_split": {0: 0.75}}))["measures"]
    assert one["eval/normal/accuracy"]["policy_split"]["difference"] == {"n": 1, "mean": 0.5, "low": None, "high": None}


def test_costs_leave_the_first_step_out(tmp_path):
    study = make_study(tmp_path)
    train = [
        {"step": step, "time/step_s": 2.0 * step, "time/generate_s": 1.0, "time/score_s": 0.25, "time/update_s": 0.5}
        for step in (1, 2, 3)
    ]
    costs = Finished(study.runs[0], train, [], 30).costs()
    assert costs == {
        "step_s": 5.0, "generate_s": 1.0, "score_s": 0.25, "update_s": 0.5,
        "generation_share": 1 / 5, "score_update_ms_per_response": 25.0,
    }  # fmt: skip
    assert Finished(study.runs[0], train[:1], [], None).costs()["step_s"] == 2.0


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A study of the stub: policy_split of both seeds, grpo of both, `<b>` of none."""
    methods = {"grpo": ["algorithm.name=grpo"], "policy_split": ["algorithm.name=policy_split"]}
    study = make_study(tmp_path, methods={**methods, "fails": ["algorithm.name=clip_cov"]})
    monkeypatch.setenv("STUB_FAILS", "clip_cov")
    assert run(study)[0] == 1
    return study


def test_numbers_of_a_study_by_hand(finished):
    write_study_report(finished)
    numbers = json.loads((finished.runs[0].study / "report.json").read_text())
    accuracy = numbers["measures"]["eval/high_entropy/accuracy"]
    assert accuracy["grpo"]["values"] == pytest.approx({"0": 0.5, "3": 0.53})
    assert accuracy["policy_split"]["values"] == pytest.approx({"0": 0.6, "3": 0.63})
    assert accuracy["policy_split"]["difference"]["mean"] == pytest.approx(0.1)
    half = T1 * 0.015  # t s / sqrt(n), s of two values = their distance / sqrt(2)
    grpo = accuracy["grpo"]["estimate"]
    assert (grpo["low"], grpo["high"]) == pytest.approx((0.515 - half, 0.515 + half))
    costs = numbers["costs"]
    ratio = costs["step_s"]["policy_split"]["ratio"]  # 1.2 and 1.26 to 1
    assert (ratio["mean"], ratio["high"]) == pytest.approx((1.23, 1.23 + T1 * 0.03))
    assert costs["generation_share"]["grpo"]["estimate"]["mean"] == pytest.approx(0.5)
    per_response = costs["score_update_ms_per_response"]["policy_split"]["values"]  # of 5 x 4 responses
    assert per_response == pytest.approx({"0": 375 * 1.2 / 20, "3": 375 * 1.26 / 20})
    assert numbers["runs"]["policy_split/seed_3"] == {"state": "finished", "steps": 3}
    assert numbers["runs"]["fails/seed_0"]["state"] == "failed"
    rows = list(csv.DictReader((finished.runs[0].study / "report.csv").open()))
    row = next(r for r in rows if (r["name"], r["method"]) == ("step_s", "policy_split"))
    assert (row["kind"], row["compared_by"], row["n"], row["compared_n"]) == ("cost", "ratio", "2", "2")
    assert float(row["compared_mean"]) == pytest.approx(1.23) and float(row["seed_3"]) == pytest.approx(1.26)


def test_the_page_is_one_valid_file(finished):
    text = write_study_report(finished)[0].read_text()
    page = Page(text)
    assert "script" not in page.tags and "link" not in page.tags
    links = [value for name, value in page.attributes if name in ("src", "href", "srcset")]
    assert len(links) == 2
    assert [ElementTree.fromstring(base64.b64decode(value.partition(",")[2])).tag for value in links] == [SVG] * 2
    for part in (
        "normal: pass@2", "high-entropy: accuracy", "+0.1 [+0.1, +0.1]", "1.23 [0.849, 1.61]", "step (s)",
        "fails/seed_0", "failed: the stub was told to fail (exit code 1", "algorithm.name=clip_cov",
        "score and update (ms per response)", "finished, 3 steps",
    ):  # fmt: skip
        assert part in page.text, part
    assert "shared the machine" not in page.text


def test_curves_hold_means_and_bands(finished):
    figure = curves(["grpo", "policy_split", "fails"], finished_runs(finished), "light")
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert titles == [
        "Accuracy, normal", "Accuracy, high-entropy", "Pass@k at the end, normal", "Pass@k at the end, high-entropy",
    ]  # fmt: skip
    accuracy, pass_at = figure.axes[0], figure.axes[2]
    assert list(accuracy.lines[0].get_xdata()) == [1, 2, 3]
    assert accuracy.lines[0].get_ydata() == pytest.approx([0.315, 0.415, 0.515])
    band = accuracy.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((0.3, 0.53))
    assert list(pass_at.lines[1].get_xdata()) == [1, 2] and pass_at.lines[1].get_ydata()[1] == 1.0
    assert [text.get_text() for text in figure.legends[0].texts] == ["grpo", "policy_split"]


def test_figures_show_the_methods_that_they_name(finished):
    figures = {"One": ["grpo"], "Two": ["policy_split", "grpo"], "None of them finished": ["fails"]}
    study = make_study(finished.runs[0].study.parent, methods=finished.methods, figures=figures)
    page = Page(write_study_report(study)[0].read_text())
    assert page.tags.count("img") == 2 and "Two" in page.text and "None of them finished" not in page.text
    figure = curves(figures["Two"], finished_runs(study), "light")
    assert [text.get_text() for text in figure.legends[0].texts] == ["policy_split", "grpo"]
    assert curves(["fails"], finished_runs(study), "dark") is None


def test_curves_are_in_the_numbers(finished):
    numbers = study_numbers(finished, finished_runs(finished))
    found = numbers["curves"]["eval/normal/accuracy"]
    assert found["grpo"]["steps"] == [1, 2, 3]
    assert found["grpo"]["values"] == {0: pytest.approx([0.3, 0.4, 0.5]), 3: pytest.approx([0.33, 0.43, 0.53])}
    assert "fails" not in found and not any("pass_at" in name for name in numbers["curves"])


def test_a_study_without_a_finished_run_has_a_report(tmp_path):
    study = make_study(tmp_path, at_once=2)
    page = Page(write_study_report(study)[0].read_text())
    assert "No finished run has logged an evaluation." in page.text and "grpo/seed_0" in page.text
    assert "img" not in page.tags


def test_chosen_measures(finished):
    chosen = ["time/step_s", "eval/normal/accuracy"]
    study = make_study(finished.runs[0].study.parent, methods=finished.methods, measures=chosen)
    assert list(study_numbers(study, finished_runs(study))["measures"]) == chosen
    study = make_study(finished.runs[0].study.parent, methods=finished.methods, measures=["eval/normal/acuracy"])
    with pytest.raises(DataError, match="^measures names eval/normal/acuracy, which no finished run has logged; "):
        write_study_report(study)


def test_titles():
    assert [measure_title(name) for name in ("eval/normal/best_of_8", "kl/a_to_b", "wait_s", "eval/x/kl_nats")] == [
        "normal: best-of-8", "kl: a to b", "wait (s)", "x: KL to the other mode (nats)",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("report.html", "<!doctype html><title>mine</title>"),
        ("report.json", '{"mine": 1}'),
        ("report.json", "[" * 5),
        ("report.csv", "a,b\n1,2\n"),
    ],
)
def test_files_that_are_no_report_are_kept(tmp_path, name, content):
    study = make_study(tmp_path)
    run(study)
    write_study_report(study)
    write_study_report(study)  # over its own
    file = study.runs[0].directory.parents[1] / name
    file.write_text(content)
    with pytest.raises(ConfigError) as error:
        write_study_report(study)
    assert str(error.value) == (
        f"{file} is no report of a study, and the report would replace it; move it away, or give another dir"
    )
    assert file.read_text() == content
