"""On a CUDA device, by the same code as on the CPU: Transformer Engine layers, NCCL, bfloat16."""

import json

import pytest
import torch

from megatron_policysplit.cli.main import run_training
from tests.support.toy_chat import make_chat_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """Two steps of Policy Split on one GPU, head sizes as Transformer Engine's kernels want them."""
    folder = tmp_path_factory.mktemp("gpu")
    model = make_chat_model(
        folder / "model",
        hidden_size=256,
        intermediate_size=512,
        head_dim=64,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    questions = folder / "questions.jsonl"
    questions.write_text("".join(json.dumps({"question": f"{n}?", "answer": str(n)}) + "\n" for n in range(8)))
    config = folder / "config.yaml"
    config.write_text(
        f"model: {{path: {model}, dtype: bfloat16}}\n"
        f"data: {{path: {questions}, batch_questions: 4}}\n"
        "rollout: {samples_per_question: 4, max_response_tokens: 16}\n"
        "reward: {function: exact}\n"
        "train: {steps: 2, learning_rate: 1.0e-4}\n"
        f"run: {{dir: {folder / 'run'}}}\n"
    )
    assert run_training([str(config)]) == 0
    return folder / "run"


def test_engine_and_actor_agree_in_bfloat16(run_dir):
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    trained = [record for record in records if record["kind"] == "train"]
    assert len(trained) == 2
    for record in trained:
        assert record["actor/engine_logprob_difference"] < 0.05
        assert record["actor/first_ratio_off_one"] == 0


def test_the_export_loads_in_transformers(run_dir):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(run_dir / "hf")
    assert all(parameter.isfinite().all() for parameter in model.parameters())
