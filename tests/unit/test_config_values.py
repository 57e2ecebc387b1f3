"""What the spelling of a value means, by its key: text, numbers, truth values, mappings, paths, secrets, bounds."""

import os
import stat

import pytest
import yaml

from megatron_policysplit.config import yaml_values
from megatron_policysplit.config.checks import check_config
from megatron_policysplit.config.keys import read_keys
from megatron_policysplit.config.load import (
    KEYS,
    fingerprint,
    first_difference,
    flatten,
    load_config,
    load_written,
    to_dict,
    to_yaml,
)
from megatron_policysplit.config.secrets import SecretMapping, open_private
from tests.unit.test_config import load, message

# Texts that YAML takes for a number, a truth value, null, a date, a list, a mapping or a comment.
TEXTS = [
    "010",
    "1e3",
    "2026_11",
    "12:30",
    "1.10",
    "0x1F",
    "yes",
    "off",
    "True",
    "2026-11-05",
    "1.",
    ".5",
    "a #b",
    "a: b",
]
TEXTS += ["[a]", "{a: 1}", "[", "- a", "&a", "*a", "!x", "%", "@a", "a, b", "it's", '"a" and "b"', "'a' or 'b'", "nan"]


def value(name: str, *overrides: str, **keywords):
    return flatten(load(*overrides, **keywords))[name]


@pytest.mark.parametrize("name", [key.name for key in KEYS.values() if key.type is str and not key.choices])
def test_an_override_of_a_text_key_is_taken_as_it_stands(name):
    for text in TEXTS if name == "run.dir" else ("1.10",):
        assert value(name, f"{name}=  {text} ") == text


def test_quotes_around_a_whole_text_are_taken_off():
    for given, text in [("'null'", "null"), ('"5"', "5"), ("' a '", " a "), ('"a\\tb"', "a\tb"), ("'it''s'", "it's")]:
        assert value("run.dir", f"run.dir={given}") == text
    assert message(load, r'run.dir="a\p"') == r'the value of run.dir="a\p" is not valid YAML; use single quotes'
    for given in ("", "null"):
        assert value("eval.path", "eval.path=x", f"eval.path={given}") is None
        wrong = f"run.dir={given} is not a string; put it in quotes if you mean that text"
        assert message(load, f"run.dir={given}") == wrong
    assert value("modes.high_entropy_prompt", "modes.high_entropy_prompt=one\ntwo  three") == "one\ntwo  three"


@pytest.mark.parametrize("text", ["010", "1e3", "2026_11", "12:30", "1.10", "yes", "off", "[a]", "{a: 1}", "{'a': }"])
@pytest.mark.parametrize(
    ("group", "leaf"), [("run", "dir"), ("log", "wandb_project"), ("eval", "prompts.low"), ("modes", "others.a.prompt")]
)
def test_a_text_in_a_file_that_yaml_takes_for_something_else_is_refused(group, leaf, text, tmp_path):
    content = leaf
    for part in reversed(leaf.split(".")):
        content = f"{{{part}: {text if content == leaf else content}}}"
    name = f"{group}.{leaf}"
    if leaf in ("prompts.low", "others.a.prompt") and text.startswith("{"):
        return  # an entry may be a mapping
    error = message(load, text=f"train: {{steps: 5}}\n{group}: {content}\n", tmp_path=tmp_path)
    kind = {"y": "true or false", "o": "true or false", "[": "a list", "{": "a mapping"}.get(text[0], "a number")
    or_null = " or null" if name not in ("run.dir", "eval.prompts.low") else ""
    assert error == (
        f"{name}={text} is not a string{or_null} but {kind} to YAML ({tmp_path / 'run.yaml'}, line 2); put it in quotes"
    )
    quoted = f"{group}: {content.replace(text, repr(text))}\n"
    key = next(known for known in KEYS if name == known or name.startswith(known + "."))
    read = load_config(None, ["model.path=m", "data.path=d", "run.dir=r"])
    read = load(text=quoted, tmp_path=tmp_path) if group != "run" else read
    if group != "run":
        assert text in str(flatten(read)[key])


