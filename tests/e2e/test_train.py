"""What a run leaves behind: metrics, rollouts, checkpoints, models, reports; other layouts, GRPO, replay."""

import json
import math

import pytest

from tests.support import e2e
from tests.support.dist import run_distributed

MODES = ("normal", "high_entropy")
TRAIN_METRICS = {
    *(
        f"{mode}/{name}"
        for mode in MODES
        for name in ("reward", "accuracy", "entropy_nats", "entropy_bits", "response_tokens", "truncated_share")
    ),
    "kl/normal_to_high_entropy",
    "kl/high_entropy_to_normal",
    *(
        f"actor/{name}"
        for name in (
            "loss",
            "grad_norm",
            "clip_fraction",
            "first_ratio_off_one",
            "learning_rate",
            "bad_steps",
            "bad_steps_total",
            "engine_logprob_difference",
            "skipped_rows",
            "rows",
        )
    ),
    "reward/errors",
    "rollout/retried",
    "rollout/duplicates",
    "memory/peak_gib",
    *(f"time/{phase}_s" for phase in ("step", "generate", "reward", "score", "update", "sync")),
    *(f"throughput/{phase}_tokens_per_s" for phase in ("generate", "score", "update")),
}
EVAL_METRICS = {
    f"eval/{mode}/{name}"
    for mode in MODES
    for name in (
        "reward",
        "accuracy",
        "entropy_nats",
        "kl_nats",
        "response_tokens",
        "truncated_share",
        "best_of_4",
        "pass_at_1",
        "pass_at_2",
        "pass_at_4",
        "unique_correct",
    )
}


def rollouts(run, step: int) -> list[dict]:
    return [json.loads(line) for line in (run.directory / "rollouts" / f"step_{step:06d}.jsonl").open()]


def test_every_metric_is_logged(straight):
    train, evaluation = (e2e.metrics(straight.directory, kind) for kind in ("train", "eval"))
    assert [record["step"] for record in train] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in evaluation] == [0, 3, 6]
    for record, wanted in [*((r, TRAIN_METRICS) for r in train), *((r, EVAL_METRICS) for r in evaluation)]:
        assert wanted - record.keys() == set()
        assert all(math.isfinite(record[name]) for name in wanted)


def test_metrics_make_sense(straight):
    for record in e2e.metrics(straight.directory, "train"):
        assert record["actor/first_ratio_off_one"] == 0
        assert 0 <= record["actor/engine_logprob_difference"] < 1e-4
        assert record["actor/rows"] == 4 * 8 * 2
        assert 0 <= record["actor/skipped_rows"] < record["actor/rows"]
        assert record["actor/grad_norm"] > 0
        assert record["actor/bad_steps"] == record["reward/errors"] == 0
        assert 0 <= record["actor/clip_fraction"] <= 1
        phases = sum(record[f"time/{phase}_s"] for phase in ("generate", "reward", "score", "update", "sync"))
        assert phases <= record["time/step_s"]
        for mode in MODES:
            assert 0 < record[f"{mode}/entropy_nats"] < math.log(32)
            assert 0 <= record[f"{mode}/reward"] <= 1
            assert 1 <= record[f"{mode}/response_tokens"] <= 8
        assert record["kl/normal_to_high_entropy"] > 0 < record["kl/high_entropy_to_normal"]
    rates = [record["actor/learning_rate"] for record in e2e.metrics(straight.directory, "train")]
    assert rates == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3])  # two optimizer steps a batch, four to warm up


