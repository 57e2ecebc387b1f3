"""The files of a tokenizer: what is missing is named, and every form that transformers loads is taken."""

import json
import shutil
from pathlib import Path

import pytest

from megatron_policysplit.data.tokenizer import check_tokenizer_files, load_tokenizer, tokens_beyond
from megatron_policysplit.errors import ModelError
from tests.support.toy_chat import make_chat_model


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return make_chat_model(tmp_path_factory.mktemp("model"), num_hidden_layers=1)


@pytest.fixture
def model(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors")))


def test_a_directory_without_a_tokenizer(model):
    missing = f"^{model} has no tokenizer: tokenizer.json is missing .*; copy the tokenizer's files from the model"
    (model / "tokenizer.json").unlink()
    for check in (check_tokenizer_files, load_tokenizer):
        with pytest.raises(ModelError, match=missing):  # tokenizer_config.json alone is no tokenizer
            check(model)
    (model / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match=missing):
        check_tokenizer_files(model)
    (model / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ModelError, match=f"^{model} has merges.txt of a tokenizer but not vocab.json; copy it"):
        check_tokenizer_files(model)
    (model / "merges.txt").unlink()
    (model / "vocab.json").write_text("{}")
    with pytest.raises(ModelError, match=f"^{model} has vocab.json of a tokenizer but not merges.txt; copy it"):
        check_tokenizer_files(model)


def test_other_forms_of_a_tokenizer(model):
    vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    (model / "tokenizer.json").rename(model / "tokenizer.model")
    check_tokenizer_files(model)
    (model / "tokenizer.model").unlink()
    (model / "vocab.json").write_text(json.dumps(vocabulary))
    (model / "merges.txt").write_text("#version: 0.2\n")
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_tokenizer(str(model))("ab", add_special_tokens=False)["input_ids"] == [vocabulary[c] for c in "ab"]


def test_a_tokenizer_with_an_empty_vocabulary(model):
    content = json.loads((model / "tokenizer.json").read_text())
    content["model"]["vocab"] = {}
    (model / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=f"^the tokenizer in {model} makes no tokens of plain text, as its vocabulary"):
        load_tokenizer(str(model))


@pytest.mark.parametrize("content", ["{", "version https://git-lfs.github.com/spec/v1\n"])
def test_a_damaged_tokenizer(model, content):
    (model / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match="tokenizer.json is not valid JSON"):
        tokens_beyond(model, 258)
    with pytest.raises(ModelError, match=f"^cannot load the tokenizer in {model}: "):
        load_tokenizer(str(model))


def test_tokens_that_the_model_has_no_embedding_for(model):
    assert tokens_beyond(model, 258) == []
    assert tokens_beyond(model, 257) == [("<|im_end|>", 257)]
    content = json.loads((model / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 300, "content": "hi"})
    (model / "tokenizer.json").write_text(json.dumps(content))
    assert tokens_beyond(model, 258) == [("hi", 300)]
    (model / "tokenizer.json").unlink()
    assert tokens_beyond(model, 258) == []
    (model / "vocab.json").write_text(json.dumps({"a": 0, "b": 258}))
    (model / "added_tokens.json").write_text(json.dumps({"<x>": 259}))
    settings = {"added_tokens_decoder": {"260": {"content": "<y>"}}}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    assert tokens_beyond(model, 258) == [("b", 258), ("<x>", 259), ("<y>", 260)]
