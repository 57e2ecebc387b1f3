"""How many positions a model is made for, by config.json, and what is refused because of it."""

import json

import pytest
from transformers import AutoTokenizer

from checkpoints_conv.rope import position_limit
from megatron_policysplit.config import ModesConfig
from megatron_policysplit.config.model_layout import check_positions, model_positions
from megatron_policysplit.data.prompts import PromptBuilder
from megatron_policysplit.data.questions import Question
from megatron_policysplit.errors import ConfigError, ModelError
from megatron_policysplit.evaluation.responder import Responder
from megatron_policysplit.rollout.engine import Sampling
from megatron_policysplit.rows import Mode
from tests.support.toy_chat import make_chat_model

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({"max_position_embeddings": 4096, "rope_scaling": None}, 4096),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0}}, 16384),
        ({"max_position_embeddings": 4096, "rope_parameters": {"rope_type": "linear", "factor": 2}}, 8192),
        ({"max_position_embeddings": 131072, "rope_scaling": LLAMA3}, 131072),
        (
            {
                "max_position_embeddings": 40960,
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            },
            131072,
        ),
        ({"max_position_embeddings": 2048, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, 4096),
        (
            {
                "max_position_embeddings": 131072,
                "rope_parameters": {"rope_type": "longrope", "factor": 32.0},
            },
            131072,
        ),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, None),
    ],
)
def test_position_limit(config, limit):
    assert position_limit(config) == limit


@pytest.mark.parametrize("value", [0, -1, "4096", True])
def test_a_limit_that_is_no_number(value):
    with pytest.raises(ModelError, match="^config.json: max_position_embeddings=.* is not a positive number"):
        position_limit({"max_position_embeddings": value})


def test_a_key_that_is_absent():
    """transformers' default of the architecture counts; of an unknown one nothing is known."""
    assert model_positions({"architectures": ["LlamaForCausalLM"]}) == 2048
    assert model_positions({"model_type": "qwen3", "max_position_embeddings": None}) == 32768
    scaled = {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 4.0}}
    assert model_positions(scaled) == 8192
    assert model_positions({"architectures": ["OtherForCausalLM"], "model_type": "other"}) is None
    check_positions({"model_type": "other"}, 10**9, 10**9)


def test_what_is_refused():
    config = {"max_position_embeddings": 512}
    check_positions(config, 448, 64)
    with pytest.raises(ConfigError) as error:
        check_positions(config, 449, 64)
    assert str(error.value) == (
        "data.max_prompt_tokens=449 + rollout.max_response_tokens=64 = 513 positions are more than the 512 of the "
        "model (max_position_embeddings in config.json); use at most data.max_prompt_tokens=448 (longer prompts are "
        "dropped), or lower rollout.max_response_tokens"
    )
    with pytest.raises(ConfigError, match="; use rollout.max_response_tokens below 512, and both together at most 512"):
        check_positions(config, 64, 512)


def test_responses_fit_the_positions_unless_a_length_is_asked_for(tmp_path):
    path = make_chat_model(tmp_path, num_hidden_layers=1)
    questions = [Question(id, [{"role": "user", "content": "?" * id}], None, {}) for id in (1, 5)]
    modes = (Mode.NORMAL, Mode.HIGH_ENTROPY)
    prompts = PromptBuilder(AutoTokenizer.from_pretrained(path), ModesConfig()).build(questions[1].messages)
    normal, longest = (len(prompts[mode]) for mode in modes)

    def responder(positions):
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": positions}))
        return Responder(str(path), ModesConfig())

    assert responder(longest + 7).max_tokens(questions, modes, 7) == 7
    assert responder(longest + 7).max_tokens(questions, modes, 8) == 7
    few = responder(longest + 3)
    assert few.max_tokens(questions, modes, 512) == 3
    assert few.max_tokens(questions, [Mode.NORMAL], 512) == longest + 3 - normal
    assert len(few.respond(questions, modes, 1, Sampling(1.0, 1.0, -1, 3), 0)) == 4
    with pytest.raises(ConfigError) as error:
        few.respond(questions, modes, 1, Sampling(1.0, 1.0, -1, 4), 0)
    assert str(error.value) == (
        f"--max-tokens 4 behind a prompt of {longest} tokens makes {longest + 4} positions, more than the "
        f"{longest + 3} of the model (max_position_embeddings in config.json); use at most --max-tokens 3"
    )
    none = responder(longest)
    assert none.max_tokens(questions, modes, 512) == 1
    with pytest.raises(ConfigError, match="; leave out questions as long as that$"):
        none.respond(questions, modes, 1, Sampling(1.0, 1.0, -1, 1), 0)
