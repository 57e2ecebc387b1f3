"""eval.prompts: what may stand there, and the prompts that come of it."""

import types

import pytest
from transformers import AutoTokenizer

from megatron_policysplit.config import ModesConfig
from megatron_policysplit.config.load import load_config
from megatron_policysplit.data.prompts import read_eval_prompts
from megatron_policysplit.data.questions import Question
from megatron_policysplit.errors import ConfigError
from megatron_policysplit.rows import Mode
from megatron_policysplit.training.questions import _other_prompts
from tests.support.toy_chat import make_chat_model

QUESTIONS = [Question(i, [{"role": "user", "content": f"What is {i}+1?"}], None, {}) for i in (3, 8)]


def test_texts_and_files(tmp_path):
    (tmp_path / "low.txt").write_text(" Be brief.\n")
    given = {"rewritten": " Roam. ", "low": {"file": str(tmp_path / "low.txt")}}
    assert read_eval_prompts(given, ModesConfig()) == {"rewritten": "Roam.", "low": "Be brief."}


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({"normal": "x"}, "eval.prompts.normal cannot be a name in the logs; use letters"),
        ({"a/b": "x"}, "eval.prompts.a/b cannot be a name in the logs; use letters"),
        ({"a": ""}, "eval.prompts.a is empty; write a prompt or remove it"),
        ({"a": None}, "eval.prompts.a=None is neither a text nor {file: PATH}; without a prompt of ours is the normal"),
        ({"a": {"path": "x"}}, "eval.prompts.a={'path': 'x'} is neither a text nor {file: PATH}"),
        ({"a": {"file": "/no/file"}}, "eval.prompts.a.file=/no/file cannot be read (No such file or directory); give"),
    ],
)
def test_what_cannot_be_used(prompts, message):
    with pytest.raises(ConfigError) as error:
        read_eval_prompts(prompts, ModesConfig())
    assert str(error.value).startswith(message)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_chat_model(tmp_path_factory.mktemp("model"))


def other_prompts(model, limit, is_leader=True):
    settings = ["data.path=d", "run.dir=r", f"model.path={model}", f"data.max_prompt_tokens={limit}"]
    config = load_config(None, [*settings, "eval.prompts={low: Be brief., wild: Roam.}"])
    tokenizer = AutoTokenizer.from_pretrained(model)
    leader = types.SimpleNamespace(tokenizer=tokenizer) if is_leader else None
    return _other_prompts(config, QUESTIONS, leader, "2026-01-31"), tokenizer


def test_prompts_are_those_of_the_chat_template(model):
    found, tokenizer = other_prompts(model, 500)
    for name, text in (("low", "Be brief."), ("wild", "Roam.")):
        for question in QUESTIONS:
            messages = [{"role": "system", "content": text}, *question.messages]
            wanted = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            ids = tokenizer(wanted, add_special_tokens=False)["input_ids"]
            assert found[name][question.id] == {Mode.NORMAL: ids}
    assert other_prompts(model, 500, is_leader=False)[0] == {"low": {}, "wild": {}}


def test_a_prompt_that_is_too_long(model):
    with pytest.raises(ConfigError, match="^eval.prompts.low makes a prompt of [0-9]+ tokens, more than data.max_"):
        other_prompts(model, 5)
