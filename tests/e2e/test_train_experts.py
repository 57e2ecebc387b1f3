"""A mixture of experts from a converted checkpoint, experts over two replicas, and on at another layout."""

import json

import pytest

from checkpoints_conv.hf_to_megatron import hf_to_megatron
from checkpoints_conv.megatron_to_hf import megatron_to_hf
from tests.support import e2e
from tests.support.conversion import tensors_of
from tests.support.toy_chat import make_chat_model

SETTINGS = """
model: {path: DIRECTORY/model, megatron: DIRECTORY/converted, dtype: float32}
parallel: {data: 2, expert: 2}
data: {path: DIRECTORY/train.jsonl, batch_questions: 2, max_prompt_tokens: 80}
modes: {high_entropy_prompt: explore}
rollout: {samples_per_question: 4, max_response_tokens: 6}
reward: {function: "tests.e2e.test_train_experts:reward", workers: 1, timeout_seconds: 60}
train: {steps: 3, learning_rate: 1.0e-3, optimizer_steps_per_batch: 2, max_tokens_per_micro_batch: 400}
checkpoint: {every: 2, keep: 10}
"""


def reward(response: str, question) -> float:
    """Differs between responses of a random model."""
    return float(sum(map(ord, response)) % 2)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    directory = tmp_path_factory.mktemp("experts")
    make_chat_model(directory / "model", "qwen3_moe", tied=False)
    hf_to_megatron(directory / "model", directory / "converted")
    rows = [{"question": str(number), "answer": ""} for number in range(4)]
    (directory / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "run.yaml").write_text(SETTINGS.replace("DIRECTORY", str(directory)))
    return directory / "run.yaml"


def test_experts_train_and_go_on_at_another_layout(config, tmp_path):
    whole = e2e.train(config, tmp_path / "whole")
    metrics = e2e.metrics(whole.directory, "train")
    assert [record["step"] for record in metrics] == [1, 2, 3]
    for record in metrics:
        assert record["actor/first_ratio_off_one"] == 0 and record["actor/bad_steps"] == 0
        # Of each step's weights: all experts reach the engines.
        assert record["actor/engine_logprob_difference"] < 1e-4
    assert sum(record["actor/grad_norm"] > 0 for record in metrics) >= 2

    exported, original = tensors_of(whole.directory / "hf"), tensors_of(config.parent / "model")
    assert set(exported) == set(original)
    moved = [name for name in exported if ".experts." in name and not exported[name].equal(original[name])]
    assert len(moved) > 10
    megatron_to_hf(whole.directory / "checkpoints" / "step_000003", tmp_path / "back")
    back = tensors_of(tmp_path / "back")
    assert all(back[name].equal(tensor) for name, tensor in exported.items())

    directory = e2e.at_step(whole.directory, tmp_path / "one", 2)
    other = e2e.train(config, directory, "parallel.data=1", "parallel.expert=1")
    again = e2e.metrics(other.directory, "train")[-1]
    for name in ("actor/loss", "actor/grad_norm", "normal/entropy_nats"):
        assert again[name] == pytest.approx(metrics[-1][name], rel=1e-4, abs=1e-5), name