def test_dates_and_plain_texts_in_a_file_are_texts(tmp_path):
    for text in ("2026-11-05", "a-b", "1.2.3", "0o17", "explore # widely"):
        read = value("modes.high_entropy_prompt", text=f"modes:\n  high_entropy_prompt: {text}\n", tmp_path=tmp_path)
        assert read == text.partition(" #")[0]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps=010", "train.steps=010 is 8 to YAML; write the number you mean"),
        ("train.steps=12:30", "train.steps=12:30 is 750 to YAML; write the number you mean"),
        ("train.learning_rate=010", "train.learning_rate=010 is 8 to YAML; write the number you mean"),
        ("train.learning_rate=1:30.5", "train.learning_rate=1:30.5 is 90.5 to YAML; write the number you mean"),
        ("train.steps=4.0", "train.steps=4.0 is not an integer; write 4"),
        ("train.steps=1e3", "train.steps=1e3 is not an integer; write 1000"),
        ("train.learning_rate=true", "train.learning_rate=true is not a number"),
        ("log.console=2", "log.console=2 is not true or false"),
        ("log.console=1", "log.console=1 is not true or false"),
        ("log.console='0'", "log.console='0' is not true or false"),
        ("log.console=null", "log.console=null is not true or false"),
        ("rollout.addresses=http://a", "rollout.addresses=http://a is not a list"),
        (
            "rollout.addresses=[http://a, 10.1]",
            "rollout.addresses=10.1 is not a string but a number to YAML; put it in quotes",
        ),
        ("rollout.server.devices=[0, 1.0]", "rollout.server.devices=1.0 is not an integer; write 1"),
        (
            "modes.chat_template_kwargs.effort=off",
            "modes.chat_template_kwargs.effort=off is false to YAML; write false, or put text in quotes",
        ),
        (
            "modes.chat_template_kwargs={a: {b: 010}}",
            "modes.chat_template_kwargs.a.b=010 is 8 to YAML; write the number you mean, or put text in quotes",
        ),
        (
            "data.options={a: {b: 1, b: 2}}",
            "the value of data.options={a: {b: 1, b: 2}} is not valid YAML; put it in q",
        ),
        ("modes.high_entropy_prompt=\udcff", "modes.high_entropy_prompt=\\udcff is not UTF-8 text; write it in UTF-8"),
        ("run.dir=a${", "run.dir=a${ has a ${ that begins no ${oc.env:NAME}; write \\${ for the text"),
        ("run.dir=" + "a" * 300, f"run.dir={'a' * 40}... is too long for a path; give another one"),
    ],
)
def test_values_that_would_be_taken_for_something_else(override, expected):
    assert message(load, override).startswith(expected)


def test_numbers_and_truth_values():
    for given, number in [
        ("1e-6", 1e-6),
        ("1E-6", 1e-6),
        ("-0", 0),
        (".5e-3", 5e-4),
        ("1_000", 1000),
        ("'1e-6'", 1e-6),
    ]:
        assert value("train.learning_rate", f"train.learning_rate={given}") == number
    for given, number in [("1_000", 1000), ("0x10", 16), ("'7'", 7), ("+7", 7)]:
        assert value("train.steps", f"train.steps={given}") == number
    for given in ("true", "True", "yes", "on", "'true'"):
        assert value("log.rollouts", f"log.rollouts={given}") is True
    assert value("log.rollouts", "log.rollouts=off") is False


def test_variables_and_flags_of_servers_are_kept_as_they_are_written(tmp_path):
    text = "{A: 1.10, B: 010, C: 1e3, D: yes, E: true, F: null, G: 'x', H: 12:30}"
    expected = {"A": "1.10", "B": "010", "C": "1e3", "D": "yes", "E": True, "F": None, "G": "x", "H": "12:30"}
    for name in ("rollout.server.environment", "rollout.server.arguments"):
        assert value(name, f"{name}={text}") == expected
        group, leaf = name.rsplit(".", 1)
        assert value(name, text=f"rollout: {{server: {{{leaf}: {text}}}}}", tmp_path=tmp_path) == expected
        assert value(name, f"{name}.A=010", f"{name}.B=null", f"{name}.C=true") == {"A": "010", "B": None, "C": True}
    name = "rollout.server.arguments"
    assert value(name, f"{name}.x=[1, 2.0]", f"{name}.y.z=1") == {"x": ["1", "2.0"], "y": {"z": 1}}
    assert value(name, f"{name}={{y: {{z: 0.5}}}}") == {"y": {"z": 0.5}}  # a flag's JSON


def test_texts_of_modes_and_of_evaluation_prompts():
    assert value("modes.others", "modes.others.a.prompt=010") == {"a": {"prompt": "010"}}
    assert value("modes.others", "modes.others.on={prompt: x, temperature: 1e-1}") == {
        "on": {"prompt": "x", "temperature": 0.1}
    }
    assert value("eval.prompts", "eval.prompts.low=Be brief: # now") == {"low": "Be brief: # now"}
    assert value("eval.prompts", "eval.prompts.low={file: a.txt}") == {"low": {"file": "a.txt"}}
    assert value("data.options", "data.options[size]=5", "data.options={seed: 1}") == {"size": 5, "seed": 1}
    assert value("data.options", "data.options={weights: {1: 0.5, a: [1, x, null]}}") == {
        "weights": {1: 0.5, "a": [1, "x", None]}
    }


