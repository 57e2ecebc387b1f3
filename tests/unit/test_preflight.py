"""What is refused before anything starts: every message, and what a good configuration reports."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_policysplit.config.load import load_config, to_yaml
from megatron_policysplit.errors import CheckpointError, ConfigError, DataError, ModelError, UserError
from megatron_policysplit.training.preflight import preflight
from megatron_policysplit.training.run_dir import check_run_dir, prepare_run_dir
from tests.support.toy_chat import make_chat_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def data(tmp_path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"question": f"{i}+1?", "answer": i + 1}) + "\n" for i in range(5)))
    return path


@pytest.fixture
def configure(model, data, tmp_path):
    def build(*overrides: str):
        given = [f"model.path={model}", f"data.path={data}", f"run.dir={tmp_path / 'run'}", "data.batch_questions=4"]
        return load_config(None, [*given, *overrides])

    return build


@pytest.fixture
def copy(model, tmp_path):
    """A copy of the model to damage."""
    return Path(shutil.copytree(model, tmp_path / "copy"))


def message(call, *arguments, kind: type[UserError] = ConfigError) -> str:
    with pytest.raises(kind) as error:
        call(*arguments)
    return str(error.value)


def test_what_a_good_configuration_reports(configure, data, tmp_path):
    overrides = [
        "parallel.tensor=2",
        "parallel.data=3",
        f"eval.path={data}",
        "eval.questions=3",
        "rollout.normal.top_k=5",
    ]
    config = configure(*overrides)
    found = preflight(config)
    assert (found.architecture, found.train_questions, found.eval_questions) == ("Qwen3ForCausalLM", 5, 3)
    assert (found.ranks, found.resumes, len(found.warnings)) == (6, False, 1)
    from safetensors import safe_open

    with safe_open(Path(config.model.path) / "model.safetensors", "pt") as tensors:
        assert found.parameters == sum(tensors.get_tensor(name).numel() for name in tensors.keys())
    lines = found.lines(config)
    assert lines[1] == "data     5 questions, 3 for evaluation"
    assert lines[2] == "layout   tensor 2 x pipeline 1 x data 3 = 6 ranks"
    assert lines[-1].startswith("warning: rollout.normal.top_k=5 cut the sampling")
    config.parallel.expert = 3
    assert found.lines(config)[2] == "layout   tensor 2 x pipeline 1 x data 3 = 6 ranks, experts over 3 replicas"
    refused = message(preflight, configure("parallel.data=2", "parallel.expert=2"))
    assert refused == "parallel.expert=2, but Qwen3ForCausalLM has no experts; use 1"
    assert not (tmp_path / "run").exists()


def test_no_torch_is_imported(configure, tmp_path):
    (tmp_path / "run.yaml").write_text(to_yaml(configure()))
    code = (
        "import sys; from megatron_policysplit.config.load import load_config; "
        "from megatron_policysplit.training.preflight import preflight; "
        "from megatron_policysplit.training.run_dir import prepare_run_dir; "
        "config = load_config(sys.argv[1], []); preflight(config); prepare_run_dir(config); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "run.yaml")]).returncode == 0


def test_keys_are_checked_first(configure):
    assert message(preflight, configure("rollout.samples_per_question=5")).startswith("rollout.samples_per_question=5 ")


def test_model_directory(configure, copy, tmp_path):
    gone = tmp_path / "gone"
    text = message(preflight, configure(f"model.path={gone}"), kind=ModelError)
    assert text == f"model directory {gone} does not exist; give a directory with config.json and safetensors"
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"architectures": ["MambaForCausalLM"]}))
    text = message(preflight, configure(f"model.path={copy}"), kind=ModelError)
    assert "'MambaForCausalLM' is not supported; supported are " in text


def test_layout_that_does_not_divide_the_model(configure):
    text = message(preflight, configure("parallel.tensor=4"))
    assert text == "parallel.tensor=4 does not divide num_key_value_heads=2 of the model; use 1 or 2"
    text = message(preflight, configure("parallel.pipeline=3"))
    assert text == "parallel.pipeline=3 does not divide num_hidden_layers=4 of the model; use 1, 2 or 4"


def test_weights_that_are_missing_or_cut_short(configure, copy):
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    text = message(preflight, configure(f"model.path={copy}"), kind=ModelError)
    assert text == f"{weights} is cut short or damaged: expected {len(whole)} bytes, found {len(whole) - 100}"
    weights.unlink()
    text = message(preflight, configure(f"model.path={copy}"), kind=ModelError)
    assert text.startswith(f"{copy} has neither model.safetensors nor model.safetensors.index.json; ")


def test_tokenizer_without_chat_template(configure, copy):
    (copy / "chat_template.jinja").unlink()
    text = message(preflight, configure(f"model.path={copy}"), kind=ModelError)
    assert text.startswith(f"the tokenizer of model.path={copy} has no chat template; ")


def test_directory_without_a_tokenizer(configure, copy):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (copy / name).unlink()
    text = message(preflight, configure(f"model.path={copy}"), kind=ModelError)
    assert text.startswith(f"{copy} has no tokenizer: tokenizer.json is missing ")


def test_stop_tokens_are_checked(configure, copy):
    (copy / "generation_config.json").write_text('{"eos_token_id": "<|im_end|>"}')
    text = message(preflight, configure(f"model.path={copy}"), kind=ModelError)
    assert text.startswith(f'{copy / "generation_config.json"}: eos_token_id="<|im_end|>" is neither a token id nor ')


def test_tokens_without_embedding_are_warned_of(configure, copy):
    content = json.loads((copy / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 300, "content": "hi"})
    (copy / "tokenizer.json").write_text(json.dumps(content))
    assert preflight(configure(f"model.path={copy}")).warnings == [
        f"the tokenizer of model.path={copy} has 1 token that the model has no embedding for, such as 'hi' of id 300 "
        "with vocab_size=258; a prompt with one is refused"
    ]


def test_more_positions_than_the_model_has(configure):
    assert preflight(configure("data.max_prompt_tokens=3072")).train_questions == 5
    text = message(preflight, configure("data.max_prompt_tokens=3073"))
    assert text == (
        "data.max_prompt_tokens=3073 + rollout.max_response_tokens=1024 = 4097 positions are more than the 4096 of the "
        "model (max_position_embeddings in config.json); use at most data.max_prompt_tokens=3072 (longer prompts are "
        "dropped), or lower rollout.max_response_tokens"
    )


def test_high_entropy_prompt_file(configure, tmp_path):
    text = message(preflight, configure(f"modes.high_entropy_prompt_file={tmp_path / 'no.txt'}"))
    assert text.startswith(f"modes.high_entropy_prompt_file={tmp_path / 'no.txt'} cannot be read (No such file")


def test_data(configure, data, tmp_path):
    text = message(preflight, configure("data.batch_questions=6"))
    assert text == f"data.batch_questions=6 is more than the 5 questions of data.path={data}; use at most 5"
    (tmp_path / "empty.jsonl").write_text("")
    text = message(preflight, configure(f"data.path={tmp_path / 'empty.jsonl'}"), kind=DataError)
    assert text == f"{tmp_path / 'empty.jsonl'} holds no questions"
    with data.open("a") as stream:
        stream.write('{"text": "x"}\n')
    text = message(preflight, configure(), kind=DataError)
    assert text.startswith(f"{data}:6 has the columns text; needed are ")
    text = message(
        preflight, configure(f"eval.path={tmp_path / 'no.jsonl'}", "data.path=reasoning_gym:chain_sum"), kind=DataError
    )
    assert text.startswith(f"{tmp_path / 'no.jsonl'} does not exist")


def test_replay_directory(configure, tmp_path):
    text = message(preflight, configure("rollout.engine=replay", f"rollout.replay_dir={tmp_path / 'no'}"))
    assert text == f"rollout.replay_dir={tmp_path / 'no'} is not a directory; give the rollouts/ directory of a run"


def test_reward_that_does_not_import(configure):
    text = message(preflight, configure("reward.function=no.such:thing"))
    assert text.startswith("reward.function=no.such:thing cannot be imported: ModuleNotFoundError")
    text = message(preflight, configure("reward.function=mathh"))
    assert text.startswith("reward.function=mathh is not one of math, reasoning_gym, exact and not of the form ")


def test_the_same_run_is_resumed(configure, tmp_path):
    config = configure("data.options={}")
    prepare_run_dir(config)
    assert load_config(str(tmp_path / "run" / "config.yaml"), []) == config
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]
    assert not preflight(config).resumes
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    longer = configure("train.steps=500", "parallel.tensor=2", "log.console=false")
    found = preflight(longer)
    assert found.resumes
    assert found.lines(longer)[-1] == f"run      {tmp_path / 'run'} (resumed if it holds a checkpoint)"


def test_a_directory_that_holds_another_run(configure, tmp_path):
    prepare_run_dir(configure("train.learning_rate=1e-6"))
    run = tmp_path / "run"
    assert not preflight(configure("train.learning_rate=1e-5")).resumes  # nothing has been trained there yet
    (run / "metrics.jsonl").write_text("{}\n")
    assert message(preflight, configure("train.learning_rate=1e-5")) == (
        f"run.dir={run} holds another run, with train.learning_rate=1e-06 where this one has 1e-05; "
        "give another run.dir, or go on with that run by train.learning_rate=1e-06"
    )
    assert "modes.high_entropy_prompt=null where this one has Think." in message(
        preflight, configure("modes.high_entropy_prompt=Think.")
    )
    (run / "config.yaml").write_text("steps: 5\n")
    assert message(preflight, configure()) == (
        f"run.dir={run} holds a run whose configuration cannot be read (unknown key steps; did you mean train.steps?); "
        f"restore {run}/config.yaml, or give another run.dir"
    )


def test_a_run_directory_that_cannot_be_written(configure, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "run"
    text = message(check_run_dir, configure(f"run.dir={path}"))
    assert text == f"run.dir={path} cannot be a directory: {tmp_path / 'file'} is a file; give another run.dir"
    assert message(prepare_run_dir, configure(f"run.dir={path}")).startswith(f"run.dir={path} cannot be written: ")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    text = message(check_run_dir, configure())
    assert text == f"run.dir={tmp_path / 'run'} cannot be written: no permission in {tmp_path}; give another run.dir"


def test_weights_to_start_from_are_checked(configure, model, copy, tmp_path):
    from checkpoints_conv.hf_to_megatron import hf_to_megatron

    converted = tmp_path / "converted"
    hf_to_megatron(model, converted)
    config = configure(f"model.megatron={converted}")
    assert preflight(config).lines(config)[0].endswith(f", weights of {converted}")

    absent = configure(f"model.megatron={tmp_path / 'absent'}")
    assert message(preflight, absent, kind=CheckpointError).startswith(
        f"model.megatron: {tmp_path / 'absent'} is not a"
    )
    theta = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**theta, "rms_norm_eps": 0.5}))
    other = configure(f"model.megatron={converted}", f"model.path={copy}")
    assert "model.megatron: config.json: rms_norm_eps=" in message(preflight, other, kind=ModelError)
    data = next(converted.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-4000])
    assert f"{data} is cut short" in message(preflight, config, kind=CheckpointError)
