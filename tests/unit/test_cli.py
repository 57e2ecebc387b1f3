"""The commands as a user calls them, on a tiny random model; exit codes, messages, and who starts the ranks."""

import json
import os
import resource
import subprocess
import sys
import types
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from megatron_policysplit import __version__
from megatron_policysplit import errors as exit_codes
from megatron_policysplit.cli import main as cli
from megatron_policysplit.config import ModesConfig
from megatron_policysplit.config.load import load_config, to_dict
from megatron_policysplit.data import prompts as modes
from megatron_policysplit.data.prompts import DEFAULT_HIGH_ENTROPY_PROMPT
from megatron_policysplit.data.questions import Question
from megatron_policysplit.data.tokenizer import load_tokenizer
from megatron_policysplit.distributed import launch
from megatron_policysplit.errors import ConfigError, ModelError
from megatron_policysplit.evaluation.responder import Responder
from megatron_policysplit.rollout.engine import Sampling
from megatron_policysplit.rows import MODES, Mode
from tests.support.commands import invoke
from tests.support.toy_chat import make_chat_model

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def config(model, tmp_path) -> Path:
    rows = [{"question": f"What is {i}+1?", "answer": i + 1} for i in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "model": {"path": str(model)},
        "data": {"path": str(tmp_path / "data.jsonl"), "batch_questions": 4},
        "run": {"dir": str(tmp_path / "run")},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "run.yaml"


@pytest.fixture
def environ(monkeypatch):
    """os.environ as no launcher left it; the test's own changes are undone."""
    before = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    monkeypatch.setattr(os, "environ", before)
    return before


@pytest.fixture
def worker(monkeypatch):
    """A worker in place of the real one: records its arguments and environment, returns `code`."""
    module = types.ModuleType("megatron_policysplit.training.worker")
    module.calls, module.code = [], 0

    def main(argv):
        module.calls.append((argv, {name: os.environ[name] for name in RANK_VARIABLES if name in os.environ}))
        return module.code

    module.main, module.leave = main, sys.exit
    monkeypatch.setitem(sys.modules, "megatron_policysplit.training.worker", module)
    monkeypatch.setattr(sys.modules["megatron_policysplit"], "worker", module, raising=False)
    return module


def call(*arguments, **environ) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "megatron_policysplit.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environ)


def test_help_answers_at_once():
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert "train" in call("--help").stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.5
    heavy = "{'torch', 'transformers', 'megatron', 'pyarrow', 'matplotlib', 'sympy', 'omegaconf', 'numpy'}"
    code = f"import sys, megatron_policysplit.cli; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_version_and_documented_exit_codes():
    assert invoke("--version") == f"policysplit {__version__}\n"
    text = " ".join(invoke("train", "--help").split())
    assert "0 done; 1 failed; 2 bad input, nothing was started; 75 stopped by SIGTERM or SIGINT" in text
    codes = (exit_codes.DONE, exit_codes.FAILED, exit_codes.BAD_INPUT, exit_codes.STOPPED)
    assert codes == (0, 1, 2, os.EX_TEMPFAIL)


def test_help_is_whole_and_plain():
    listed = invoke("--help")
    assert "..." not in listed.partition("Commands:")[2]
    usages = {
        "train": "train [OPTIONS] CONFIG [KEY=VALUE]...",
        "generate": "generate [OPTIONS] QUESTION",
        "eval": "eval [OPTIONS]",
        "report": "report [OPTIONS] RUN...",
        "study": "study [OPTIONS] STUDY",
        "config": "config [OPTIONS] CONFIG [KEY=VALUE]...",
    }
    for command, usage in usages.items():
        text = invoke(command, "--help")
        assert text.splitlines()[0].endswith(f" {usage}")
        assert f"  {command} " in listed and " range>" not in text
    assert "--samples N " in invoke("generate", "--help")


def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    missing = tmp_path / "no.yaml"
    for command in ("train", "config"):
        result = call(command, missing)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr == f"error: configuration file {missing} does not exist\n"


TORCHRUN = {"WORLD_SIZE": "8", "MASTER_ADDR": "node0", "MASTER_PORT": "1234"}
SRUN = {"SLURM_NTASKS": "8", "SLURM_STEP_ID": "0", "MASTER_ADDR": "node0", "MASTER_PORT": "1234"}


@pytest.mark.parametrize(
    ("ranks", "prefix"),
    [
        (TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0"}, ""),
        (TORCHRUN | {"RANK": "4", "LOCAL_RANK": "0"}, "rank 4: "),
        (TORCHRUN | {"RANK": "5", "LOCAL_RANK": "1"}, None),
        (TORCHRUN | {"RANK": "1"}, "rank 1: "),  # which node it is on was not told
        (SRUN | {"SLURM_PROCID": "4", "SLURM_LOCALID": "0"}, "rank 4: "),
        (SRUN | {"SLURM_PROCID": "5", "SLURM_LOCALID": "1"}, None),
    ],
)
def test_the_first_rank_of_every_node_tells_the_error(tmp_path, environ, monkeypatch, capsys, ranks, prefix):
    environ.update(ranks)
    monkeypatch.setattr(sys, "argv", ["policysplit", "train", str(tmp_path / "no.yaml")])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    text = "" if prefix is None else f"{prefix}error: configuration file {tmp_path / 'no.yaml'} does not exist\n"
    assert (exit.value.code, *capsys.readouterr()) == (2, "", text)


LEFT_OVER = TORCHRUN | {"RANK": "1", "LOCAL_RANK": "1"}


@pytest.mark.parametrize("ranks", [{"RANK": "3"}, {"RANK": "", "WORLD_SIZE": ""}, LEFT_OVER, {"WORLD_SIZE": "abc"}])
@pytest.mark.parametrize(
    "command",
    ["report no", "config no.yaml", "study no.yaml", "serve no.yaml", "convert inspect no", "generate --model no x"],
)
def test_commands_of_one_process_tell_their_errors_whatever_is_left(environ, monkeypatch, capsys, ranks, command):
    environ.update(ranks)
    monkeypatch.setattr(sys, "argv", ["policysplit", *command.split()])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.startswith("error: ") and " no" in error, error


@pytest.mark.parametrize("command", ["train no.yaml", "convert hf-to-megatron --hf no --out out"])
@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"RANK": "3", "LOCAL_RANK": "3"}, "RANK=3 is set but WORLD_SIZE is not; set it if "),
        ({"RANK": "", "WORLD_SIZE": ""}, "RANK= and WORLD_SIZE= are set but "),
        (TORCHRUN | {"RANK": "x"}, "RANK=x is not a whole number from 0 to 7 (of WORLD_SIZE=8); set it right if "),
    ],
)
def test_ranks_with_wrong_variables_tell_it(environ, monkeypatch, capsys, command, ranks, message):
    environ.update(ranks)
    monkeypatch.setattr(sys, "argv", ["policysplit", *command.split()])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 2 and capsys.readouterr().err.startswith(f"error: {message}")