def test_options_of_a_method_are_not_taken_for_another_type():
    from megatron_policysplit.algorithms.methods.policy_split import Options

    for given, expected in [
        ({"variant": 1.1}, "o.variant=1.1 is not a string; put text that YAML takes for something else in quotes"),
        ({"correctness": True}, "o.correctness=true is not a string; put text that YAML takes for something else in q"),
        ({"dynamic_sampling": 2}, "o.dynamic_sampling=2 is not true or false"),
        ({"max_rounds": 2**40}, "o.max_rounds=1099511627776 is not allowed; it must be at most 2147483647"),
        ({"alpha": 1e300}, "o.alpha=1e+300 is not allowed; it must be a number of single precision, whose size is 0"),
    ]:
        assert message(read_keys, Options, given, "o.", "it").startswith(expected)


def test_yaml_itself(tmp_path):
    merged = "base: &base {steps: 3, clip_grad: 2}\n".replace("base: ", "train: ")
    assert load(text=merged + "rollout: {normal: {<<: {share: 2}, share: 3}}", tmp_path=tmp_path).train.steps == 3
    assert load(text=merged, tmp_path=tmp_path).train.clip_grad == 2.0
    assert load(text="\ufefftrain: {steps: 4}\r\n", tmp_path=tmp_path).train.steps == 4
    for text, reason in [
        ("data: {options: &a {b: *a}}", "its aliases never end"),
        ("data: {options: " + "[" * 5000, "it is nested too deeply"),
        ("train: {steps: 1}\ntrain: {steps: 2}", "found duplicate key train"),
        ("? [a]\n: 1", "a key is a list or a mapping"),
        ("train: {steps: !!python/name:os.system x}", ""),
        ("a: 1\n---\nb: 1", "but found another document"),
        ("train: \x01", "it holds a character that YAML does not allow"),
    ]:
        assert reason in message(load, text=text, tmp_path=tmp_path)
    bomb = "x0: &x0 [1, 1]\n" + "".join(f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 10)}]\n" for i in range(1, 9))
    assert "its aliases never end" in message(load, text=bomb, tmp_path=tmp_path)


def test_a_configuration_that_is_a_directory(tmp_path):
    assert message(load_config, str(tmp_path), []) == (
        f"configuration file {tmp_path} is a directory; give the path of a YAML file"
    )
    (tmp_path / "config.yaml").write_text("")
    assert message(load_config, str(tmp_path), []) == (
        f"configuration file {tmp_path} is a directory; give {tmp_path / 'config.yaml'}"
    )
    missing = message(load_config, str(tmp_path / "config.yaml" / "x"), [])
    assert missing == f"configuration file {tmp_path}/config.yaml/x cannot be read (Not a directory); give another file"


@pytest.mark.parametrize("name", [key.name for key in KEYS.values() if key.path])
def test_a_leading_tilde_of_a_path_is_the_home_directory(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", "~/x")
    for given, expected in [
        ("~/x", f"{tmp_path}/x"),
        ("${oc.env:PLACE}", f"{tmp_path}/x"),
        ("./~", "./~"),
        ("a~b", "a~b"),
    ]:
        config = load(f"{name}={given}")
        assert flatten(config)[name] == expected
        assert expected in to_yaml(config)
    group, leaf = name.rsplit(".", 1)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({group: {leaf: "~root/x"}}))
    given = [f"{key}=x" for key in ("model.path", "data.path", "run.dir") if key != name]
    expected = os.path.expanduser("~root/x")
    assert flatten(load_config(str(tmp_path / "run.yaml"), given))[name] == expected
    wrong = (
        f"{name}=~nobody-here/x: there is no home directory for ~nobody-here; give another path, or ./~nobody-here/x"
    )
    assert message(load, f"{name}=~nobody-here/x").startswith(wrong)


def test_every_path_key_is_marked():
    words = ("path", "dir", "file", "directory", "python", "megatron")
    named = {name for name, key in KEYS.items() if key.type is str and name.rsplit(".")[-1].split("_")[-1] in words}
    assert named == {key.name for key in KEYS.values() if key.path}


