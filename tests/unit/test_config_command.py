"""`policysplit config` refuses what `train` refuses, in the same words, and neither writes nor needs a free run.dir."""

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_policysplit.cli import main as cli
from megatron_policysplit.config.load import load_config
from megatron_policysplit.errors import ConfigError, DataError, ModelError, UserError
from megatron_policysplit.training.places import check_places
from megatron_policysplit.training.preflight import preflight
from megatron_policysplit.training.prompt_check import check_prompts
from megatron_policysplit.training.run_dir import check_run_dir, prepare_run_dir
from tests.support.toy_chat import make_chat_model

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def work(model, tmp_path, monkeypatch) -> Path:
    """The current directory, with `m`, `q.jsonl` and a configuration `c.yaml` that trains."""
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").symlink_to(model)
    rows = [{"question": f"What is {i}+1?", "answer": str(i + 1)} for i in range(4)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "c.yaml").write_text(
        "model: {path: m}\ndata: {path: q.jsonl, batch_questions: 4}\nrun: {dir: r}\nreward: {function: exact}\n"
    )
    return tmp_path


def of_config(*overrides: str) -> str:
    result = CliRunner().invoke(cli.app, ["config", "c.yaml", *overrides])
    assert isinstance(result.exception, UserError) and result.stdout == "", (result.exception, result.output)
    return str(result.exception)


def of_train(*overrides: str) -> str:
    with pytest.raises(UserError) as error:
        cli.run_training(["c.yaml", *overrides])
    return str(error.value)


WRONG = {
    "train.stepz=1": "unknown key train.stepz",
    "train.steps=4.0": "train.steps=4.0 is not an integer; write 4",
    "run.seed=18446744073709551616": "run.seed=18446744073709551616 is not allowed",
    "train.learning_rate=1e300": "train.learning_rate=1e+300 is not allowed",
    "rollout.normal.temperature=1e-320": "rollout.normal.temperature=1e-320 is not allowed",
    "algorithm.options={policy_spilt: {alpha: 1}}": "unknown key algorithm.options.policy_spilt",
    "algorithm.options.policy_split.alpha=abc": "algorithm.options.policy_split.alpha=abc is not a number",
    "algorithm.options.policy_split.variant=1.1": "algorithm.options.policy_split.variant=1.1 is not a string",
    "algorithm.options.dapo.max_rounds=0": "algorithm.options.dapo.max_rounds=0 is not allowed",
    "algorithm.options.policy_split={modes: {third: {eta: 1}}}": "algorithm.options.policy_split.modes.third: ",
    "eval.prompts={normal: x}": "eval.prompts.normal cannot be a name in the logs",
    "eval.prompts={low: 5}": "eval.prompts.low=5 is not a string but a number to YAML",
    "eval.prompts={low: {file: no.txt}}": "eval.prompts.low.file=no.txt cannot be read",
    "eval.path=no.jsonl": "no.jsonl does not exist",
    "eval.judge.url=http://h:1": "eval.judge.url is set but not eval.judge.model",
    "modes.others={High: {prompt: x}}": "modes.others.High cannot be a mode's name",
    "modes.high_entropy_prompt= ' '": "modes.high_entropy_prompt is empty",
    "modes.high_entropy_prompt_file=no.txt": "modes.high_entropy_prompt_file=no.txt cannot be read",
    "reward.function=mathh": "reward.function=mathh is not one of math",
    "reward.function=my_rewards:": "reward.function=my_rewards: is not one of math",
    "reward.function=no.such:thing": "reward.function=no.such:thing cannot be imported",
    "parallel.tensor=4": "parallel.tensor=4 does not divide num_key_value_heads=2",
    "parallel.pipeline=3": "parallel.pipeline=3 does not divide num_hidden_layers=4",
    "data.batch_questions=5": "data.batch_questions=5 is more than the 4 questions",
    "data.path=reasoning_gym:": "reasoning_gym: names no task",
    "data.path=q.csv": "q.csv is neither .jsonl nor .parquet",
    "model.path=gone": "model directory gone does not exist",
    "model.megatron=gone": "model.megatron: gone is not a",
    "rollout.engine=replay": "rollout.engine=replay needs rollout.replay_dir",
    "rollout.samples_per_question=7": "rollout.samples_per_question=7 cannot be shared out",
    "train.optimizer_steps_per_batch=5": "train.optimizer_steps_per_batch=5 does not divide the 32 responses",
    "run.dir=m": "run.dir=m is model.path=m",
    "run.dir=m/run": "run.dir=m/run is inside model.path=m",
    "run.dir=q.jsonl": "run.dir=q.jsonl cannot be a directory",
    "run.dir=''": "run.dir is empty; give a directory, or . for the current one",
    "run.dir=/": "run.dir=/ is the root of the file system",
    "run.dir=~nobody-here": "run.dir=~nobody-here: there is no home directory for ~nobody-here",
}


