import io
import json
import math
import subprocess
import sys

import pytest
from rich.console import Console

from megatron_policysplit.config import LogConfig
from megatron_policysplit.errors import ConfigError, DataError
from megatron_policysplit.logs import Logger, without_secrets
from megatron_policysplit.logs.console import ConsoleSink

QUIET = {"console": False}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def logger(run_dir, total=10, resolved=None, **config):
    return Logger(LogConfig(**{**QUIET, **config}), run_dir, total, resolved or {})


def steps(run_dir):
    return [(record["kind"], record["step"]) for record in lines(run_dir / "metrics.jsonl")]


def test_samples_that_could_not_be_graded_are_kept_even_without_a_dump(tmp_path):
    log = logger(tmp_path, rollouts=False)
    log.start(0)
    log.rollouts(3, [{"response": "good", "reward_error": None}, {"response": "bad", "reward_error": "it hung"}])
    log.rollouts(4, [{"response": "worse", "reward_error": "it died"}])
    log.close()
    assert not (tmp_path / "rollouts").exists()
    assert lines(tmp_path / "reward_errors.jsonl") == [
        {"step": 3, "response": "bad", "reward_error": "it hung"},
        {"step": 4, "response": "worse", "reward_error": "it died"},
    ]


def test_metrics_come_back_with_unknown_names_and_null_for_what_is_not_finite(tmp_path):
    torch = pytest.importorskip("torch")
    log = logger(tmp_path)
    log.start(0)
    log.evaluation(0, {"eval/normal/accuracy": 0.5})
    log.log(1, {"normal/reward": 0.25, "actor/grad_norm": math.nan, "my/own": math.inf, "x": torch.tensor(2.0)})
    # Readable before close: every line is flushed.
    evaluation, train = lines(tmp_path / "metrics.jsonl")
    log.close()
    assert (evaluation["step"], evaluation["kind"], evaluation["eval/normal/accuracy"]) == (0, "eval", 0.5)
    assert isinstance(train.pop("time"), float)
    assert train == {
        "step": 1, "kind": "train", "normal/reward": 0.25, "actor/grad_norm": None, "my/own": None, "x": 2.0,
    }  # fmt: skip


def test_resume_drops_later_steps_and_a_line_cut_by_a_crash(tmp_path):
    log = logger(tmp_path)
    log.start(0)
    log.evaluation(0, {"eval/normal/accuracy": 0.0})
    for step in range(1, 6):
        log.log(step, {"a": step})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "kin')
    log = logger(tmp_path)
    log.start(3)
    assert steps(tmp_path) == [("eval", 0), ("train", 1), ("train", 2), ("train", 3)]
    log.log(4, {"a": 40})
    log.close()
    assert steps(tmp_path)[-1] == ("train", 4)
    assert lines(tmp_path / "metrics.jsonl")[-1]["a"] == 40


def test_a_step_logged_again_replaces_its_line(tmp_path):
    log = logger(tmp_path)
    log.start(0)
    log.evaluation(0, {"b": 1})
    log.close()
    log = logger(tmp_path)
    log.start(0)  # killed before the first checkpoint
    log.evaluation(0, {"b": 2})
    log.log(1, {"a": 1})
    log.log(1, {"a": 2})
    log.close()
    assert steps(tmp_path) == [("eval", 0), ("train", 1)]
    assert [record.get("a", record.get("b")) for record in lines(tmp_path / "metrics.jsonl")] == [2, 2]


@pytest.mark.parametrize("line", ["not json", "[1]", '{"kind": "train"}'])
def test_damaged_metrics_name_the_file(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match="metrics.jsonl"):
        logger(tmp_path).start(1)


def test_rollouts_replace_those_of_an_earlier_try(tmp_path):
    log = logger(tmp_path)
    log.start(0)
    log.rollouts(12, [{"response": "first"}, {"response": "try"}])
    log.rollouts(12, [{"response": "line\u2028separator \ud800 é", "engine_logprobs": [-0.5, math.nan], "n": [[0, 3]]}])
    log.close()
    path = tmp_path / "rollouts" / "step_000012.jsonl"
    (line,) = path.read_text().split("\n")[:-1]
    expected = {"response": "line\u2028separator \ud800 é", "engine_logprobs": [-0.5, None], "n": [[0, 3]]}
    assert json.loads(line) == expected
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def test_rollouts_can_be_turned_off(tmp_path):
    log = logger(tmp_path, rollouts=False)
    log.start(0)
    log.rollouts(1, [{"response": "x"}])
    log.eval_rollouts(1, [{"response": "x"}])
    log.close()
    assert not (tmp_path / "rollouts").exists()


def test_secrets_are_left_out_and_files_hold_no_config(tmp_path):
    config = {
        "model": {"path": "m"}, "log": {"kl_tokens": "all"}, "data": {"options": {"api_key": "hunter2", "size": 3}},
        "list": [{"HF_TOKEN": "hunter2", "answer_key": "a"}], "password": "hunter2",
    }  # fmt: skip
    expected = {
        "model": {"path": "m"}, "log": {"kl_tokens": "all"}, "data": {"options": {"size": 3}},
        "list": [{"answer_key": "a"}],
    }  # fmt: skip
    assert without_secrets(config) == expected
    log = logger(tmp_path, resolved=config)
    log.start(0)
    log.message("a sentence")
    log.close()
    assert (tmp_path / "messages.log").read_text().rstrip().endswith("a sentence")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["messages.log", "metrics.jsonl"]