def test_rollouts_agree_with_the_metrics(straight):
    for step, record in enumerate(e2e.metrics(straight.directory, "train"), start=1):
        made = rollouts(straight, step)
        keys = [(r["batch"], r["question"], r["mode"], r["sample"]) for r in made]
        assert len(set(keys)) == len(keys) == 4 * 8
        assert len({question for _, question, _, _ in keys}) == 4
        assert {batch for batch, *_ in keys} == {step - 1}
        for mode in MODES:
            own = [r for r in made if r["mode"] == mode]
            assert [r["sample"] for r in own] == [0, 1, 2, 3] * 4
            assert record[f"{mode}/reward"] == pytest.approx(sum(r["reward"] for r in own) / len(own))
            tokens = sum(len(r["tokens"]) for r in own)
            assert record[f"{mode}/response_tokens"] == pytest.approx(tokens / len(own))
            cut = sum(r["finish_reason"] == "length" for r in own)
            assert record[f"{mode}/truncated_share"] == pytest.approx(cut / len(own))
        for r in made:
            assert r["reward"] == float("+" in r["response"]) and r["reward_error"] is None
            assert len(r["tokens"]) == len(r["engine_logprobs"])
            assert all(logprob < 0 for logprob in r["engine_logprobs"])
            assert r["weight_versions"] == [[0, step - 1]]
            assert r["answer"] == e2e.TRAIN_ANSWER


def test_evaluation_rollouts_agree_with_the_metrics(straight):
    for record in e2e.metrics(straight.directory, "eval"):
        lines = (straight.directory / "rollouts" / f"eval_{record['step']:06d}.jsonl").open()
        found = [json.loads(line) for line in lines]
        assert len(found) == 3 * 2 * 4 and {r["answer"] for r in found} == {e2e.EVAL_ANSWER}
        for mode in MODES:
            rewards = [r["reward"] for r in found if r["mode"] == mode]
            assert sum(rewards) / len(rewards) == pytest.approx(record[f"eval/{mode}/reward"])


def test_every_question_is_trained_once_an_epoch(straight):
    trained = [{r["question"] for r in rollouts(straight, step)} for step in range(1, 6)]
    assert trained[0] | trained[1] | trained[2] == set(range(10))  # 10 questions, 4 a batch
    counts = [sum(question in batch for batch in trained) for question in range(10)]
    assert counts == [2] * 10


def test_tensorboard_and_wandb(straight):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(straight.directory / "tensorboard"))
    events.Reload()
    assert TRAIN_METRICS | EVAL_METRICS <= set(events.Tags()["scalars"])
    for record, event in zip(e2e.metrics(straight.directory, "train"), events.Scalars("actor/grad_norm"), strict=True):
        assert (event.step, event.value) == (record["step"], pytest.approx(record["actor/grad_norm"]))
    assert len(list(straight.directory.glob("wandb/offline-run-*/run-*.wandb"))) == 1


def test_console_shows_each_step(straight):
    text = straight.text()
    assert all(f"step {step}/6" in text for step in range(1, 7))
    assert f"saved {straight.directory}/checkpoints/step_000006 in " in text
    assert "evaluation after step 6 | normal: reward " in text


def checkpoint_weights(rank: int, config: str, path: str) -> dict:
    """A TP=2 checkpoint on one rank, under Hugging Face names."""
    from checkpoints_conv import read_hf_config
    from megatron_policysplit.actor import checkpoint, parallel
    from megatron_policysplit.actor.actor import Actor
    from megatron_policysplit.actor.weights import export_weights
    from megatron_policysplit.config.load import load_config

    loaded = load_config(config, ["run.dir=unused", "parallel.tensor=1"])
    layout = parallel.initialize(loaded.parallel, seed=0)
    actor = Actor(loaded, read_hf_config(loaded.model.path), layout)
    checkpoint.load(actor, e2e.Path(path))
    return {name: t.numpy() for name, t in export_weights(actor.model, actor.hf_config, "every_rank")}


