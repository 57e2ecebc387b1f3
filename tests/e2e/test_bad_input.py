"""What `policysplit train` refuses: one line on stderr, exit code 2, and no rank has started."""

import json
import shutil
from pathlib import Path

import pytest

from megatron_policysplit.cli import main as cli
from megatron_policysplit.distributed import launch
from tests.support import e2e


@pytest.fixture(autouse=True)
def no_rank_starts(monkeypatch):
    """And no RANK of an outer launcher."""
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launch, "launch", lambda *_: pytest.fail("ranks were started"))
    monkeypatch.syspath_prepend(str(e2e.ROOT))


@pytest.fixture
def refused(config, tmp_path, monkeypatch, capsys):
    """Runs `policysplit train` in this process; returns the error without its "error: "."""

    def train(*overrides: str, config: Path = config) -> str:
        monkeypatch.setattr("sys.argv", ["policysplit", "train", str(config), f"run.dir={tmp_path}/run", *overrides])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert ended.value.code == 2
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
        return err.removeprefix("error: ").rstrip("\n")

    return train


@pytest.fixture
def model(config, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(config.parent / "model", tmp_path / "model"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learning_rat=1", "unknown key train.learning_rat; did you mean train.learning_rate?"),
        ("rolout.engine=local", "unknown key rolout.engine; did you mean rollout.engine?"),
        ("train.steps=many", "train.steps=many is not an integer"),
        ("algorithm.name=ppo", "algorithm.name=ppo is not allowed; it must be one of "),
        ("parallel.tensor=4", "parallel.tensor=4 does not divide num_key_value_heads=2 of the model; use 1 or 2"),
        ("parallel.pipeline=3", "parallel.pipeline=3 does not divide num_hidden_layers=2 of the model; use 1 or 2"),
        ("parallel.data=0", "parallel.data=0 is not allowed; it must be at least 1"),
        (
            "rollout.samples_per_question=7",
            "rollout.samples_per_question=7 cannot be shared out among the modes (shares: normal 1, high_entropy 1); "
            "use a multiple of 2",
        ),
        (
            "train.optimizer_steps_per_batch=3",
            "train.optimizer_steps_per_batch=3 does not divide the 32 responses of a batch (data.batch_questions x "
            "rollout.samples_per_question); use one of 1, 2, 4",
        ),
        ("data.batch_questions=11", "data.batch_questions=11 is more than the 10 questions of data.path="),
        ("data.path=/nowhere.jsonl", "/nowhere.jsonl does not exist"),
        ("eval.path=/nowhere.jsonl", "/nowhere.jsonl does not exist"),
        ("model.path=/nowhere", "model directory /nowhere does not exist; give a directory with config.json and saf"),
        ("reward.function=no.such:thing", "reward.function=no.such:thing cannot be imported: ModuleNotFoundError"),
        (
            "reward.function=tests.support.e2e:nothing",
            "reward.function=tests.support.e2e:nothing: the module tests.support.e2e has no `nothing`",
        ),
        ("rollout.engine=replay", "rollout.engine=replay needs rollout.replay_dir, the rollouts/ directory of a run"),
        (
            "modes.high_entropy_prompt_file=/nowhere.txt",
            "modes.high_entropy_prompt and modes.high_entropy_prompt_file are both set; keep one of them",
        ),
    ],
)
def test_keys(refused, tmp_path, override, message):
    assert refused(override).startswith(message)
    assert not (tmp_path / "run").exists()


def test_a_variable_that_contradicts_the_configuration(refused, monkeypatch):
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    message = refused("train.deterministic=true")
    assert message.startswith("train.deterministic=true cannot keep its promise with NCCL_ALGO=Tree in the environment")


def test_configuration_file(refused, tmp_path):
    assert refused(config=tmp_path / "no.yaml") == f"configuration file {tmp_path / 'no.yaml'} does not exist"


def test_replay_knows_no_further_questions(refused, tmp_path):
    text = refused("rollout.engine=replay", f"rollout.replay_dir={tmp_path}", "eval.path=null", "algorithm.name=dapo")
    assert text.startswith("rollout.engine=replay cannot serve algorithm.name=dapo with dynamic sampling")


def test_replay_makes_no_evaluation(refused, tmp_path):
    text = refused("rollout.engine=replay", f"rollout.replay_dir={tmp_path}")
    assert text.startswith("rollout.engine=replay holds no responses to the questions of eval.path=")
    assert text.endswith("; set eval.path=null")


def test_tokenizer_without_chat_template(refused, model):
    (model / "chat_template.jinja").unlink()
    text = refused(f"model.path={model}")
    assert text.startswith(f"the tokenizer of model.path={model} has no chat template; ")


def test_unsupported_architecture(refused, model):
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": ["MambaForCausalLM"]}))
    assert "'MambaForCausalLM' is not supported; supported are " in refused(f"model.path={model}")


def test_safetensors_cut_short_and_missing(refused, model):
    file = model / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    expected = f"{file} is cut short or damaged: expected {len(whole)} bytes, found {len(whole) - 1}"
    assert refused(f"model.path={model}") == expected
    file.unlink()
    assert refused(f"model.path={model}").startswith(f"{model} has neither model.safetensors nor ")


def test_data_set(refused, tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text("")
    assert refused(f"data.path={file}") == f"{file} holds no questions"
    file.write_text('{"question": "1", "answer": "1"}\n{"text": "x"}\n')
    assert refused(f"data.path={file}").startswith(f"{file}:2 has the columns text; needed are ")
    file.write_text('{"question": "1", "answer": "1"}\n{"question": \n')
    assert refused(f"data.path={file}").startswith(f"{file}:2 is not JSON ")


def test_a_directory_with_another_run(refused, straight, tmp_path):
    directory = e2e.at_step(straight.directory, tmp_path / "run", 3)
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    assert refused("train.learning_rate=1e-5") == (
        f"run.dir={directory} holds another run, with train.learning_rate=0.001 where this one has 1e-05; "
        "give another run.dir, or go on with that run by train.learning_rate=0.001"
    )
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*")} == before


def test_a_checkpoint_of_another_model(refused, straight, config, tmp_path):
    """The same configuration, but the files under model.path are another model's now."""
    directory = e2e.at_step(straight.directory, tmp_path / "run", 3)
    path = directory / "checkpoints" / "step_000003"
    file = path / "trainer.json"
    meta = json.loads(file.read_text())
    meta["model"]["intermediate_size"] = 99
    file.write_text(json.dumps(meta))
    assert refused() == (
        f"{path} was saved from another model: intermediate_size=99 there but 192 in model.path; "
        "use that model or another run.dir"
    )
    file.unlink()
    assert refused().startswith(f"{path} is damaged (")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "data.max_prompt_tokens=3",
            "data.max_prompt_tokens=3 drops all 10 questions; the shortest needs 8 tokens in its longer mode",
        ),
    ],
)
def test_what_only_the_ranks_can_see_is_said_once(config, tmp_path, override, message, monkeypatch):
    """Prompts are built by the leader alone; every rank ends with its error, at once."""
    monkeypatch.undo()
    running = e2e.train_by_command(config, tmp_path / "run", override, code=2)
    assert running.errors == [f"error: {message}"], running.text()