def test_metrics_before_start_are_refused(tmp_path):
    with pytest.raises(RuntimeError, match="start"):
        logger(tmp_path).log(1, {"a": 1})


def test_every_sink_is_closed_when_closing_one_fails(tmp_path):
    log = logger(tmp_path)
    log.start(0)
    first = log.sinks[0]

    class Broken(type(first)):
        def close(self):
            raise OSError("disk full")

    broken = Broken.__new__(Broken)
    log.sinks.append(broken)
    with pytest.raises(OSError, match="disk full"):
        log.close()
    assert first.file is None


def read_events(directory):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(directory))
    accumulator.Reload()
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def test_tensorboard_holds_each_step_once_after_a_resume(tmp_path):
    log = logger(tmp_path, tensorboard=True)
    log.start(0)
    for step in range(1, 5):
        log.log(step, {"normal/reward": float(step)})
    log.close()
    log = logger(tmp_path, tensorboard=True)
    log.start(2)
    log.log(3, {"normal/reward": 30.0, "own/metric": 1.5})
    log.evaluation(3, {"eval/normal/accuracy": 0.5})
    log.close()
    events = read_events(tmp_path / "tensorboard")
    assert events["normal/reward"] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert events["own/metric"] == [(3, 1.5)]
    assert events["eval/normal/accuracy"] == [(3, 0.5)]


def test_wandb_offline_continues_one_run_and_keeps_secrets_out(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_DIR", "WANDB_MODE", "WANDB_RUN_ID", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "argv", ["policysplit", "data.options.api_key=hunter2"])
    run_dir = tmp_path / "run"
    for step in (0, 1):
        log = logger(run_dir, wandb_project="p", wandb_mode="offline", resolved={"eta": 0.03, "api_key": "hunter2"})
        log.start(step)
        log.log(step + 1, {"kl/high_entropy_to_normal": 0.125, "own/metric": 2.0})
        log.evaluation(step + 1, {"eval/normal/accuracy": math.nan})
        log.close()
    run_id = (run_dir / "wandb_id.txt").read_text().strip()
    files = list(run_dir.glob(f"wandb/offline-run-*/run-{run_id}.wandb"))
    assert len(files) >= 1 and len(list(run_dir.glob("wandb/offline-run-*/*.wandb"))) == len(files)
    stored = b"".join(path.read_bytes() for path in run_dir.rglob("*") if path.is_file())
    assert b"own/metric" in stored and b"kl/high_entropy_to_normal" in stored and b"eta" in stored
    assert b"hunter2" not in stored


def test_missing_wandb_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install megatron_policysplit\[wandb\]"):
        logger(tmp_path, wandb_project="p")


def test_wandb_without_a_login_is_one_clear_error(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    log = logger(tmp_path, wandb_project="p")
    with pytest.raises(ConfigError, match="log.wandb_mode=online.*wandb login"):
        log.start(0)
    log.close()


METRICS = {
    "normal/reward": 0.5, "high_entropy/reward": 0.25, "high_entropy/entropy_nats": 0.61, "actor/grad_norm": 1.5,
    "actor/ratio_mean": 1.0, "kl/high_entropy_to_normal": 0.02, "time/step_s": 2.5, "own/metric": 7.0,
}  # fmt: skip


def test_console_prints_one_plain_line_a_step_on_a_pipe(tmp_path):
    program = f"""
import sys
from megatron_policysplit.config import LogConfig
from megatron_policysplit.logs import Logger
log = Logger(LogConfig(), {str(tmp_path)!r}, 2, {{}})
log.start(0)
log.message("[red]as it is[/red] \\u2192")
log.evaluation(0, {{"eval/normal/accuracy": 0.5, "eval/high_entropy/best_of_8": 0.75}})
log.log(1, {METRICS!r})
print("other code")
log.log(2, {METRICS!r})
log.close()
"""
    environment = {"PATH": "/usr/bin:/bin", "FORCE_COLOR": "1", "COLUMNS": "40", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment
    )
    assert done.returncode == 0, done.stderr
    message, evaluation, first, other, second = done.stdout.splitlines()
    assert "\x1b" not in done.stdout
    assert message == "[red]as it is[/red] \\u2192"
    assert evaluation == "evaluation after step 0 | normal: accuracy 0.5 | high-entropy: best of 8 0.75"
    assert first.startswith("step 1/2 (") and second.startswith("step 2/2 (") and "ETA 0:00:00" in second
    assert other == "other code"
    for part in ("normal: reward 0.5", "high-entropy: reward 0.25, entropy (nats) 0.61", "own: metric 7"):
        assert part in first
    assert "ratio" not in first


def test_console_screen_shows_every_metric_and_survives_other_prints(capsys):
    screen = Console(file=io.StringIO(), force_terminal=True, width=100, height=50, _environ={"TERM": "xterm"})
    sink = ConsoleSink(10, screen)
    sink.start(4)
    sink.evaluation(4, {"eval/high_entropy/unique_correct": 3.75})
    sink.log(5, METRICS)
    print("other code")
    sink.message("a message")
    sink.close()
    sink.close()
    text = screen.file.getvalue()
    assert "other code" in text and "a message" in text and "5/10" in text
    final = text[text.rindex("training") :]
    for part in ("high-entropy", "entropy (nats)", "eval unique correct", "3.75", "ratio mean 1", "own: metric 7"):
        assert part in final
    assert sys.stdout is not screen.file and not capsys.readouterr().out