def test_a_rank_alone_is_refused_before_anything_is_written(config, environ, worker):
    environ["RANK"] = "3"
    with pytest.raises(ConfigError, match="^RANK=3 is set but WORLD_SIZE is not; "):
        cli.run_training([str(config)])
    assert worker.calls == [] and not (config.parent / "run").exists()


def test_variables_of_no_rank_are_overwritten(config, environ, worker):
    environ.update({"WORLD_SIZE": "8", "LOCAL_RANK": "5", "MASTER_PORT": "x"})
    cli.run_training([str(config)])
    [(_, ranks)] = worker.calls
    assert ranks | {"MASTER_PORT": ""} == launch.rank_environment(0, 1, 0) | {"MASTER_PORT": ""}
    assert (config.parent / "run" / "config.yaml").exists()


def test_train_with_one_rank_runs_in_this_process(config, environ, worker, capsys):
    worker.code = 75
    assert cli.run_training([str(config), "train.steps=3"]) == 75
    [(argv, ranks)] = worker.calls
    assert argv == [str(config), "train.steps=3"]
    assert ranks | {"MASTER_PORT": ""} == launch.rank_environment(0, 1, 0) | {"MASTER_PORT": ""}
    written = load_config(str(config.parent / "run" / "config.yaml"), [])
    assert written == load_config(str(config), ["train.steps=3"])
    assert "data     4 questions\n" in capsys.readouterr().out


def test_train_returns_the_exit_code(config, environ, worker):
    worker.code = 75
    assert CliRunner().invoke(cli.app, ["train", str(config)]).exit_code == 75


def test_train_with_several_ranks_launches_them(config, environ, worker, monkeypatch):
    launched = []
    monkeypatch.setattr(launch, "launch", lambda argv, nproc, inherited: launched.append((argv, nproc)) or 7)
    argv = [str(config), "parallel.tensor=2", "parallel.pipeline=2"]
    assert cli.run_training(argv) == 7
    assert launched == [(argv, 4)]
    assert worker.calls == [] and (config.parent / "run" / "config.yaml").exists()


