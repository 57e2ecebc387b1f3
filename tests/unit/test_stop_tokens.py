"""Which tokens end a response: the union of what a model directory names, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_policysplit.data.stop_tokens import check_stop_tokens, stop_token_ids
from megatron_policysplit.errors import ModelError
from tests.support.toy_chat import make_chat_model

START, END = 256, 257  # <|im_start|> and <|im_end|>, the last of 258 tokens


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return make_chat_model(tmp_path_factory.mktemp("model"), num_hidden_layers=1)


@pytest.fixture
def model(made, tmp_path) -> Path:
    path = Path(shutil.copytree(made, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors")))
    write(path, "config.json", eos_token_id=None)
    (path / "generation_config.json").unlink(missing_ok=True)
    return path


def write(path, file, **values):
    content = json.loads((path / file).read_text()) if (path / file).is_file() else {}
    (path / file).write_text(json.dumps(content | values))


def stops(path):
    check_stop_tokens(path)
    return stop_token_ids(path, AutoTokenizer.from_pretrained(path, local_files_only=True))


def test_the_union_of_what_the_directory_names(model):
    assert stops(model) == [END]  # of the tokenizer alone
    write(model, "config.json", eos_token_id=7)
    assert stops(model) == [7, END]
    write(model, "generation_config.json", eos_token_id=[3, 0])
    assert stops(model) == [0, 3, 7, END]
    write(model, "config.json", eos_token_id=[END])
    assert stops(model) == [0, 3, END]
    write(model, "generation_config.json", eos_token_id=[])
    assert stops(model) == [END]


def test_the_end_of_a_message_that_calls_a_tool(model):
    """SGLang stops there whatever the files say."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eom_id|>"]})
    assert stop_token_ids(model, tokenizer) == [END]  # the model cannot generate it
    write(model, "config.json", vocab_size=259)
    assert stop_token_ids(model, tokenizer) == [END, END + 1]


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize(
    "value", ["<|im_end|>", "2", 2.0, True, False, [None], [[2]], {}, {"a": 2}, [2, "3"], [2, True], [2, 3.0]]
)
def test_what_is_no_token_id(model, file, value):
    write(model, file, eos_token_id=value)
    for read in (check_stop_tokens, lambda path: stop_token_ids(path, None)):
        with pytest.raises(ModelError) as error:
            read(model)
        assert str(error.value) == (
            f"{model / file}: eos_token_id={json.dumps(value)} is neither a token id nor a list of token ids; "
            "write whole numbers, such as 2 or [2, 5]"
        )


@pytest.mark.parametrize(("value", "id"), [(258, 258), (-1, -1), ([2, 10**30], 10**30)])
def test_ids_outside_the_vocabulary(model, value, id):
    write(model, "generation_config.json", eos_token_id=value)
    with pytest.raises(ModelError) as error:
        check_stop_tokens(model)
    assert str(error.value) == (
        f"{model / 'generation_config.json'}: eos_token_id={value} has the token id {id}, which is outside the model's "
        "vocabulary of 0 to 257; name the token that ends a turn"
    )


def test_a_token_of_the_tokenizer_outside_the_vocabulary(model):
    write(model, "config.json", vocab_size=257, eos_token_id=7)
    message = r"^the tokenizer's eos_token '<\|im_end\|>' has the token id 257, which is outside .* of 0 to 256; "
    for read in (check_stop_tokens, stops):
        with pytest.raises(ModelError, match=message):
            read(model)


@pytest.mark.parametrize("settings", [{"tokenizer_class": "Qwen2Tokenizer"}, {}, {"eos_token": "<|nope|>"}])
def test_an_eos_token_that_transformers_makes_up(model, settings):
    """It does so for a class with a default, and for a token that the vocabulary does not have."""
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    write(model, "generation_config.json", eos_token_id=[END])
    assert stops(model) == [END]
    write(model, "config.json", vocab_size=512)  # a padded embedding: SGLang stops at the made-up id, too
    assert stops(model) == [END, END + 1]


@pytest.mark.parametrize("vocab_size", [258, 512])
def test_an_eos_token_that_no_file_holds_ends_nothing(model, vocab_size):
    write(model, "config.json", vocab_size=vocab_size)
    write(model, "tokenizer_config.json", eos_token="<|nope|>")
    tokenizer = AutoTokenizer.from_pretrained(model)
    for read in (check_stop_tokens, lambda path: stop_token_ids(path, tokenizer)):
        with pytest.raises(ModelError) as error:
            read(model)
        assert str(error.value) == (
            f"the tokenizer's eos_token '<|nope|>' is in no file of {model} that holds tokens, so no response would "
            "end; set eos_token_id in its generation_config.json, or copy the tokenizer's files from the model that "
            "this one was made of"
        )


@pytest.mark.parametrize("value", [5, True, ["<|im_end|>"], {"text": "<|im_end|>"}])
def test_an_eos_token_that_is_no_text(model, value):
    write(model, "generation_config.json", eos_token_id=END)
    write(model, "tokenizer_config.json", eos_token=value)
    with pytest.raises(ModelError) as error:
        check_stop_tokens(model)
    assert str(error.value) == (
        f"{model / 'tokenizer_config.json'}: eos_token={json.dumps(value)} is not the text of a token; write the token "
        "as the vocabulary has it"
    )


@pytest.mark.parametrize("file", ["added_tokens.json", "tokenizer_config.json"])
def test_a_vocabulary_without_tokenizer_json(model, file):
    """The eos token's id is in vocab.json, added_tokens.json or tokenizer_config.json."""
    vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    (model / "tokenizer.json").unlink()
    (model / "vocab.json").write_text(json.dumps(vocabulary))
    (model / "merges.txt").write_text("#version: 0.2\n")
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer", "eos_token": "!"}))
    assert stops(model) == [vocabulary["!"]]
    write(model, "tokenizer_config.json", eos_token="<|im_end|>")
    with pytest.raises(ModelError, match=r"^the tokenizer's eos_token '<\|im_end\|>' is in no file of "):
        check_stop_tokens(model)
    if file == "added_tokens.json":
        write(model, file, **{"<|im_end|>": END - 1})
    else:
        write(model, file, added_tokens_decoder={str(END - 1): {"content": "<|im_end|>", "special": True}})
    assert stops(model) == [END - 1]


@pytest.mark.parametrize("value", [None, []])
def test_nothing_that_ends_a_response(model, value):
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": None}))
    write(model, "generation_config.json", eos_token_id=value)
    tokenizer = AutoTokenizer.from_pretrained(model)
    for read in (check_stop_tokens, lambda path: stop_token_ids(path, tokenizer)):
        with pytest.raises(ModelError, match=f"^{model} names no end-of-sequence token, so no response would end; "):
            read(model)


def test_files_that_are_damaged(model):
    (model / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match="generation_config.json is not valid JSON"):
        check_stop_tokens(model)
    (model / "generation_config.json").write_text("[5]")
    with pytest.raises(ModelError, match="generation_config.json does not hold a JSON object"):
        check_stop_tokens(model)
