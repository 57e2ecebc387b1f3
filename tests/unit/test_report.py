import base64
import html.parser
import json
import re
import subprocess
import sys

import pytest
import yaml
from rich.console import Console

from megatron_policysplit.config import LogConfig
from megatron_policysplit.errors import DataError
from megatron_policysplit.logs import Logger
from megatron_policysplit.reports import run_report as report
from megatron_policysplit.reports.curves import modes_figure

MODES = ("normal", "high_entropy")
HOSTILE = "<script>alert(1)</script><img src=http://example.org/x.png>&\"'"


def evaluation(base, k=8):
    values = {"accuracy": base, "entropy_nats": base + 1, "kl_nats": base / 10, "unique_correct": base + 2}
    values[f"best_of_{k}"] = base + 0.1
    return {f"eval/{mode}/{name}": v + i for i, mode in enumerate(MODES) for name, v in values.items()} | {
        f"eval/{mode}/response_tokens": 5.0 for mode in MODES
    }


def record(question, mode, sample, response="3+4", reward=1.0):
    return {
        "batch": 2, "question": question, "mode": mode, "sample": sample, "prompt": f"Make {question}. {HOSTILE}",
        "response": response, "tokens": [1, 2], "engine_logprobs": [-0.1, -0.2], "finish_reason": "stop",
        "weight_versions": [[0, 2]], "reward": reward, "answer": "7", "reward_error": None,
    }  # fmt: skip


def make_run(run_dir, evals=True, rollouts=True):
    run_dir.mkdir(exist_ok=True)
    config = {"model": {"path": HOSTILE}, "train": {"steps": 2}, "data": {"options": {"api_key": "hunter2"}}}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    log = Logger(LogConfig(console=False), run_dir, 2, config)
    log.start(0)
    if evals:
        log.evaluation(0, evaluation(0.25))
    for step in (1, 2):
        train = {f"{mode}/{name}": 0.5 * step for mode in MODES for name in ("accuracy", "entropy_nats")}
        log.log(step, {**train, "kl/high_entropy_to_normal": float("nan"), "time/generate_s": 1.5, "time/step_s": 4.0})
    if evals:
        log.evaluation(2, evaluation(0.75))
    if rollouts:
        log.rollouts(1, [record(1, "normal", 0, "from an earlier step")])
        pair = [record(q, mode, i, HOSTILE) for q in (7, 8) for mode in MODES for i in range(2)]
        log.rollouts(2, [record(5, "normal", 0, "only normal"), *pair, record(9, "normal", 0, "x" * 5000, None)])
    log.close()
    return run_dir