def test_train_checks_before_anything_starts(config, environ, worker):
    with pytest.raises(ConfigError, match="^parallel.tensor=4 does not divide num_key_value_heads=2"):
        cli.run_training([str(config), "parallel.tensor=4"])
    assert worker.calls == [] and not (config.parent / "run").exists()


def test_train_under_torchrun(config, environ, worker, capsys):
    started = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    environ.update(started)
    worker.code = 75
    with pytest.raises(SystemExit, match="75"):  # a rank does not return: it leaves without exit handlers
        cli.run_training([str(config), "parallel.data=2"])
    assert worker.calls == [([str(config), "parallel.data=2"], started)]
    assert capsys.readouterr().out == "" and not (config.parent / "run").exists()
    with pytest.raises(ConfigError, match="^WORLD_SIZE=2 ranks were started, but parallel.tensor=1 x "):
        cli.run_training([str(config)])


def test_config_prints_the_resolved_configuration_and_both_prompts(config):
    output = invoke("config", config, "train.steps=9")
    resolved, normal, high_entropy, start = output.split("\n--- ")
    assert yaml.safe_load(resolved) == to_dict(load_config(str(config), ["train.steps=9"]))
    question = "<|im_start|>user\nWhat is 0+1?<|im_end|>\n<|im_start|>assistant\n"
    assert normal == f"normal prompt of the first question ---\n{question}\n"
    system = f"<|im_start|>system\n{DEFAULT_HIGH_ENTROPY_PROMPT}<|im_end|>\n"
    assert high_entropy == f"high_entropy prompt of the first question ---\n{system}{question}\n"
    assert start.startswith("train would start ---\nmodel    ") and start.count("\n") == 8
    assert "\nreward   math gives the first questions' own answers 1, 1, 1 as text and 1, 1, 1 in \\boxed{}\n" in start


def test_config_refuses_and_warns(config):
    result = call("config", config, "rollout.samples_per_question=7")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: rollout.samples_per_question=7 cannot be shared out ")
    result = call("config", config, "rollout.normal.top_k=7")
    assert result.returncode == 0
    assert "warning: rollout.normal.top_k=7 cut the sampling" in result.stderr


def test_generate_shows_the_modes_side_by_side(model):
    arguments = ["generate", "--model", model, "--max-tokens", 6, "Why?"]
    both = invoke(*arguments)
    assert "normal" in both and "high-entropy" in both and both.count("[6 tokens, cut, ") == 2
    assert both == invoke(*arguments)
    assert both != invoke(*arguments, "--seed", 1)
    assert both != invoke(*arguments, "--temperature", 0.2)
    assert both != invoke(*arguments, "--high-entropy-prompt", "Be wild.")
    one = invoke(*arguments, "--mode", "high_entropy", "--samples", 3)
    assert "normal" not in one and one.count("[6 tokens, cut, ") == 3
    greedy = [*arguments, "--mode", "normal", "--max-tokens", 1]
    assert "[1 token, cut, " in invoke(*greedy)
    # The one most likely token, whichever filter leaves it alone and whatever the seed.
    alone = invoke(*greedy, "--top-k", 1)
    assert alone == invoke(*greedy, "--top-p", 1e-6) == invoke(*greedy, "--top-k", 1, "--seed", 7)
    assert len({invoke(*greedy, "--seed", seed) for seed in range(3)} - {alone}) >= 1


def test_generate_takes_the_prompts_of_a_run(model, tmp_path, monkeypatch):
    seen = []

    class Recorder(modes.PromptBuilder):
        def __init__(self, tokenizer, config, **rest):
            seen.append(config)
            super().__init__(tokenizer, config, **rest)

    monkeypatch.setattr(modes, "PromptBuilder", Recorder)
    given = {"high_entropy_prompt": "Be wild.", "template_system": "drop", "chat_template_kwargs": {"thinking": False}}
    content = {"model": {"path": "elsewhere"}, "data": {"path": "no.jsonl"}, "run": {"dir": "no"}, "modes": given}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(content))
    arguments = ["generate", "--model", model, "--max-tokens", 3, "--mode", "high_entropy", "Why?"]
    assert invoke(*arguments, "--config", file) == invoke(*arguments, "--high-entropy-prompt", "Be wild.")
    assert seen == [ModesConfig(**given), ModesConfig(high_entropy_prompt="Be wild.")]
    for option in ("--high-entropy-prompt", "--high-entropy-prompt-file"):
        with pytest.raises(ConfigError, match=f"^--config {file} brings the prompts, and so does {option}; give one "):
            invoke(*arguments, "--config", file, option, "x")