@pytest.mark.parametrize("override", WRONG)
def test_config_and_train_refuse_a_wrong_input_in_the_same_words(work, override):
    text = of_config(override)
    assert text.startswith(WRONG[override]) and text == of_train(override)
    assert "\n" not in text and not (work / "r").exists()


def test_a_good_configuration_is_printed_and_nothing_is_written(work):
    before = sorted(work.rglob("*"))
    result = CliRunner().invoke(
        cli.app,
        ["config", "c.yaml", 'rollout.server.environment={A: "${oc.env:HOME}"}', "rollout.normal.top_k=5"],
        catch_exceptions=False,
    )
    assert result.exit_code == 0 and sorted(work.rglob("*")) == before
    start = result.stdout.partition("\n--- train would start ---\n")[2].splitlines()
    assert [line.split()[0] for line in start] == ["model", "data", "layout", "engine", "reward", "run", "prompts"]
    assert start[-1] == "prompts  4 fit data.max_prompt_tokens=2048, 0 do not"
    assert "A: ${oc.env:HOME}" in result.stdout and "rollout.normal.top_k=5 cut the sampling" in result.stderr


def test_what_is_found_only_when_prompts_are_built(work):
    assert of_config("data.max_prompt_tokens=3").startswith("data.max_prompt_tokens=3 drops all 4 questions")
    (work / "q.jsonl").write_text(
        (work / "q.jsonl").read_text() + json.dumps({"question": "long " * 100, "answer": "x"}) + "\n"
    )
    assert of_config("data.max_prompt_tokens=600", "data.batch_questions=5").startswith(
        "data.batch_questions=5 is more than the 4 questions of q.jsonl that fit data.max_prompt_tokens=600; lower"
    )
    long_prompt = f"eval.prompts.low={'wordy ' * 200}"
    error = of_config("data.max_prompt_tokens=600", "eval.path=q.jsonl", long_prompt)
    assert error.startswith("eval.prompts.low makes a prompt of ")
    assert check_prompts(load_config("c.yaml", ["data.max_prompt_tokens=600"])).dropped == 1


def test_only_the_first_of_many_questions_are_built(work, monkeypatch):
    from megatron_policysplit.training import prompt_check

    monkeypatch.setattr(prompt_check, "CHECKED", 2)
    config = load_config("c.yaml", [])
    line = check_prompts(config).line(config.data)
    assert line == "prompts  of the first 2 questions, 2 fit data.max_prompt_tokens=2048, 0 do not"


