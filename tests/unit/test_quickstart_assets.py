"""The quickstart's task, tokenizer and warmed-up model, as transformers sees them."""

import json
import random
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from examples.quickstart import make_model as mm
from examples.quickstart.sums import NUMBERS, random_sum, reward, write_questions

QUESTION = SimpleNamespace(answer="9", messages=[{"role": "user", "content": "9"}])


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    mm.make_model(path, seed=3)
    return path


@pytest.mark.parametrize("text", ["4+5", "5+4", "8+1", "3+3+3", "1+1+7"])
def test_right_sums(text):
    assert reward(text, QUESTION) == 1.0


@pytest.mark.parametrize(
    "text",
    ["9", "4+4", "10+1", "2+2+2+3", "0+9", "04+5", "4 + 5", "4+5\n", "4+5+", "+4+5", "-1+10", "4+5=9", "", "٤+5"],
)
def test_wrong_sums(text):
    assert reward(text, QUESTION) == 0.0


def test_reward_counts_exactly_the_compositions():
    """Over every text of two or three terms up to 20, n has n - 1 + (n - 1)(n - 2) / 2 right answers."""
    terms = [str(i) for i in range(21)]
    texts = ["+".join(t) for k in (2, 3) for t in product(terms, repeat=k)]
    for number in (4, 9, 20):
        right = sum(reward(text, SimpleNamespace(answer=str(number))) for text in texts)
        assert right == (number - 1) + (number - 1) * (number - 2) // 2


def test_random_sums_are_right():
    rng = random.Random(0)
    for number in NUMBERS:
        assert all(reward(random_sum(number, rng), SimpleNamespace(answer=str(number))) for _ in range(50))


def test_written_questions(tmp_path):
    write_questions(tmp_path / "q.jsonl", [4, 20])
    lines = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert lines == [{"question": "4", "answer": "4"}, {"question": "20", "answer": "20"}]


def test_tokenizer_renders_both_modes(directory):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert len(tokenizer) == len(mm.VOCABULARY) == 32
    user = {"role": "user", "content": "17"}
    system = {"role": "system", "content": mm.HIGH_ENTROPY_PROMPT}
    normal = tokenizer.apply_chat_template([user], add_generation_prompt=True, return_dict=False)
    high = tokenizer.apply_chat_template([system, user], add_generation_prompt=True, return_dict=False)
    words = mm.HIGH_ENTROPY_PROMPT.split()
    assert tokenizer.convert_ids_to_tokens(normal) == [mm.USER, "17", mm.END, mm.ASSISTANT]
    assert tokenizer.convert_ids_to_tokens(high) == [mm.SYSTEM, *words, mm.END, mm.USER, "17", mm.END, mm.ASSISTANT]
    assert tokenizer.eos_token == mm.END and tokenizer.pad_token == mm.PAD


def test_responses_decode_to_plain_sums(directory):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokens = tokenizer("4+13+3").input_ids
    assert tokenizer.convert_ids_to_tokens(tokens) == ["4", "+", "13", "+", "3"]
    assert tokenizer.decode([*tokens, tokenizer.eos_token_id], skip_special_tokens=True) == "4+13+3"


def test_model_is_a_small_qwen3(directory):
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert isinstance(model, Qwen3ForCausalLM) and model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.eos_token_id == mm.VOCABULARY.index(mm.END)
    assert model.model.layers[0].self_attn.q_norm.weight.shape == (16,)
    assert model.config.num_key_value_heads % 2 == 0, "tensor parallelism 2 must be possible"


def test_same_seed_same_model_and_warm_up(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        mm.make_model(tmp_path / name, seed)
        torch.rand(len(name))  # the global random state must not matter
        mm.warm_up(tmp_path / name, seed, steps=3)
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)


def test_warm_up_learns_and_reports(directory):
    before = {k: v.clone() for k, v in load_file(directory / "model.safetensors").items()}
    seen = []
    last = mm.warm_up(directory, seed=3, steps=40, progress=lambda step, steps, loss: seen.append((step, steps, loss)))
    assert [(step, steps) for step, steps, _ in seen] == [(i, 40) for i in range(1, 41)]
    assert last < 0.75 * seen[0][2]
    after = load_file(directory / "model.safetensors")
    assert not torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