def test_generate_with_bad_input(tmp_path, model):
    result = call("generate", "--model", tmp_path / "no", "Why?")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: model directory {tmp_path / 'no'} does not exist; ")
    arguments = ["generate", "--model", str(model), "Why?"]
    for option, value in [("mode", "wild"), ("top-k", "0"), ("top-p", "1.1"), ("top-p", "nan"), ("temperature", "inf")]:
        result = CliRunner().invoke(cli.app, [*arguments, f"--{option}", value])
        assert result.exit_code == 2 and f"--{option}" in result.output


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        ("foo", "is not a name that torch knows; use cpu, cuda or cuda:1$"),
        ("", "is not a name that torch knows; use cpu, cuda or cuda:1$"),
        ("cuda:99", r"cannot be used on this machine \(.*\); use cpu, or cuda where there is a GPU "),
        ("meta", r"cannot be used on this machine \(.*\); use cpu, or cuda where there is a GPU "),
    ],
)
def test_a_device_that_cannot_be_used(model, device, reason):
    with pytest.raises(ConfigError, match=f"^device '{device}' {reason}"):
        invoke("generate", "--model", model, "--device", device, "Why?")


def test_a_tokenizer_that_cannot_be_loaded(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=f"^cannot load the tokenizer in {tmp_path}: "):
        load_tokenizer(str(tmp_path))


def test_responses_are_sorted_seeded_and_differ_by_mode(model):
    responder = Responder(str(model), ModesConfig(), max_batch_samples=3)
    questions = [Question(index, [{"role": "user", "content": f"{index}?"}], None, {}) for index in (4, 2)]
    seen = []
    responses = responder.respond(questions, MODES, 2, Sampling(1.0, 1.0, -1, 5), 0, lambda: seen.append(1))
    assert len(seen) == len(responses) == 8
    keys = [(response.question, response.mode.value, response.sample) for response in responses]
    assert keys == sorted((q, mode.value, sample) for q in (2, 4) for mode in MODES for sample in range(2))
    assert all(len(r.surprisals) == 5 or not r.truncated for r in responses)
    assert len({tuple(response.surprisals) for response in responses}) == 8
    # A response depends neither on the other questions nor on the other mode.
    alone = responder.respond(questions[1:], [Mode.NORMAL], 1, Sampling(1.0, 1.0, -1, 5), 0)
    match = next(r for r in responses if (r.question, r.mode, r.sample) == (2, Mode.NORMAL, 0))
    assert alone[0].text == match.text and alone[0].surprisals == pytest.approx(match.surprisals, abs=1e-5)


def test_eval_measures_both_modes(model, config, tmp_path, monkeypatch):
    (tmp_path / "toy_reward.py").write_text("def reward(response, question):\n    return float(len(response) % 2)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = ["eval", "--model", model, "--data", tmp_path / "data.jsonl", "--reward", "toy_reward:reward"]
    arguments += ["--samples", 3, "--questions", 2, "--max-tokens", 6, "--seed", 5, "--workers", 1]
    config.write_text(config.read_text() + "modes: {high_entropy_prompt: Be wild.}\n")
    arguments += ["--config", config, "--top-p", 0.9, "--top-k", 50]
    table = invoke(*arguments, "--output", "numbers.json")
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert (numbers["questions"], numbers["samples"], numbers["seed"]) == (2, 3, 5)
    sampling, prompts = Sampling(1.0, 0.9, 50, 6), ModesConfig(high_entropy_prompt="Be wild.")
    assert {name: numbers[name] for name in asdict(sampling)} == asdict(sampling)
    assert numbers["prompts"] == asdict(prompts)
    assert "normal" in table and "high-entropy" in table

    questions = [Question(i, [{"role": "user", "content": f"What is {i}+1?"}], str(i + 1), {}) for i in range(2)]
    responses = Responder(str(model), prompts).respond(questions, MODES, 3, sampling, 5)
    for mode in MODES:
        texts = [[r.text for r in responses if r.mode == mode and r.question == q.id] for q in questions]
        right = [[text for text in row if len(text) % 2] for row in texts]
        found = numbers["modes"][mode.value]
        assert found["accuracy"] == pytest.approx((len(right[0]) + len(right[1])) / 6)
        assert found["best_of_k"] == (bool(right[0]) + bool(right[1])) / 2
        assert found["unique_correct"] == (len({*map(str.strip, right[0])}) + len({*map(str.strip, right[1])})) / 2
        assert f"{found['accuracy']:.3f}" in table


def test_eval_with_bad_input(model, tmp_path):
    arguments = ["eval", "--model", model, "--data", tmp_path / "no.jsonl"]
    result = call(*arguments)
    assert result.returncode == 2 and result.stderr.startswith(f"error: {tmp_path / 'no.jsonl'} does not exist")
