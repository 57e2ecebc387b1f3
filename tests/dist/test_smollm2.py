"""A real instruct model, SmolLM2-135M-Instruct: the actor at pipeline parallelism 2 against transformers."""

import json

import pytest
import torch

from examples.smollm2.make_model import make_model
from tests.support.dist import run_distributed
from tests.support.fp8 import served_model, write_questions

QUESTION = [{"role": "user", "content": "Name three rivers of Europe, and say in a sentence where each begins."}]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("smollm2") / "model"
    make_model(path)
    return path


def test_conversion_there_and_back_keeps_every_bit(model_path, tmp_path):
    from checkpoints_conv import SafetensorsReader
    from checkpoints_conv.hf_to_megatron import hf_to_megatron
    from checkpoints_conv.megatron_to_hf import megatron_to_hf

    hf_to_megatron(model_path, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", max_shard_bytes=10**8)
    with SafetensorsReader(model_path) as original, SafetensorsReader(tmp_path / "back") as back:
        assert set(back.tensors) == set(original.tensors) and len(back.tensors) == 272
        for name in original.tensors:
            expected, found = original.get(name), back.get(name)
            assert found.dtype == expected.dtype
            assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8)), name
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (model_path / name).read_bytes()
    configs = [json.loads((path / "config.json").read_text()) for path in (model_path, tmp_path / "back")]
    assert configs[0] == configs[1]


def test_prompts_of_many_questions_are_those_of_one_by_one(model_path):
    from megatron_policysplit.config import ModesConfig
    from megatron_policysplit.data.prompts import LOT, PromptBuilder
    from megatron_policysplit.data.questions import Question
    from megatron_policysplit.data.tokenizer import load_tokenizer

    builder = PromptBuilder(load_tokenizer(str(model_path)), ModesConfig(), vocab_size=49152)
    texts = ["What is {0} times 17?", "{0}\n\n\t größer 🙂 <|im_end|> \u00a0x", "Spell it: " + "wörd{0} " * 90]
    questions = [
        Question(index, [{"role": "user", "content": texts[index % 3].format(index)}], None, {}) for index in range(LOT + 9)
    ]
    prompts = builder.build_all(questions)
    assert prompts == {question.id: builder.build(question.messages) for question in questions}
    assert max(len(ids) for ids in prompts[2].values()) > 300


def test_fp8_stays_close(model_path, tmp_path):
    """KL per token of what the model says to a question it was not calibrated on, in both modes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from checkpoints_conv.quantize import quantize
    from megatron_policysplit.cli.fp8_calibration import input_maxima
    from megatron_policysplit.config import ModesConfig
    from megatron_policysplit.data.prompts import PromptBuilder

    questions = write_questions(tmp_path / "questions.jsonl", ["What is 17 times 23?", "Why is the sky blue?"])
    measured = lambda: input_maxima(model_path, questions, ModesConfig())  # noqa: E731
    quantize(model_path, tmp_path / "fp8", "fp8", input_maxima=measured)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    served = served_model(tmp_path / "fp8", model_path, round_inputs=True)
    found = []
    for prompt in PromptBuilder(AutoTokenizer.from_pretrained(model_path), ModesConfig()).build(QUESTION).values():
        with torch.no_grad():
            tokens = model.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)
            whole, fp8 = (of(tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for of in (model, served))
        found.append((whole.exp() * (whole - fp8)).sum(-1))
    divergence = torch.cat(found)
    print(f"KL {divergence.mean():.4f} nats a token over {len(divergence)} tokens")  # the figure of docs/conversion.md
    assert len(divergence) > 30
    assert 0.005 < divergence.mean() < 0.08


def test_prompts_built_together_are_what_transformers_makes_of_the_messages(model_path):
    from transformers import AutoTokenizer

    from megatron_policysplit.config import ModesConfig
    from megatron_policysplit.data.prompts import PromptBuilder
    from megatron_policysplit.data.questions import Question
    from megatron_policysplit.rows import Mode

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    builder = PromptBuilder(tokenizer, ModesConfig())
    said = ["1 + 2", "<|im_end|>\n<|im_start|>assistant\n3", "<|endoftext|> a  b", "", " x ", "é🙂 2345", "<|im_en"]
    questions = [Question(index, [{"role": "user", "content": text}], None, {}) for index, text in enumerate(said)]
    prompts = builder.build_all(questions)
    system = {"role": "system", "content": builder.render(questions[0].messages)[Mode.HIGH_ENTROPY]}
    system["content"] = system["content"].split("<|im_start|>system\n")[1].split("<|im_end|>")[0]
    for question in questions:
        for mode, messages in (
            (Mode.NORMAL, question.messages),
            (Mode.HIGH_ENTROPY, [system, *question.messages]),
        ):
            expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
            assert prompts[question.id][mode] == expected["input_ids"]


def test_logits_equal_transformers_at_pipeline_2(model_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompt = AutoTokenizer.from_pretrained(model_path).apply_chat_template(
        QUESTION, add_generation_prompt=True, return_dict=False
    )
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0]
    first, last = run_distributed(logits_of, 2, str(model_path), prompt, timeout_seconds=240)
    assert first is None
    assert len(prompt) > 30 and expected.std() > 1
    assert (last - expected).abs().max() < 1e-4


def logits_of(rank, path, prompt):
    """The last stage's logits [T, vocabulary]; None on the first."""
    from checkpoints_conv import read_hf_config
    from megatron_policysplit.actor import parallel
    from megatron_policysplit.config import ParallelConfig

    parallel.initialize(ParallelConfig(pipeline=2), seed=0)
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_policysplit.actor.model import build_model
    from megatron_policysplit.actor.weights import load_weights

    model = build_model(read_hf_config(path), dtype=torch.float32)
    load_weights(model, path)
    tokens = torch.tensor([prompt])
    found = []

    def step(iterator, model):
        hidden = model(input_ids=tokens, position_ids=torch.arange(len(prompt))[None], attention_mask=None)
        return hidden, lambda hidden, non_loss_data: found.append(hidden[:, 0] @ model.head(1).weight.t())

    with torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=None,
            model=[model],
            num_microbatches=1,
            seq_length=len(prompt),
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    parallel.shutdown()
    return found[0] if found else None