class Page(html.parser.HTMLParser):
    """Checks that tags are balanced and collects tags, attributes and the text outside style."""

    VOID = {"meta", "img", "source", "link", "br"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data


def test_read_metrics_sorts_by_step_and_splits_kinds(tmp_path):
    train, evals = report.read_metrics(make_run(tmp_path))
    assert [r["step"] for r in train] == [1, 2] and [r["step"] for r in evals] == [0, 2]
    assert train[0]["kl/high_entropy_to_normal"] is None


@pytest.mark.parametrize("content", [None, "", '{"step": 1, "kind": "tr'])
def test_missing_or_empty_metrics_name_the_file(tmp_path, content):
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_text(content)
    for read in (report.read_metrics, lambda run: report.summary({"a": run}, {})):
        with pytest.raises(DataError, match=re.escape(str(path))):
            read(tmp_path)


def test_summary_has_the_first_and_the_last_evaluation(tmp_path):
    result = report.summary({"grpo": make_run(tmp_path)}, {"install": 12.5})
    point = {"accuracy": 0.25, "entropy_nats": 1.25, "kl_nats": 0.025, "unique_correct": 2.25, "best_of_8": 0.35}
    assert set(result) == {"runs", "seconds"} and result["seconds"] == {"install": 12.5}
    assert list(result["runs"]["grpo"]) == list(MODES)
    assert result["runs"]["grpo"]["normal"]["first"] == point
    assert result["runs"]["grpo"]["high_entropy"]["last"]["accuracy"] == 1.75
    assert set(result["runs"]["grpo"]["high_entropy"]["last"]) == set(point)
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_summary_follows_k_and_leaves_unmeasured_values_empty(tmp_path):
    values = {"step": 0, "kind": "eval", "eval/normal/accuracy": 0.5, "eval/normal/best_of_16": 1.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(values) + "\n")
    runs = report.summary({"a": tmp_path}, {})["runs"]
    assert runs["a"]["normal"]["last"] == {
        "accuracy": 0.5, "entropy_nats": None, "kl_nats": None, "unique_correct": None, "best_of_16": 1.0,
    }  # fmt: skip
    assert "high_entropy" not in runs["a"]


def test_summary_of_a_run_without_evaluation_is_refused(tmp_path):
    with pytest.raises(DataError, match="set eval.path"):
        report.summary({"a": make_run(tmp_path, evals=False)}, {})


def test_prompts_of_the_evaluation_stand_beside_the_modes(tmp_path):
    evals = [{"step": step, "eval/normal/accuracy": 0.5, "eval/low/accuracy": 0.25 + step / 4} for step in (0, 1)]
    found = report.endpoints(evals)
    assert list(found) == ["normal", "low"]
    assert (found["low"]["first"]["accuracy"], found["low"]["last"]["accuracy"]) == (0.25, 0.5)
    table = report.summary_table({"runs": {"a": found}})
    Console(width=80).print(table)


def test_summary_table_fits_a_terminal(tmp_path, capsys):
    table = report.summary_table(report.summary({"policy_split": make_run(tmp_path)}, {}))
    Console(width=80).print(table)
    shown = capsys.readouterr().out
    for part in ("policy_split", "high-entropy", "first", "last", "0.250", "1.750", "0.0250"):
        assert part in shown
    assert "…" not in shown


def test_curves_are_a_png(tmp_path):
    path = tmp_path / "curves.png"
    run = make_run(tmp_path / "a")
    report.write_curves({"a": run, "no evaluation": make_run(tmp_path / "b", evals=False)}, path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_curves_hold_the_logged_numbers(tmp_path):
    figure = modes_figure({"a": report.read_metrics(make_run(tmp_path))}, dark=False)
    accuracy, entropy, unique, kl = figure.axes
    drawn = {tuple(line.get_ydata()) for line in accuracy.lines}
    assert drawn == {(0.5, 1.0), (0.25, 0.75), (1.25, 1.75)}  # batches of both modes coincide; evaluations
    assert [tuple(line.get_xdata()) for line in unique.lines] == [(0, 2), (0, 2)]
    assert [axis.get_title(loc="left") for axis in (entropy, kl)] == ["Entropy", "KL between the modes"]
    assert [text.get_text() for text in figure.legends[0].texts] == ["a, normal mode", "a, high-entropy mode"]


def test_report_is_one_valid_file_without_outside_resources(tmp_path):
    runs = {"grpo": make_run(tmp_path / "a"), "<b>split</b>": make_run(tmp_path / "b", rollouts=False)}
    path = tmp_path / "report.html"
    report.write_report(runs, path)
    text = path.read_text()
    page = Page(text)
    assert "script" not in page.tags and "link" not in page.tags and "b>split" not in page.tags
    links = [value for name, value in page.attributes if name in ("src", "href", "srcset")]
    assert len(links) == 2 and all(value.startswith("data:image/png;base64,") for value in links)
    assert all(base64.b64decode(value.partition(",")[2]).startswith(b"\x89PNG") for value in links)
    assert "url(" not in text and "@import" not in text
    for part in ("<b>split</b>", "0.750", "best-of-8", "generate", "3.0", HOSTILE, "steps: 2", "step_000002.jsonl"):
        assert part in page.text
    assert "No rollout dump" in page.text and "from an earlier step" not in page.text
    assert "hunter2" not in text


def test_report_shows_both_modes_of_the_same_questions_first(tmp_path):
    samples = report._samples(make_run(tmp_path))
    modes = [sorted(question["modes"]) for question in samples["questions"]]
    assert modes == [sorted(MODES), sorted(MODES), ["normal"]]
    assert [question["prompt"][:7] for question in samples["questions"]] == ["Make 7.", "Make 8.", "Make 5."]


def test_report_cuts_long_responses_and_takes_a_reward_that_is_not_a_number(tmp_path):
    log = Logger(LogConfig(console=False), tmp_path, 1, {})
    log.start(0)
    log.log(1, {"normal/accuracy": 0.5})
    log.rollouts(1, [record(9, "normal", 0, "x" * 5000, float("nan"))])
    log.close()
    report.write_report({"a": tmp_path}, tmp_path / "report.html")
    text = Page((tmp_path / "report.html").read_text()).text
    assert "reward –" in text and "3500 more characters" in text


def test_report_of_a_run_without_a_configuration_or_with_a_damaged_one(tmp_path):
    file = make_run(tmp_path) / "config.yaml"
    file.unlink()
    report.write_report({"a": tmp_path}, tmp_path / "report.html")
    assert "config.yaml is not in the run directory" in Page((tmp_path / "report.html").read_text()).text
    for content in (b"model: {path", b"a sentence", b"\xff"):
        file.write_bytes(content)
        with pytest.raises(DataError, match=f"^{re.escape(str(file))} is not a YAML mapping; restore the file"):
            report.write_report({"a": tmp_path}, tmp_path / "report.html")


def test_a_directory_of_runs_names_them(tmp_path):
    runs = [str(make_run(tmp_path / name)) for name in ("b", "a")]
    with pytest.raises(DataError) as error:
        report.read_metrics(tmp_path)
    expected = f"{tmp_path} is not a run but holds runs; give one or more of them: {runs[1]} {runs[0]}"
    assert str(error.value) == expected


def test_titles_fit_every_algorithm(tmp_path):
    run = make_run(tmp_path)
    report.write_report({"grpo": run}, tmp_path / "report.html")
    assert "Policy Split" not in (tmp_path / "report.html").read_text()
    assert modes_figure({"grpo": report.read_metrics(run)}, dark=False).get_suptitle() == (
        "The modes over training steps"
    )


def test_report_without_evaluations_shows_training_batches(tmp_path):
    report.write_report({"a": make_run(tmp_path, evals=False)}, tmp_path / "report.html")
    text = Page((tmp_path / "report.html").read_text()).text
    assert "the table shows its training batches" in text and "0.500" in text and "1.000" in text


def test_import_stays_light():
    heavy = "torch transformers matplotlib jinja2 yaml wandb tensorboard megatron.core"
    program = (
        "import sys, megatron_policysplit.reports.run_report, megatron_policysplit.logs\n"
        f"print([name for name in {heavy.split()!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_strange_files_and_records_are_left_out_with_a_note(tmp_path, capsys):
    run = make_run(tmp_path / "r")
    (run / "rollouts" / "step_000002 copy.jsonl").write_text("{}\n")
    (run / "rollouts" / "step_000009.jsonl").mkdir()
    with (run / "rollouts" / "step_000002.jsonl").open("a") as file:
        file.write('{"x": 1}\n{"batch": 2, "question": [], "mode": "normal"}\n')
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "kind": "train", "my/note": "a text", "normal/accuracy": true, "time/step_s": 1e400}\n')
        file.write(f'{{"step": 4, "kind": "eval", "eval/normal/accuracy": {10**400}}}\n')
    report.write_report({"r": run}, tmp_path / "page.html")
    said = capsys.readouterr().err.splitlines()
    lines = len((run / "rollouts" / "step_000002.jsonl").read_text().splitlines())
    assert said == [
        f"note: {run}/metrics.jsonl:5: my/note=a text is no number and is left out",
        f"note: {run}/metrics.jsonl:5: normal/accuracy=True is no number and is left out",
        f"note: {run}/metrics.jsonl:6: eval/normal/accuracy={str(10**400)[:40]} is no number and is left out",
        f"note: {run}/rollouts/step_000002 copy.jsonl is no dump of a step and is left out",
        f"note: {run}/rollouts/step_000009.jsonl is no dump of a step and is left out",
        f"note: {run}/rollouts/step_000002.jsonl:{lines - 1} is no rollout and is left out",
        f"note: {run}/rollouts/step_000002.jsonl:{lines} is no rollout and is left out",
    ]
    page = Page((tmp_path / "page.html").read_text())
    assert "Left out" in page.text and "my/note=a text is no number" in page.text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("metrics.jsonl", "cannot be read (Is a directory); restore the file"),
        ("config.yaml", "is not a YAML mapping; restore the file, or delete it to have a report without it"),
    ],
)
def test_a_directory_where_a_file_should_be(tmp_path, name, message):
    run = make_run(tmp_path / "r")
    (run / name).unlink()
    (run / name).mkdir()
    with pytest.raises(DataError) as error:
        report.write_report({"r": run}, tmp_path / "page.html")
    assert str(error.value) == f"{run / name} {message}"
    assert not (tmp_path / "page.html").exists()


def test_damaged_lines_are_named(tmp_path):
    run = make_run(tmp_path / "r")
    dump = run / "rollouts" / "step_000002.jsonl"
    dump.write_text(dump.read_text() + "[" * 100_000 + "\n")
    lines = len(dump.read_text().splitlines())
    with pytest.raises(DataError, match=f"step_000002.jsonl:{lines} is not a JSON object; remove that line"):
        report.write_report({"r": run}, tmp_path / "page.html")
    metrics = run / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": true, "kind": "train"}\n')
    with pytest.raises(DataError, match="metrics.jsonl:5 holds .*, which is not a metrics record; remove that line"):
        report.write_report({"r": run}, tmp_path / "page.html")
