"""`policysplit study` with real runs: two methods, two seeds, two steps; a Ctrl-C in its midst, and the report."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.support import e2e


def start(study: Path, directory: Path) -> subprocess.Popen:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environ |= {"PYTHONPATH": str(e2e.ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megatron_policysplit.cli", "study", str(study)]
    return subprocess.Popen(command, env=environ, cwd=directory, stdout=subprocess.PIPE, text=True)


def interrupt(process: subprocess.Popen, runs: list[Path]) -> None:
    """Ctrl-C once a run has been evaluated for the first time, before any step or in the midst of one."""
    deadline = time.monotonic() + 120
    while not any(e2e.metrics(run, "eval") for run in runs):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 75, said
    assert "SIGINT: waiting for" in said


@pytest.mark.parametrize("interrupted", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_whole_study(tmp_path, interrupted):
    config = e2e.make_workspace(tmp_path)
    file, out = tmp_path / "study.yaml", tmp_path / "out"
    content = {
        "config": str(config),
        "dir": str(out),
        "seeds": [0, 1],
        "at_once": 2,
        "baseline": "grpo",
        "prepare": f"cp -r {tmp_path}/model {{dir}}/model_{{seed}}",
        "overrides": [
            "model.path={dir}/model_{seed}", "parallel.tensor=1", "train.steps=2", "train.warmup_steps=1",
            "eval.every=1", "eval.samples=2",
            f"eval.prompts={{rewritten: widely explore, low: {{file: {tmp_path}/low.txt}}}}",
            "checkpoint.every=1", "checkpoint.hugging_face=false",
        ],
        "methods": {"grpo": ["algorithm.name=grpo"], "split": ["algorithm.name=policy_split"]},
    }  # fmt: skip
    file.write_text(yaml.safe_dump(content))
    (tmp_path / "low.txt").write_text("be brief")
    runs = [out / method / f"seed_{seed}" for method in ("grpo", "split") for seed in (0, 1)]
    if interrupted:
        interrupt(start(file, tmp_path), runs)
    whole = start(file, tmp_path)
    said = whole.communicate(timeout=200)[0]
    assert whole.returncode == 0, said
    for run in runs:
        assert [record["step"] for record in e2e.metrics(run, "train")] == [1, 2]
        assert [record["step"] for record in e2e.metrics(run, "eval")] == [0, 1, 2]
    numbers = json.loads((out / "report.json").read_text())
    assert {found["state"] for found in numbers["runs"].values()} == {"finished"}
    for seed, run in enumerate(runs[2:]):
        last = e2e.metrics(run, "eval")[-1]
        for name in ("accuracy", "pass_at_2", "entropy_nats", "kl_nats"):
            values = numbers["measures"][f"eval/high_entropy/{name}"]["split"]["values"]
            assert values[str(seed)] == last[f"eval/high_entropy/{name}"]
        for name in ("accuracy", "pass_at_2", "entropy_nats"):
            found = {group: last[f"eval/{group}/{name}"] for group in ("normal", "high_entropy", "rewritten", "low")}
            assert all(map(math.isfinite, found.values()))
            assert numbers["measures"][f"eval/low/{name}"]["split"]["values"][str(seed)] == found["low"]
        assert len(set(found.values())) == 4  # entropies under four prompts
        assert not any(name.endswith("kl_nats") for name in last if name.startswith("eval/low/"))
    responses = 4 * 8
    second = e2e.metrics(runs[0], "train")[1]
    cost = numbers["costs"]["score_update_ms_per_response"]["grpo"]["values"]["0"]
    assert abs(cost - 1000 * (second["time/score_s"] + second["time/update_s"]) / responses) < 1e-9
    assert (out / "report.html").read_text().startswith("<!doctype html>")
    assert (out / "report.csv").exists()

    again = start(file, tmp_path)
    assert "4 finished, 0 to run" in again.communicate(timeout=60)[0] and again.returncode == 0
