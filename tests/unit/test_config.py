"""Loading and checking of configurations: every message a user can get, and the page generated from the keys."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from megatron_policysplit.config import Config
from megatron_policysplit.config import docs as config_docs
from megatron_policysplit.config.checks import check_config
from megatron_policysplit.config.load import (
    KEYS,
    fingerprint,
    first_difference,
    load_config,
    to_dict,
    to_yaml,
    world_size,
)
from megatron_policysplit.errors import ConfigError

GIVEN = ["model.path=m", "data.path=d.jsonl", "run.dir=r"]


def load(*overrides: str, text: str | None = None, tmp_path: Path | None = None) -> Config:
    if text is None:
        return load_config(None, [*GIVEN, *overrides])
    (tmp_path / "run.yaml").write_text(text)
    return load_config(str(tmp_path / "run.yaml"), [*GIVEN, *overrides])


def message(call, *arguments, **keywords) -> str:
    with pytest.raises(ConfigError) as error:
        call(*arguments, **keywords)
    return str(error.value)


def test_defaults_then_file_then_overrides(tmp_path):
    text = """
    train: {steps: 20, learning_rate: 1e-5}
    rollout:
      normal: {temperature: 0.7}
    data: {options: {size: 10, nested: {a: 1}}}
    checkpoint:
    algorithm.kl_coef: 0.3
    """
    config = load("train.steps=7", "train.steps=8", "data.options.seed=3", text=text, tmp_path=tmp_path)
    assert (config.train.steps, config.train.learning_rate, config.algorithm.kl_coef) == (8, 1e-5, 0.3)
    assert (config.rollout.normal.temperature, config.rollout.high_entropy.temperature) == (0.7, 1.0)
    assert config.data.options == {"size": 10, "nested": {"a": 1}, "seed": 3}
    assert config.checkpoint == Config().checkpoint
    assert type(config) is Config and type(config.data.options) is dict


def test_values_are_read_as_yaml(monkeypatch):
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    config = load("run.dir=${oc.env:SCRATCH}/run", "modes.high_entropy_prompt='a=b: c'", "eval.questions=null")
    assert config.run.dir == "/scratch/me/run"
    assert config.modes.high_entropy_prompt == "a=b: c"
    assert config.eval.questions is None


def test_file_errors(tmp_path):
    missing = tmp_path / "none.yaml"
    assert message(load_config, str(missing), GIVEN) == f"configuration file {missing} does not exist"
    path = tmp_path / "run.yaml"
    for text, end in [
        ("train: {}\ntrain: {}\n", ", line 2 is not valid YAML: found duplicate key train"),
        ("- train\n", " is not a mapping of keys to values: it holds a list"),
        ("5\n", " is not a mapping of keys to values: it holds a single value"),
    ]:
        path.write_text(text)
        assert message(load_config, str(path), GIVEN) == f"configuration file {path}{end}"
    path.write_text("train: [1\n")
    start = f"configuration file {path}, line 2 is not valid YAML: "  # the reason is the YAML parser's
    assert message(load_config, str(path), GIVEN).startswith(start)
    path.write_bytes(b"run: \xff\xfe")
    assert message(load_config, str(path), GIVEN).endswith("is not valid YAML: it cannot be read as UTF-8 text")


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("train.learning_rat=1", "train.learning_rate"),
        ("trian.learning_rate=1", "train.learning_rate"),
        ("rollout.batch_questions=4", "data.batch_questions"),
        ("rollout.temperature=0.5", "rollout.normal.temperature"),
        ("learning_rate=1", "train.learning_rate"),
        ("seed=3", "run.seed"),
        ("rollout.normal.temprature=1", "rollout.normal.temperature"),
        ("data.option.size=5", "data.options"),
    ],
)
def test_unknown_keys_and_the_nearest_right_one(given, nearest, tmp_path):
    name, value = given.split("=")
    expected = f"unknown key {name}; did you mean {nearest}?"
    assert message(load, given) == expected
    nested = value
    for part in reversed(name.split(".")):
        nested = {part: nested}
    assert message(load, text=yaml.safe_dump(nested), tmp_path=tmp_path) == expected


def test_unknown_keys_that_resemble_none():
    keys = "tensor, pipeline, data, expert, sequence, timeout_seconds, silent_seconds"
    assert message(load, "parallel.tp=2") == f"unknown key parallel.tp; the keys of parallel are {keys}"
    groups = "model, parallel, data, modes, rollout, weight_sync, agreement, reward, algorithm, train, eval, "
    groups += "checkpoint, log, run"
    assert message(load, "xyzzy=1") == f"unknown key xyzzy; the groups are {groups}"


def test_every_key_is_found_again_when_misspelt():
    for name in KEYS:
        misspelt = name + "z"
        assert message(load, f"{misspelt}=1") == f"unknown key {misspelt}; did you mean {name}?"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps=1.5", "train.steps=1.5 is not an integer"),
        ("train.steps=true", "train.steps=true is not an integer"),
        ("train.steps=null", "train.steps=null is not an integer"),
        ("train.steps.a=1", "unknown key train.steps.a; did you mean train.steps?"),
        ("train.steps={a: 1}", "train.steps={a: 1} is not an integer"),
        ("train.learning_rate=fast", "train.learning_rate=fast is not a number"),
        ("log.console=maybe", "log.console=maybe is not true or false"),
        ("eval.questions=x", "eval.questions=x is not an integer or null"),
        ("data.options=5", "data.options=5 is not a mapping"),
        ("train=5", "train=5: train is a group of keys, for example train.steps"),
        (
            "rollout.normal=5",
            "rollout.normal=5: rollout.normal is a group of keys, for example rollout.normal.temperature",
        ),
        ("train.steps", "override 'train.steps' is not of the form key=value"),
        ("=5", "override '=5' is not of the form key=value"),
        ("data.options=[", "the value of data.options=[ is not valid YAML; put it in quotes"),
        ("model.dtype=float16", "model.dtype=float16 is not allowed; it must be one of float32, bfloat16"),
        ("rollout.engine=x", "rollout.engine=x is not allowed; it must be one of local, sglang, replay"),
        ("train.steps=0", "train.steps=0 is not allowed; it must be at least 1"),
        ("algorithm.clip_low=0", "algorithm.clip_low=0.0 is not allowed; it must be above 0 or null"),
        ("algorithm.dual_clip=1", "algorithm.dual_clip=1.0 is not allowed; it must be above 1 or null"),
        ("train.adam_eps=nan", "train.adam_eps=nan is not allowed; it must be above 0"),
        ("train.learning_rate=inf", "train.learning_rate=inf is not allowed; it must be at least 0 and at most 1e+06"),
        ("rollout.samples_per_question=1", "rollout.samples_per_question=1 is not allowed; it must be at least 2"),
    ],
)
def test_wrong_types_and_values(override, expected):
    assert message(load, override) == expected


def test_unresolvable_interpolation(monkeypatch):
    monkeypatch.delenv("NOPE", raising=False)
    assert message(load, "run.dir=${oc.env:NOPE}").startswith("the value of run.dir cannot be resolved: ")


def test_all_missing_keys_are_named_at_once():
    end = " must be given, in the configuration file or as key=value"
    assert message(load_config, None, []) == "model.path, data.path and run.dir" + end
    assert message(load_config, None, ["model.path=m", "run.dir=r"]) == "data.path" + end


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["rollout.samples_per_question=7"],
            "rollout.samples_per_question=7 cannot be shared out among the modes (shares: normal 1, high_entropy 1); "
            "use a multiple of 2",
        ),
        (
            ["data.batch_questions=3", "rollout.samples_per_question=4", "train.optimizer_steps_per_batch=5"],
            "train.optimizer_steps_per_batch=5 does not divide the 12 responses of a batch (data.batch_questions x "
            "rollout.samples_per_question); use one of 3, 4, 6",
        ),
        (
            ["algorithm.name=grpo", "data.batch_questions=1", "train.optimizer_steps_per_batch=3"],
            "train.optimizer_steps_per_batch=3 does not divide the 8 responses of a batch (data.batch_questions x "
            "rollout.samples_per_question); use one of 1, 2, 4",
        ),
        (
            ["modes.high_entropy_prompt=a", "modes.high_entropy_prompt_file=b"],
            "modes.high_entropy_prompt and modes.high_entropy_prompt_file are both set; keep one of them",
        ),
        (
            ["rollout.engine=replay"],
            "rollout.engine=replay needs rollout.replay_dir, the rollouts/ directory of a run",
        ),
        (
            ["train.steps=5", "train.optimizer_steps_per_batch=2", "train.warmup_steps=11"],
            "train.warmup_steps=11 is more than the 10 optimizer steps of the run "
            "(train.steps x train.optimizer_steps_per_batch); use at most 10",
        ),
        (
            ["data.max_prompt_tokens=100", "rollout.max_response_tokens=50", "train.max_tokens_per_micro_batch=149"],
            "train.max_tokens_per_micro_batch=149 cannot hold one row of data.max_prompt_tokens=100 + "
            "rollout.max_response_tokens=50 tokens; use at least 150",
        ),
        (["rollout.normal.top_p=1.5"], "rollout.normal.top_p=1.5 is a probability mass; use a value up to 1"),
        (
            ["rollout.high_entropy.top_k=0"],
            "rollout.high_entropy.top_k=0 keeps no token; use -1 to keep all, or at least 1",
        ),
        (
            ["parallel.sequence=true"],
            "parallel.sequence=true splits tokens over tensor-parallel ranks; raise parallel.tensor",
        ),
        (
            ["parallel.data=2", "parallel.expert=4"],
            "parallel.expert=4 does not divide parallel.data=2, over whose replicas the experts are shared out; "
            "change one of them",
        ),
        (["algorithm.clip_low=1.1"], "algorithm.clip_low=1.1 is more than a ratio can fall; use 1 at most"),
        (["train.adam_beta2=1"], "train.adam_beta2=1.0 is not allowed; use a value below 1"),
        (
            ["train.learning_rate=1e-6", "train.min_learning_rate=1e-5"],
            "train.min_learning_rate=1e-05 is above train.learning_rate=1e-06; use a smaller one",
        ),
    ],
)
def test_keys_that_do_not_fit_each_other(overrides, expected):
    config = load(*overrides)
    assert message(check_config, config) == expected


def test_values_at_the_limits_are_accepted():
    limits = ["train.steps=5", "train.optimizer_steps_per_batch=2", "train.warmup_steps=10"]
    limits += ["data.max_prompt_tokens=100", "rollout.max_response_tokens=50", "train.max_tokens_per_micro_batch=150"]
    assert check_config(load(*limits)) == []
    assert check_config(load("algorithm.name=grpo", "rollout.samples_per_question=7")) == []


def test_check_config_checks_values_too():
    config = load()
    config.train.steps = 0
    assert message(check_config, config) == "train.steps=0 is not allowed; it must be at least 1"
    assert message(check_config, Config()).startswith("model.path must be given")


def test_cut_sampling_is_a_warning():
    warnings = check_config(load("rollout.normal.top_p=0.9", "rollout.normal.top_k=20", "rollout.high_entropy.top_k=5"))
    assert warnings == [
        "rollout.normal.top_p=0.9 and rollout.normal.top_k=20 cut the sampling, but log-probs are those of the "
        "whole distribution",
        "rollout.high_entropy.top_k=5 cut the sampling, but log-probs are those of the whole distribution",
    ]


def test_world_size():
    assert world_size(load("parallel.tensor=2", "parallel.pipeline=3", "parallel.data=4")) == 24


def test_yaml_round_trip(tmp_path):
    config = load("train.learning_rate=1e-7", "data.options.size=3", "modes.high_entropy_prompt='null'", "run.dir='5'")
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    assert load_config(str(tmp_path / "run.yaml"), []) == config
    assert yaml.safe_load(to_yaml(config))["data"]["options"] == to_dict(config)["data"]["options"] == {"size": 3}


def test_fingerprint_separates_runs_and_allows_what_may_change():
    base = fingerprint(load())
    for other in [
        "algorithm.kl_coef=0.5",
        "data.options.size=4",
        "rollout.normal.temperature=0.5",
        "run.seed=1",
    ]:
        name, value = other.split("=")
        group = name.removesuffix(".size")
        changed = fingerprint(load(other))
        assert first_difference(base, changed) == (group, base[group], changed[group])
        assert str(changed[group]) in (value, "{'size': 4}")
    free = ["train.steps=7", "parallel.tensor=2", "log.console=false", "eval.every=3", "checkpoint.every=1"]
    free += ["reward.workers=9", "rollout.lot_questions=1", "train.max_tokens_per_micro_batch=4096", "run.dir=other"]
    free += ["model.layers=local", "train.distributed_optimizer=true"]
    assert first_difference(base, fingerprint(load(*free))) is None


def test_the_documentation_is_that_of_the_keys():
    page = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
    assert page == config_docs.render(), "run: python -m megatron_policysplit.config.docs > docs/configuration.md"
    for group in dataclasses.fields(Config):
        assert f"\n## {group.name}\n" in page
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == list(KEYS)
    assert "| `model.path` | required | a string | Directory of a Hugging Face model" in page
    assert "| `algorithm.dual_clip` | `null` | a number, above 1 or null |" in page
    assert "| `rollout.engine` | `local` | local, sglang, replay |" in page