def test_a_run_does_not_write_where_its_input_stands(work):
    def refusal(*overrides: str) -> str:
        with pytest.raises(ConfigError) as error:
            check_places(load_config("c.yaml", list(overrides)))
        return str(error.value)

    shutil.copytree(work / "m", work / "r" / "hf")
    end = " is what the run in run.dir=r writes itself; give another run.dir"
    assert refusal("model.path=r/hf") == "model.path=r/hf" + end
    own = [
        "modes.high_entropy_prompt_file=r/hf/p.txt",
        "data.path=r/rollouts/a.jsonl",
        "eval.path=./r/metrics.jsonl",
        "model.megatron=r/checkpoints/step_1",
    ]
    for override in own:
        assert refusal(override) == override + end
    assert refusal("rollout.replay_dir=r/rollouts") == "rollout.replay_dir=r/rollouts" + end
    assert refusal("weight_sync.directory=m/x").startswith("weight_sync.directory=m/x is in model.path=m, whose files")
    (work / "link").symlink_to(work / "m")
    assert refusal("run.dir=link/x").startswith("run.dir=link/x is inside model.path=m, and a run would put its ")
    # The directory of data, model and configuration, and questions that serve twice, are all right.
    for overrides in (["run.dir=."], ["eval.path=q.jsonl"], ["model.path=r/model"], ["data.path=r/train.jsonl"]):
        check_places(load_config("c.yaml", overrides))


def test_a_run_is_resumed_whatever_way_its_paths_are_spelt(work, monkeypatch):
    prepare_run_dir(load_config("c.yaml", []))
    (work / "r" / "metrics.jsonl").write_text("{}\n")
    monkeypatch.setenv("HOME", str(work))
    for overrides in (["model.path=./m"], [f"model.path={work}/m", "data.path=~/q.jsonl"], ["run.dir=./r"]):
        assert check_run_dir(load_config("c.yaml", overrides))
    shutil.copytree(work / "m", work / "m2")
    with pytest.raises(ConfigError) as error:
        check_run_dir(load_config("c.yaml", ["model.path=m2"]))
    assert str(error.value) == (
        "run.dir=r holds another run, with model.path=m where this one has m2; give another run.dir, or go on with "
        "that run by model.path=m"
    )


def test_a_secret_of_the_environment_is_not_left_in_the_run_directory(work, monkeypatch):
    monkeypatch.setenv("TOKEN", "s3cret")
    secret = 'rollout.server.environment={HF_TOKEN: "${oc.env:TOKEN}"}'
    old = os.umask(0)
    try:
        prepare_run_dir(load_config("c.yaml", [secret]))
        prepare_run_dir(load_config("c.yaml", [secret]))
    finally:
        os.umask(old)
    file = work / "r" / "config.yaml"
    assert "s3cret" not in file.read_text() and "HF_TOKEN: ${oc.env:TOKEN}" in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    (work / "r" / "metrics.jsonl").write_text("{}\n")
    for value in ("another", None):
        monkeypatch.setenv("TOKEN", value) if value else monkeypatch.delenv("TOKEN")
        assert preflight(load_config("c.yaml", [secret] if value else [])).resumes


@pytest.mark.parametrize("command", ["generate", "eval", "report", "convert"])
def test_no_shell_expands_a_tilde_behind_an_equals_sign(work, monkeypatch, command):
    monkeypatch.setenv("HOME", str(work / "home"))
    arguments = {
        "generate": ["--model=~/m", "hi"],
        "eval": ["--model=~/m", "--data=q.jsonl"],
        "report": [".", "--output=~/a.html"],
        "convert": ["hf-to-megatron", "--hf=~/m", "--out=~/out"],
    }[command]
    with pytest.raises((ConfigError, ModelError, DataError), match=f"{work}/home"):
        CliRunner().invoke(cli.app, [command, *arguments], catch_exceptions=False)
    arguments = [text.replace("~/", "~nobody-here/") for text in arguments]
    with pytest.raises(ConfigError, match="=~nobody-here/.*: there is no home directory for ~nobody-here; give"):
        CliRunner().invoke(cli.app, [command, *arguments], catch_exceptions=False)


def test_a_training_in_the_run_directory_is_a_warning(work):
    from megatron_policysplit.training.run_dir import locked_run_dir

    with locked_run_dir(load_config("c.yaml", [])):
        result = CliRunner().invoke(cli.app, ["config", "c.yaml"])
    assert result.exit_code == 0 and "--- train would start ---" in result.stdout
    assert "warning: run.dir=r is in use" in result.stderr, result.stderr
