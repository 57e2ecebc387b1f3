"""Configurations: text that YAML takes for something else, `~`, secrets, odd places and huge numbers."""

import os
import stat

import pytest
import yaml


def test_a_text_on_the_command_line_is_taken_as_it_stands(work):
    for text in ("1.10", "2026_11 a # b"):
        printed = work.accepted("config", "base.yaml", f"run.dir={text}", f"modes.high_entropy_prompt={text}")
        resolved = yaml.safe_load(printed.partition("\n--- ")[0])
        assert resolved["run"]["dir"] == resolved["modes"]["high_entropy_prompt"] == text
        assert f"<|system|>{text}<|end|>" in printed


def test_a_file_whose_text_yaml_takes_for_a_number_is_refused(work):
    text = (work / "base.yaml").read_text().replace("runs/base", "1.10")
    (work / "t.yaml").write_text(text)
    expected = "error: run.dir=1.10 is not a string but a number to YAML (t.yaml, line 8); put it in quotes"
    assert work.refused("train", "t.yaml") == work.refused("config", "t.yaml") == expected
    assert not (work / "1.1").exists()


def test_a_tilde_in_a_file_is_the_home_directory(work):
    (work / "t.yaml").write_text((work / "base.yaml").read_text().replace("runs/base", "~/runs/base"))
    work.accepted("train", "t.yaml", "data.path=~/q.jsonl", "train.steps=1", HOME=str(work.path))
    assert (work / "runs" / "base" / "metrics.jsonl").exists() and not (work / "~").exists()
    assert "resumed" in work.accepted("train", "t.yaml", f"model.path={work / 'model'}", HOME=str(work.path))


def test_a_secret_of_the_environment_is_not_written(work):
    secret = 'rollout.server.environment={HF_TOKEN: "${oc.env:TOK}"}'
    assert "s3cret" not in work.accepted("config", "base.yaml", secret, TOK="s3cret")
    work.accepted("train", "base.yaml", secret, "train.steps=1", TOK="s3cret")
    file = work / "runs" / "base" / "config.yaml"
    assert "HF_TOKEN: ${oc.env:TOK}" in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    found = [path for path in (work / "runs").rglob("*") if path.is_file() and b"s3cret" in path.read_bytes()]
    assert found == []
    assert "resumed" in work.accepted("train", "base.yaml", secret, TOK="another")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.dir=model", "run.dir=model is model.path=model, and a run would put its checkpoints into the model"),
        ('run.dir=""', "run.dir is empty; give a directory, or . for the current one"),
        ("run.seed=18446744073709551616", "run.seed=18446744073709551616 is not allowed; it must be at least 0 and at"),
        (
            "train.learning_rate=1e300",
            "train.learning_rate=1e+300 is not allowed; it must be at least 0 and at most 1e+06",
        ),
        ("rollout.normal.temperature=1e-320", "rollout.normal.temperature=1e-320 is not allowed; it must be at least"),
        ("algorithm.options={policy_spilt: {alpha: 1}}", "unknown key algorithm.options.policy_spilt; it holds option"),
        ("algorithm.options.policy_split.alpha=abc", "algorithm.options.policy_split.alpha=abc is not a number"),
        ("eval.prompts={normal: x}", "eval.prompts.normal cannot be a name in the logs; use letters"),
        ("rollout.engine=sglang", "rollout.server.python=null, which is the trainer's interpreter, has no sglang; "),
        ("data.path=reasoning_gym:", "reasoning_gym: names no task; "),
        ("log.console=2", "log.console=2 is not true or false"),
    ],
)
def test_config_refuses_what_train_refuses(work, override, expected):
    before = sorted(os.listdir(work / "model")), sorted(os.listdir(work.path))
    refused = work.refused("config", "base.yaml", override)
    assert refused.startswith(f"error: {expected}") and refused == work.refused("train", "base.yaml", override)
    assert (sorted(os.listdir(work / "model")), sorted(os.listdir(work.path))) == before


def test_a_directory_in_place_of_a_configuration(work):
    (work / "runs" / "mine").mkdir(parents=True)
    (work / "runs" / "mine" / "config.yaml").write_text((work / "base.yaml").read_text())
    expected = "error: configuration file runs/mine is a directory; give runs/mine/config.yaml"
    assert work.refused("train", "runs/mine") == expected
    assert work.refused("generate", "--model", "model", "--config", "runs/mine", "1+2") == expected
    assert work.refused("study", "runs").startswith("error: study runs is a directory; give the path of a YAML file")


def test_a_place_that_is_no_disk(work):
    text = work.refused("convert", "hf-to-megatron", "--hf", "model", "--out", "/proc/x")
    assert text == "error: --out /proc/x cannot be written: /proc is no disk; choose another path"