def test_the_exported_model_is_that_of_the_last_checkpoint(config, straight):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(straight.directory / "hf", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(straight.directory / "hf")
    messages = [{"role": "user", "content": "9"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    with torch.no_grad():
        exported = model(ids).logits
        path = straight.directory / "checkpoints" / "step_000006"
        (saved,) = run_distributed(checkpoint_weights, 1, str(config), str(path))
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(saved.pop(name)))
        assert not saved
        assert torch.equal(model(ids).logits, exported)
    start = AutoModelForCausalLM.from_pretrained(config.parent / "model", dtype=torch.float32)
    assert not torch.equal(start(ids).logits, exported)


def test_the_best_model_is_kept(straight):
    """Of the evaluations after training began; it beats the one before."""
    accuracies = {r["step"]: r["eval/normal/accuracy"] for r in e2e.metrics(straight.directory, "eval")}
    best = max(accuracies, key=lambda step: (accuracies[step], -step))
    assert best > 0, "choose settings with which training helps"
    exported = (straight.directory / "best" / "model.safetensors").read_bytes()
    assert (exported == e2e.weights(straight.directory)) == (best == 6)
    assert (straight.directory / "best" / "chat_template.jinja").exists()


def test_report(straight, tmp_path):
    from typer.testing import CliRunner

    from megatron_policysplit.cli.main import app

    page = tmp_path / "report.html"
    result = CliRunner().invoke(app, ["report", str(straight.directory), "--output", str(page)])
    assert result.exit_code == 0, result.output
    text = page.read_text()
    assert "<img" in text and "http://" not in text.replace("http://www.w3.org", "")


def test_a_finished_run_is_not_trained_again(config, straight, tmp_path):
    directory = e2e.at_step(straight.directory, tmp_path / "run", 6)
    running = e2e.train(config, directory)
    assert f"resumed from {directory}/checkpoints/step_000006" in running.text()
    assert "step 1/6" not in running.text()
    e2e.assert_same_run(directory, straight.directory)


def test_replay_trains_alike_without_an_engine(config, straight, tmp_path):
    replay = ("rollout.engine=replay", f"rollout.replay_dir={straight.directory / 'rollouts'}", "eval.path=null")
    e2e.train(config, tmp_path / "run", *replay, "train.steps=4")
    trained, original = (e2e.metrics(directory, "train") for directory in (tmp_path / "run", straight.directory))
    assert e2e.untimed(trained) == e2e.untimed(original[:4])
    for step in range(1, 5):
        name = f"rollouts/step_{step:06d}.jsonl"
        assert (tmp_path / "run" / name).read_bytes() == (straight.directory / name).read_bytes()


def test_grpo_over_two_pipeline_stages(config, tmp_path):
    overrides = ("algorithm.name=grpo", "parallel.tensor=1", "parallel.pipeline=2", "train.steps=2", "eval.every=1")
    leave = ("checkpoint.every=1", "checkpoint.keep=1", "checkpoint.hugging_face=false")
    run = e2e.train(config, tmp_path / "run", *overrides, *leave)
    assert e2e.checkpoints(run.directory) == ["step_000002"]
    assert not (run.directory / "hf").exists() and not (run.directory / "best").exists()
    train, evaluation = (e2e.metrics(run.directory, kind) for kind in ("train", "eval"))
    assert [record["step"] for record in evaluation] == [0, 1, 2]
    for record in train:
        assert record["actor/rows"] == 4 * 8 and "normal/reward" in record
        assert not any(name.startswith(("high_entropy/", "kl/")) for name in record)
        assert record["actor/first_ratio_off_one"] == 0
        assert record["actor/engine_logprob_difference"] < 1e-4
    assert {r["mode"] for r in rollouts(run, 1)} == {"normal"}
    assert all(EVAL_METRICS <= record.keys() for record in evaluation)


@pytest.mark.parametrize(
    "layout", [{"tensor": 1, "data": 2}, {"tensor": 1, "pipeline": 2}], ids=lambda layout: "-".join(layout)
)
def test_other_layouts_train_alike(config, straight, tmp_path, layout):
    """Two steps; later ones may sample other tokens where probabilities differ in their last digits."""
    overrides = [f"parallel.{name}={size}" for name, size in layout.items()]
    run = e2e.train(config, tmp_path / "run", *overrides, "train.steps=2", "rollout.lot_questions=1")
    for record, reference in zip(*(e2e.metrics(r.directory, "train")[:2] for r in (run, straight)), strict=True):
        assert record["actor/first_ratio_off_one"] == 0
        for name in ("actor/loss", "actor/grad_norm", "kl/high_entropy_to_normal", "normal/entropy_nats"):
            assert record[name] == pytest.approx(reference[name], rel=1e-4, abs=1e-6), name
        assert record["normal/reward"] == reference["normal/reward"]
        assert record["actor/skipped_rows"] == reference["actor/skipped_rows"]