def test_paths_within_mappings(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load("modes.others.a.prompt_file=~/a", "eval.prompts={b: {file: ~/b}, c: ~/c}")
    assert config.modes.others == {"a": {"prompt_file": f"{tmp_path}/a"}}
    assert config.eval.prompts == {"b": {"file": f"{tmp_path}/b"}, "c": "~/c"}  # a prompt's text is no path


def test_secrets_are_neither_shown_nor_written(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKEN", "s3cret")
    config = load(
        'rollout.server.environment={HF_TOKEN: "${oc.env:TOKEN}", A: x}',
        'rollout.server.arguments={chat-template: "/t/${oc.env:TOKEN}"}',
        "data.options.place=${oc.env:TOKEN}/data",
    )
    server = config.rollout.server
    assert dict(server.environment) == {"HF_TOKEN": "s3cret", "A": "x"}
    assert server.arguments["chat-template"] == "/t/s3cret"
    assert f"{server.environment} {server.arguments!r}".count("s3cret") == 0
    written = to_yaml(config)
    assert written.count("s3cret") == 1 and "place: s3cret/data" in written  # what a resumed run is compared by
    assert to_dict(config)["rollout"]["server"]["environment"] == {"HF_TOKEN": "${oc.env:TOKEN}", "A": "x"}
    (tmp_path / "config.yaml").write_text(written)
    monkeypatch.setenv("TOKEN", "another")
    again = load_config(str(tmp_path / "config.yaml"), [])
    assert again.rollout.server.environment["HF_TOKEN"] == "another"
    assert first_difference(fingerprint(config), fingerprint(again)) is None
    monkeypatch.delenv("TOKEN")
    assert load_written(str(tmp_path / "config.yaml")).data.options == {"place": "s3cret/data"}
    assert "${oc.env:TOKEN}" not in message(load_config, str(tmp_path / "config.yaml"), []).replace("'TOKEN'", "")


def test_an_error_about_an_interpolation_does_not_say_what_it_stands_for(monkeypatch):
    monkeypatch.setenv("TOKEN", "s3cret")
    assert message(load, "train.steps=${oc.env:TOKEN}") == "train.steps=${oc.env:TOKEN} is not an integer"
    assert message(load, "log.console=${oc.env:TOKEN}") == "log.console=${oc.env:TOKEN} is not true or false"
    config = load(
        "rollout.engine=sglang",
        "rollout.addresses=['http://me:${oc.env:TOKEN}@host:1']",
    )
    error = message(check_config, config)
    assert error.startswith("rollout.addresses has an address with a user name; use http://host:port, and ")


def test_text_with_a_dollar_and_a_brace_survives_the_written_file(tmp_path):
    for text, meant in [(r"a \${x} b", "a ${x} b"), (r"a \\\${x} b", "a \\${x} b"), ("$5 {x}", "$5 {x}")]:
        config = load(f"modes.high_entropy_prompt={text}", f"eval.prompts.low={text}")
        assert config.modes.high_entropy_prompt == config.eval.prompts["low"] == meant
        (tmp_path / "config.yaml").write_text(to_yaml(config))
        assert load_config(str(tmp_path / "config.yaml"), []) == config


def test_a_private_file_is_its_owner_s_and_new(tmp_path):
    old = os.umask(0)
    try:
        with open_private(tmp_path / "a") as stream:
            stream.write("x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        open_private(tmp_path / "a")
    assert repr(SecretMapping({"a": "b"})) == "{'a': 'b'}"


HUGE = [2**31, 2**62 + 1, 2**63, 2**64, 10**30, 10**400]
NUMBERS = [1e39, 1e300, -1e39, 1e-39, 1e-320, 5e-324]


@pytest.mark.parametrize("key", [key for key in KEYS.values() if key.type in (int, float)], ids=lambda key: key.name)
def test_no_number_is_larger_or_smaller_than_what_computes_with_it(key):
    for number in [*HUGE, *(-number for number in HUGE), *(NUMBERS if key.type is float else [])]:
        accepted = key.requirement(number) is None
        if key.type is int:
            assert not accepted or abs(number) < 2**31 or (key.name == "run.seed" and number <= 2**62)
        else:
            assert not accepted or 1e-38 < abs(number) < 3.5e38
    assert message(load, f"{key.name}=1{400 * '0'}").startswith(f"{key.name}=1000000")
    limit = 2**31 - 1 if key.maximum is None else key.maximum
    if key.type is int:
        assert key.requirement(int(limit)) is None
    if key.name.endswith("seconds"):
        assert key.maximum == 1e9  # a timer of Python's or torch's


def test_a_batch_of_the_largest_size_is_checked_at_once():
    largest = 2**31 - 1
    config = load(
        "algorithm.name=grpo",
        f"data.batch_questions={largest}",
        f"rollout.samples_per_question={largest}",
        "train.optimizer_steps_per_batch=2",
    )
    assert message(check_config, config).endswith(f"use one of 1, {largest}, {largest**2}")


def test_the_reader_keeps_positions():
    source = yaml_values.Source("a:\n  b: 1\n", "f.yaml")
    root = yaml_values.compose(source.text)
    [(_, group)] = yaml_values.pairs(root)
    [(name, node)] = yaml_values.pairs(group)
    assert (name, source.show(node), source.place(node)) == ("b", "1", " (f.yaml, line 2)")
